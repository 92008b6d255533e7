"""Compare two runs: settings, data, code, environment and numbers, and the first training step at which they part.

posttrain diff tiny tiny-lora
posttrain diff results /elsewhere/results
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

from posttrain.config.stages import STAGES
from posttrain.ground.errors import UserError
from posttrain.ground.files import listed
from posttrain.ground.identity import record_of
from posttrain.reporting.departure import numbers
from posttrain.reporting.records import BROKEN, read_json
from posttrain.reporting.text import short, visible
from posttrain.tools.explain import RESULTS, artifacts_of, chain
from posttrain.tools.why import differences, edited_modules
from posttrain.training import spotchecks

SHOWN = 3  # files that are named of those with other rows, or other bytes


def diff(one: str, other: str) -> str:
    """What differs between two experiments, artifacts or folders of results, stage by stage in the order of the table:
    the first stage that is named is where the two part.

    Raises UserError for a name or folder without artifacts.
    """
    folders = [folders_of(name) for name in (one, other)]
    for name, of_name in zip((one, other), folders, strict=True):
        if not of_name:
            raise UserError(f"{visible(name)}: neither an experiment with artifacts in {RESULTS}, nor a folder of some")
    lines, alike = [], 0
    for path in sorted(folders[0].keys() | folders[1].keys(), key=order):
        if path not in folders[0] or path not in folders[1]:
            lines.append(f"{path}: only in {one if path in folders[0] else other}")
        elif parts := differing_parts(folders[0][path], folders[1][path]):
            lines += [path, *(f"  {part}" for part in parts)]
        else:
            alike += 1
    return visible("\n".join([f"{one} -> {other}", *lines, f"alike: {alike} artifacts"]), keep="\n")


def folders_of(name: str) -> dict[str, Path]:
    """Path in the comparison -> folder, of the artifacts of a folder, or of an experiment, with those that it uses of
    others."""
    root = Path(name) if Path(name).is_dir() else RESULTS / name
    own = {"the artifact" if path == "." else path: root / path for path in artifacts_of(root)}
    if root.parent != RESULTS:
        return own
    used = [above for folder in own.values() for above in chain(folder) if above.is_relative_to(RESULTS)]
    return {"/".join(folder.relative_to(RESULTS).parts[1:]): folder for folder in used} | own


def order(path: str) -> tuple:
    """Sorts artifacts in the order of the table of stages, so that none comes before one that it depends on."""
    parts = path.split("/")
    ranks = [list(STAGES).index(part) for part in parts if part in STAGES]
    return (ranks[:1], parts)


def differing_parts(one: Path, other: Path) -> list[str]:
    """What differs between two artifacts, a line each; that a record cannot be read is a difference too."""
    lines: list[str] = []
    try:
        lines += of_records(*(record_of(folder) for folder in (one, other)))
        lines += of_files(one, other)
        metrics = [read_json(folder / "metrics.json") for folder in (one, other)]
        lines += parted(one, other, *metrics)
        before, now = map(numbers, metrics)
        for name in before | now:
            if not is_same(before.get(name), now.get(name)):
                lines.append(f"{name}: {change(before.get(name), now.get(name))}")
    except BROKEN as error:
        lines.append(f"its records cannot be read: {error}")
    return lines


def of_records(one: dict, other: dict) -> Iterator[str]:
    """Differences in settings, code, environment and inputs, by two records of provenance."""
    if not one or not other:
        yield "a provenance.json is gone or broken: settings, code and environment are not known"
        return
    yield from differences("settings", *(json.loads(record["params"][0]) for record in (one, other)))
    if one["params"][1] != other["params"][1]:
        yield from edited_modules(*(record.get("code", {}) for record in (one, other)))
    for key in ("shape", "python", "platform"):
        yield from differences(f"environment.{key}", *(record.get(key) for record in (one, other)))
    yield from of_inputs(one["inputs"], other["inputs"])


def of_inputs(one: dict[str, dict[str, str]], other: dict[str, dict[str, str]]) -> Iterator[str]:
    """The user's own files with other bytes, each; and the roles whose artifacts are others."""
    before, now = (
        {file: digest for files in roles.values() for file, digest in files.items()} for roles in (one, other)
    )
    for file in sorted(before.keys() & now.keys()):
        if not file.endswith("/manifest.json") and before[file] != now[file]:
            yield f"data: {file}: {before[file][:12]} -> {now[file][:12]}"
    made = [
        {role: sorted(files.values()) for role, files in roles.items() if role != "files"} for roles in (one, other)
    ]
    roles = [role for role in sorted(made[0].keys() | made[1].keys()) if made[0].get(role) != made[1].get(role)]
    if roles:
        yield f"follows from another {', '.join(roles)}"


def of_files(one: Path, other: Path) -> Iterator[str]:
    """The first rows that differ, and the names of other files with other bytes, by the manifests."""
    before, now = (files_of(folder) for folder in (one, other))
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    rows = [name for name in names if name.endswith(".jsonl") and (one / name).is_file() and (other / name).is_file()]
    for name in rows[:SHOWN]:
        yield first_row(name, one / name, other / name)
    rest = [name for name in names if name not in rows[:SHOWN] and name != "metrics.json"]
    if rest:
        more = f" and {len(rest) - SHOWN} more" if len(rest) > SHOWN else ""
        yield f"bytes: {', '.join(rest[:SHOWN])}{more}"


def files_of(folder: Path) -> dict[str, str]:
    """File -> sha256, by the manifest of an artifact; {} without a readable one."""
    try:
        return {name: digest for name, (digest, _) in listed(folder / "manifest.json").items()}
    except UserError:
        return {}


def first_row(name: str, one: Path, other: Path) -> str:
    """The first row in which two files of rows differ, with the text around the first character that does."""
    with (
        open(one, encoding="utf-8", errors="replace") as before,
        open(other, encoding="utf-8", errors="replace") as now,
    ):
        for line, (old, new) in enumerate(itertools.zip_longest(before, now, fillvalue=""), 1):
            if old != new:
                place = next(n for n, pair in enumerate(itertools.zip_longest(old, new)) if pair[0] != pair[1])
                texts = [repr(text[max(0, place - 20) : place + 20]) if text else "no such row" for text in (old, new)]
                return f"rows: {name}: row {line}: {texts[0]} -> {texts[1]}"
    return f"rows: {name}: equal as text, other bytes"


def parted(one: Path, other: Path, *metrics: dict) -> Iterator[str]:
    """The first recorded step at which two trainings differ, with the first number that does: the loss, if it does.

    Every step is on record in the states that a training kept (`spotchecks`), else only the points of its curve.
    """
    curves = [{entry["step"]: entry for entry in one_metrics.get("history", [])} for one_metrics in metrics]
    last = 0
    for before, now in ([steps_of_state(one), steps_of_state(other)], curves):
        for step in sorted(step for step in before.keys() & now.keys() if step > last):
            if difference := first_difference(before[step], now[step]):
                yield f"parts {between(last, step)}: {difference}"
                return
            last = step
    if curves[0].keys() != curves[1].keys():
        yield f"{len(curves[0])} -> {len(curves[1])} recorded steps"


def steps_of_state(folder: Path) -> dict[int, dict]:
    """Step -> its figures, of all steps up to the last state that a training kept; {} where it kept none."""
    for state in sorted((folder / spotchecks.FOLDER).glob("[0-9]*/"), reverse=True):
        if (state / "trainer_state.json").is_file():
            return {
                entry["step"]: entry for entry in spotchecks.logged(log(state / "trainer_state.json", "log_history"))
            }
        return {entry["step"]: entry for entry in log(state / "state.json", "history")}
    return {}


def log(file: Path, key: str) -> list[dict]:
    """What a stored state holds of the steps before it."""
    return read_json(file).get(key, [])


def first_difference(before: dict, now: dict) -> str:
    """The first figure of a step that differs, as `loss 1.5 -> 1.6`; "" where none does."""
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key != "loss", key)):
        if not is_same(before.get(key), now.get(key), 0.0):
            return f"{key} {change(before.get(key), now.get(key))}"
    return ""


def between(last: int, step: int) -> str:
    """The steps among which is the first that differs. last: the one recorded before; 0 for none."""
    if last == 0 and step > 1:
        return f"by step {step}, the first on record"
    return f"at step {step}" if step - last == 1 else f"after step {last} and by step {step}, the next on record"


def is_same(old: float | None, new: float | None, tolerance: float = 1e-12) -> bool:
    """Whether two numbers differ by at most a share of themselves, or are both NaN, or both absent."""
    if old is None or new is None:
        return old is new
    return math.isclose(old, new, rel_tol=tolerance) or (math.isnan(old) and math.isnan(new))


def change(old: float | None, new: float | None) -> str:
    """Two values, as `0.912 -> 0.915`, with as many digits as it takes to tell them apart."""
    texts = [short(value) or "none" for value in (old, new)]
    return " -> ".join(texts if texts[0] != texts[1] else map(repr, (old, new)))
