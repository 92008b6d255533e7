"""Compare two runs: settings, data, code, environment and numbers, and the first training step at which they part.

posttrain diff tiny tiny-lora
posttrain diff results /elsewhere/results
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from posttrain.config.stages import STAGES
from posttrain.ground.errors import UserError
from posttrain.ground.identity import record_of
from posttrain.reporting.departure import numbers
from posttrain.reporting.records import BROKEN, read_json
from posttrain.reporting.text import short, visible
from posttrain.tools.explain import RESULTS, artifacts_of
from posttrain.tools.why import differences, edited_modules


def diff(one: str, other: str) -> str:
    """What differs between two experiments, artifacts or folders of results, stage by stage in the order of the table:
    the first stage that is named is where the two part.

    Raises UserError for a name or folder without artifacts.
    """
    roots = [root_of(name) for name in (one, other)]
    paths = [{place(path): path for path in artifacts_of(root)} for root in roots]
    for name, of_root in zip((one, other), paths, strict=True):
        if not of_root:
            raise UserError(f"{name}: neither an experiment with artifacts in {RESULTS}, nor a folder of artifacts")
    lines, alike = [], 0
    for path in sorted(paths[0].keys() | paths[1].keys(), key=order):
        if path not in paths[0] or path not in paths[1]:
            lines.append(f"{path}: only in {one if path in paths[0] else other}")
        elif parts := list(parting(roots[0] / paths[0][path], roots[1] / paths[1][path])):
            lines += [path, *(f"  {part}" for part in parts)]
        else:
            alike += 1
    return "\n".join([f"{one} -> {other}", *lines, f"alike: {alike} artifacts"])


def root_of(name: str) -> Path:
    """The folder that a name stands for: itself, or an experiment's or an artifact's in the folder of results."""
    return Path(name) if Path(name).is_dir() else RESULTS / name


def place(path: str) -> str:
    """The name of an artifact in the comparison: `.` is the folder itself."""
    return "the artifact" if path == "." else path


def order(path: str) -> tuple:
    """Sorts artifacts by experiment, in the order of the table of stages."""
    parts = path.split("/")
    stage = next((number for number, part in enumerate(parts) if part in STAGES), 0)
    rank = list(STAGES).index(parts[stage]) if parts[stage] in STAGES else -1
    return (parts[:stage], rank, parts[stage:])


def parting(one: Path, other: Path) -> Iterator[str]:
    """What differs between two artifacts."""
    records = [record_of(folder) for folder in (one, other)]
    if not all(records):
        yield "a provenance.json is gone: settings, code and environment are not known"
    else:
        yield from differences("settings", *(settings(record) for record in records))
        if records[0]["params"][1] != records[1]["params"][1]:
            yield from edited_modules(*(record.get("code", {}) for record in records))
        for key in ("shape", "python", "platform"):
            yield from differences(f"environment.{key}", *(record.get(key) for record in records))
        yield from data(*records)
    try:
        metrics = [read_json(folder / "metrics.json") for folder in (one, other)]
    except BROKEN as error:
        yield str(error)
        return
    yield from parted(*metrics)
    before, now = map(numbers, metrics)
    for name in before.keys() | now.keys():
        if not math.isclose(before.get(name, math.nan), now.get(name, math.nan), rel_tol=1e-12):
            yield f"{visible(name)}: {short(before.get(name))} -> {short(now.get(name))}"


def settings(record: dict) -> dict:
    """The section in a record."""
    return json.loads(record["params"][0])


def data(one: dict, other: dict) -> Iterator[str]:
    """The user's own files that two artifacts read with other bytes; inputs made by a stage have lines of their own."""
    files = [
        {file: digest for inputs in record["inputs"].values() for file, digest in inputs.items()}
        for record in (one, other)
    ]
    for file in sorted(files[0].keys() & files[1].keys()):
        if not file.endswith("/manifest.json") and files[0][file] != files[1][file]:
            yield f"data: {file}: {files[0][file][:12]} -> {files[1][file][:12]}"


def parted(one: dict, other: dict) -> Iterator[str]:
    """The first recorded step at which two trainings differ, with the first number that does: the loss, if it does."""
    histories = one.get("history", []), other.get("history", [])
    for before, now in zip(*histories, strict=False):
        for key in sorted(before, key=lambda key: key != "loss"):
            if before[key] != now.get(key) and not math.isnan(before[key]):
                recorded = f"recorded every {histories[0][0].get('step')} steps"
                yield f"parts by step {before.get('step')} ({recorded}): {key} {before[key]:.8g} -> {now.get(key)}"
                return
    if len(histories[0]) != len(histories[1]):
        yield f"{len(histories[0])} -> {len(histories[1])} recorded steps"
