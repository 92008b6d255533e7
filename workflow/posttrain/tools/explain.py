"""Trace a number back to its bytes: its questions, the policy, the data, and for each the settings, code and job.

posttrain explain tiny/evaluate/sft "world exact_match"
"""

import contextlib
import itertools
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from posttrain.config.mistakes import nearest
from posttrain.config.stages import STAGES
from posttrain.dag.campaign import DEFAULT, load
from posttrain.dag.plan import RESERVED
from posttrain.ground.errors import UserError
from posttrain.ground.files import listed, read_object, sha256
from posttrain.ground.identity import named, record_of
from posttrain.reporting import compute
from posttrain.reporting.departure import numbers
from posttrain.reporting.records import BROKEN, groups_of, read_json
from posttrain.reporting.text import short, visible

RESULTS = Path("results")
ANSWERS = "answers.jsonl"
SHOWN = 20  # artifacts that are listed


def explain(place: str, number: str | None = None) -> str:
    """Where a number of an artifact comes from, in lines: the number, what it was computed from, and every artifact
    that it rests on, the nearest first.

    place: an artifact, as `tiny/evaluate/sft`, or its folder. number: one of its numbers, as `world exact_match`; all
    of them where None. Raises UserError for an artifact that is not there or cannot be read, and for a number that it
    has not.
    """
    folder = folder_of(place)
    metrics = metrics_of(folder)
    try:
        return visible("\n".join(lines_of(folder, metrics, number)), keep="\n")
    except BROKEN as error:
        raise UserError(visible(f"{folder}: its records cannot be read ({error}); posttrain verify")) from None


def lines_of(folder: Path, metrics: dict, number: str | None) -> Iterator[str]:
    """The lines of an explanation."""
    values = numbers(metrics)
    if number is not None and number not in values:
        raise UserError(f"{folder}: has no {number!r}; it has {', '.join(map(visible, values)) or 'no numbers'}")
    name_of_folder = folder.relative_to(RESULTS)
    for name, value in values.items():
        if number in (None, name):
            yield f"{name_of_folder}: {name} {shown(metrics, name, value)}"
    if number and "rows" in metrics:
        yield from questions(folder, number.rpartition(" ")[0])
    above = chain(folder)
    remade = campaigns_of(above)
    for artifact in above:
        yield ""
        yield from artifact_lines(artifact, remade.get(artifact))
    yield from ["", *environments(above)]


def folder_of(place: str) -> Path:
    """The folder of an artifact, by its name, its folder or a file in that. Raises UserError outside of the results."""
    path = Path(os.path.normpath(place))
    path = path.parent if path.suffix == ".json" else path
    folder = path if path.parts[:1] == RESULTS.parts else RESULTS / path
    if ".." in folder.parts or not folder.is_relative_to(RESULTS):
        raise UserError(visible(f"{place}: is not in {RESULTS}; name an artifact, as tiny/evaluate/sft"))
    return folder


def artifacts_of(root: Path) -> list[str]:
    """The artifacts below a folder, by their paths in it, damaged ones too; what is kept for reuse is none of them."""
    files = [*root.glob("**/metrics.json"), *root.glob("**/manifest.json")]
    paths = {file.parent.relative_to(root) for file in files}
    ours = [path for path in paths if not any(part.startswith(".") or part == "checkpoints" for part in path.parts)]
    return sorted(str(path) for path in ours if path.parts[:1] not in [(name,) for name in RESERVED])


def metrics_of(folder: Path) -> dict:
    """The metrics of an artifact. Raises UserError where it is not there, naming those that are, or is damaged."""
    try:
        return read_json(folder / "metrics.json")
    except BROKEN as error:
        if (folder / "manifest.json").is_file():
            todo = f"posttrain verify sets the artifact aside, and snakemake remakes it: {folder}"
            raise UserError(visible(f"{folder}: {error}; {todo}")) from None
        there = artifacts_of(RESULTS)
        hint = nearest(str(folder.relative_to(RESULTS)), there)
        more = f" and {len(there) - SHOWN:,} more" if len(there) > SHOWN else ""
        listing = ", ".join(there[:SHOWN]) + more or "none"
        raise UserError(visible(f"{folder}: there is no such artifact{hint}; there are {listing}")) from None


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
        with open(file, "rb") as rows:
            yield f"  from {file}: {sum(1 for _ in rows):,} questions, sha256 {sha256(file)[:16]}"


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


def artifact_lines(folder: Path, remade: list[str] | None) -> Iterator[str]:
    """What an artifact is: when and where it was made, its settings, code, inputs and weights, and how to remake it.

    remade: the options of Snakemake with which it does; None where no campaign here has the artifact.
    """
    record = record_of(folder)
    yield f"{folder}"
    if not record:
        yield "  its provenance.json is gone: nothing is known of how it was made"
        return
    took = f"{short(record['seconds'])} s, " if "seconds" in record else ""
    place = record.get("host", "an unknown machine") + (f", job {record['job']}" if record.get("job") else "")
    yield f"  made      {record.get('started', 'at an unknown time')}, {took}on {place}"
    own = folder.is_relative_to(RESULTS)  # others were made by hand, in another folder
    if attempts := compute.attempts(RESULTS, str(folder.relative_to(RESULTS))) if own else []:
        yield f"  attempts  {compute.in_words(attempts)}"
    yield f"  commit    {record.get('git_commit', 'unknown')}"
    yield f"  code      {record['params'][1]}"
    yield f"  settings  {settings(record['params'][0])}"
    for role, files in sorted(record["inputs"].items()):
        for file, digest in files.items():
            yield f"  {role:9} {file} sha256 {digest[:16]}{now(file, digest)}"
    for name, (digest, size) in weights(folder).items():
        yield f"  bytes     {name} sha256 {digest[:16]}, {short(size)} bytes{now(str(folder / name), digest)}"
    yield f"  again     {remake(folder, remade)}"


def remake(folder: Path, options: list[str] | None) -> str:
    """The command that makes an artifact anew. options: of `campaigns_of`; None where no campaign here has it."""
    if options is None:
        return "no campaign here has this artifact"
    return shlex.join(["snakemake", "--cores", "2", "--force", f"{folder}/manifest.json", *options])


def campaigns_of(folders: list[Path]) -> dict[Path, list[str]]:
    """Artifact -> the options of Snakemake with which it makes the artifact anew, and takes no kept one: of the last
    campaign that ran here and has it, else of the first in `config` that has."""
    found: dict[Path, list[str]] = {}
    for configfile, made in itertools.chain(that_ran(), in_config()):
        options = ["--config", "keep_gb=0", *(["--configfile", configfile] if configfile else [])]
        found = {Path(folder): options for folder in made} | found
        if found.keys() >= set(folders):
            break
    return found


def that_ran() -> Iterator[tuple[str, list[str]]]:
    """(file, "" for the default one; folders of its artifacts) of the campaigns that ran here and still have
    their file, the last one first."""
    for file in sorted(Path(named("")).parent.glob("*.json"), key=lambda file: -file.stat().st_mtime):
        summary = read_object(file)
        configfile = summary.get("configfile", "")
        if "owners" in summary and Path(configfile or DEFAULT).is_file():  # others are plans, frozen for their jobs
            yield configfile, compute.folders_of(summary)


def in_config() -> Iterator[tuple[str, list[str]]]:
    """The same of the campaigns in `config`, the default one first; those with mistakes are left out."""
    for file in dict.fromkeys([Path(DEFAULT), *sorted(Path(DEFAULT).parent.glob("*.yaml"))]):
        with contextlib.suppress(UserError):
            yield "" if file == Path(DEFAULT) else str(file), load(file).folders()


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


def environments(folders: list[Path]) -> Iterator[str]:
    """The machines and the versions of packages with which artifacts were made; one line where all are the same."""
    kinds = {"machine": machine, "versions": versions}
    for label, text_of in kinds.items():
        sets: dict[str, list[str]] = {}
        for folder in folders:
            sets.setdefault(text_of(record_of(folder)), []).append(str(folder))
        for text, names in sets.items():
            if text:
                yield f"{label:11} {text}" + (f" ({', '.join(names)})" if len(sets) > 1 else "")


def versions(record: dict) -> str:
    """The versions of packages in a record; "" for none."""
    return ", ".join(f"{name} {version}" for name, version in record.get("shape", {}).get("versions", {}).items())


def machine(record: dict) -> str:
    """The machine in a record, as far as it may change the last bits of a result; "" where it is unknown."""
    shape = [f"{key} {value}" for key, value in record.get("shape", {}).items() if key != "versions"]
    return ", ".join([*(f"{key} {record[key]}" for key in ("python", "platform") if key in record), *shape])
