"""Trace a number back to its bytes: its questions, the policy, the data, and for each the settings, code and job.

posttrain explain tiny/evaluate/sft "world exact_match"
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from posttrain.config.mistakes import nearest
from posttrain.config.stages import STAGES
from posttrain.ground.errors import UserError
from posttrain.ground.files import listed, rows_of, sha256
from posttrain.ground.identity import record_of
from posttrain.reporting import compute
from posttrain.reporting.departure import numbers
from posttrain.reporting.records import BROKEN, groups_of, read_json
from posttrain.reporting.text import short, visible

RESULTS = Path("results")
ANSWERS = "answers.jsonl"


def explain(place: str, number: str | None = None) -> str:
    """Where a number of an artifact comes from, in lines: the number, what it was computed from, and every artifact
    that it rests on, the nearest first.

    place: an artifact, as `tiny/evaluate/sft`. number: one of its numbers, as `world exact_match`; all of them where
    None. Raises UserError for an artifact that is not there, and for a number that it has not.
    """
    folder = RESULTS / place.removeprefix("results/").strip("/")
    metrics = metrics_of(folder)
    values = numbers(metrics)
    if number is not None and number not in values:
        raise UserError(f"{folder}: has no {number!r}; it has {', '.join(map(visible, values)) or 'no numbers'}")
    lines = [
        f"{place}: {name} {shown(metrics, name, value)}" for name, value in values.items() if number in (None, name)
    ]
    lines += questions(folder, number.partition(" ")[0]) if number and "rows" in metrics else []
    above = chain(folder)
    lines += [line for artifact in above for line in ["", *artifact_lines(artifact)]]
    return "\n".join([*lines, "", *versions(above)])


def artifacts_of(root: Path) -> list[str]:
    """The artifacts below a folder, by their paths in it; what is kept for reuse is none of them."""
    paths = (file.parent.relative_to(root) for file in root.glob("**/metrics.json"))
    return sorted(str(path) for path in paths if not path.parts or not path.parts[0].startswith((".", "report")))


def metrics_of(folder: Path) -> dict:
    """The metrics of an artifact. Raises UserError where it is not there, naming those that are."""
    try:
        return read_json(folder / "metrics.json")
    except BROKEN:
        there = artifacts_of(RESULTS)
        hint = nearest(str(folder.relative_to(RESULTS)), there)
        raise UserError(f"{folder}: there is no such artifact{hint}; there are {', '.join(there) or 'none'}") from None


def shown(metrics: dict, name: str, value: float) -> str:
    """A number with its standard error and the number of its questions."""
    row: dict = next((row for row in metrics.get("rows", []) if f"{row['task']} {row['metric']}" == name), {})
    error = f" ± {short(row['stderr'])}" if row.get("stderr") is not None else ""
    return f"{short(value)}{error}" + (f", {row['n']:,} questions" if row.get("n") else "")


def questions(folder: Path, task: str) -> Iterator[str]:
    """A line for each file of recorded questions behind a row, with its bytes' digest."""
    members = groups_of(folder / "lm_eval.json").get(task) or [task]
    files = [folder / "data" / "samples" / f"{member}.jsonl" for member in members] + [folder / "data" / ANSWERS]
    for file in filter(Path.is_file, files):
        yield f"  from {file}: {sum(1 for _ in rows_of(file)):,} questions, sha256 {sha256(file)[:16]}"


def chain(folder: Path) -> list[Path]:
    """An artifact and every artifact that it rests on, by its provenance, from the last stage to the first,
    so that the policy stands before the data."""
    waiting, seen = [folder], [folder]
    while waiting:
        inputs = record_of(waiting.pop()).get("inputs", {}).values()
        above = [Path(file).parent for files in inputs for file in files if file.endswith("/manifest.json")]
        new = [artifact for artifact in dict.fromkeys(above) if artifact not in seen]
        waiting, seen = waiting + new, seen + new
    order = [*STAGES, record_of(folder).get("stage")]
    return sorted(seen, key=lambda one: (one != folder, -order.index(record_of(one).get("stage", order[0]))))


def artifact_lines(folder: Path) -> Iterator[str]:
    """What an artifact is: when and where it was made, its settings, code, inputs and weights, and how to remake it."""
    record = record_of(folder)
    yield f"{folder}"
    if not record:
        yield "  its provenance.json is gone: nothing is known of how it was made"
        return
    cost = [
        f"{record['seconds']:,.0f} s" if "seconds" in record else "",
        f"on {record.get('host', 'an unknown machine')}",
    ]
    cost += [f"job {record['job']}"] if record.get("job") else []
    yield f"  made      {record.get('started', 'at an unknown time')}, {', '.join(filter(None, cost))}"
    if attempts := compute.attempts(RESULTS, str(folder.relative_to(RESULTS))):
        yield f"  attempts  {compute.in_words(attempts)}"
    yield f"  commit    {record.get('git_commit', 'unknown')}"
    yield f"  code      {record['params'][1]}"
    yield f"  settings  {settings(record['params'][0])}"
    for role, files in sorted(record["inputs"].items()):
        for file, digest in files.items():
            yield f"  {role:9} {file} sha256 {digest[:16]}{now(file, digest)}"
    for name, (digest, size) in weights(folder).items():
        yield f"  bytes     {name} sha256 {digest[:16]}, {size:,} bytes{now(str(folder / name), digest)}"
    yield f"  again     snakemake --cores 2 --force {shlex.quote(f'{folder}/manifest.json')}"


def settings(section: str) -> str:
    """A section in one line, as YAML has it; the text itself where it is no section."""
    try:
        return json.dumps(json.loads(section))
    except ValueError:
        return section


def now(file: str, digest: str) -> str:
    """What has become of a file since: nothing where it has the bytes on record."""
    path = Path(file)
    if not path.is_file():
        return " (it is not here)"
    return "" if sha256(path) == digest else f" (it is another one now: {sha256(path)[:16]})"


def weights(folder: Path) -> dict[str, tuple[str, int]]:
    """The files of an artifact that hold weights or rows, with sha256 and size; no more than six of them."""
    try:
        files = listed(folder / "manifest.json")
    except UserError:
        return {}
    held = {name: entry for name, entry in files.items() if name.endswith((".safetensors", ".jsonl", ".arrow"))}
    return dict(sorted(held.items(), key=lambda item: -item[1][1])[:6])


def versions(folders: list[Path]) -> Iterator[str]:
    """The versions of packages with which artifacts were made; one line where all are the same."""
    sets: dict[str, list[str]] = {}
    for folder in folders:
        used = record_of(folder).get("shape", {}).get("versions", {})
        sets.setdefault(", ".join(f"{name} {version}" for name, version in used.items()), []).append(str(folder))
    for text, names in sets.items():
        if text:
            yield f"versions    {text}" + (f" ({', '.join(names)})" if len(sets) > 1 else "")
