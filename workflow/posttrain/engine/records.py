"""Write Snakemake's records of outputs from the artifacts' provenance, so that they hold after a pull or a copy.

Snakemake decides by its records in `.snakemake/metadata` and by dates. Neither is copied with an artifact, and
Snakemake does not notice a file that was replaced by an older one. Each artifact's `provenance.json` lists its
parameters and inputs, so the records are written from it at planning; only changed files are read.
"""

import base64
import json
import os
from pathlib import Path

from posttrain.dag import artifacts
from posttrain.dag.parameters import arguments
from posttrain.ground.errors import UserError
from posttrain.ground.files import of_another_size, read_object, sha256, stats_of, write_text
from posttrain.ground.identity import DAMAGED, canonical, record_of
from posttrain.ground.progress import say
from posttrain.jobs import damage

METADATA = Path(".snakemake/metadata")
SEEN = Path(".snakemake/seen.json")  # size, dates and inode of every file that was read
VERIFIED = Path(".snakemake/verified.json")  # the same of every file of an artifact, for DVC
FORMAT = 6  # of Snakemake's records: `RECORD_FORMAT_VERSION` of the pinned version (`versions`)


def sync(folders: list[str], looking: bool = False) -> None:
    """Write Snakemake's records of the artifacts in `folders`, if an artifact or one of its inputs has changed.

    looking: for a call that runs nothing (`snakemake -n`), which leaves a damaged artifact as it is: someone may be
    copying it.
    """
    before = read_object(SEEN)
    stats: dict = before["files"] if isinstance(before.get("files"), dict) else {}
    written_for = {"folders": folders, "code": _code()}
    if stats and before | written_for | {"records": _records()} == before and stats_of(stats) == stats:
        return
    seen: dict[str, list[int] | None] = {}
    short: dict[str, None] = {}
    digests: dict[str, str | None] = {}
    for folder in map(Path, folders):
        provenance, manifest, metrics = (folder / f"{name}.json" for name in ("provenance", "manifest", "metrics"))
        if not manifest.is_file():
            continue
        watched = stats_of([str(manifest), str(metrics)])
        changed = [file for file, status in watched.items() if status != stats.get(file)]
        if changed and (problem := _damaged_file(manifest, [str(metrics)])):
            if looking:
                say(f"{problem}; a run would remake {folder}, unless a copy is under way: wait for it")
                short[str(manifest)] = None  # so that the next call looks at it again
                continue
            _set_aside(manifest, problem)
        record = record_of(folder)
        inputs = [pair for files in record.get("inputs", {}).values() for pair in files.items()]
        seen |= stats_of([str(provenance), *watched, *(file for file, _ in inputs)])
        for file, _ in inputs:
            if file not in digests:
                digests[file] = sha256(Path(file)) if os.path.isfile(file) else None
        other = [file for file, digest in inputs if digests[file] not in (digest, None) or damaged(file)]
        _write(folder, inputs, _params(folder, record, list(dict.fromkeys(other))))
    if seen:
        _note(SEEN, written_for | {"files": seen | short, "records": _records()})


def verify(folders: list[str]) -> None:
    """Set aside every artifact of which a file has other bytes than its manifest says, before DVC would enter it.

    Only files that changed since the last call are read.
    """
    before = read_object(VERIFIED)
    now: dict[str, list[int] | None] = {}
    for manifest in (Path(folder, "manifest.json") for folder in folders):
        files = list(damage.digests(manifest))
        stats = stats_of([str(manifest), *files])
        same_manifest = stats[str(manifest)] == before.get(str(manifest))
        changed = [file for file in files if not same_manifest or stats[file] != before.get(file)]
        if changed and (problem := _damaged_file(manifest, changed)):
            _set_aside(manifest, problem)
        else:
            now |= stats
    _note(VERIFIED, now)


def _damaged_file(manifest: Path, read: list[str]) -> str | None:
    """What is damaged of an artifact, first by the sizes of all files, then by the bytes of the files to `read`."""
    if file := of_another_size(manifest):
        return f"{file}: has another size than in its manifest"
    digests = damage.digests(manifest)
    altered = damage.altered({file: digests[file] for file in read if file in digests})
    return f"{altered[0]}: its bytes differ from its manifest" if altered else None


def _set_aside(manifest: Path, problem: str) -> None:
    """Set a damaged artifact aside, and say so. Raises UserError where this user may not."""
    if reason := damage.set_aside(manifest):
        raise UserError(f"{problem}; {reason}")
    say(f"{problem}; {manifest.parent} is remade")


def _note(file: Path, value: dict) -> None:
    """Write a note of this module."""
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(value))


def _params(folder: Path, record: dict, other: list[str]) -> list[str]:
    """The parameters that an artifact was made with; for a stale one the reason, which Snakemake then shows.

    other: inputs whose bytes changed since the artifact was made.
    """
    if not record:
        return ["of unknown origin: its provenance.json is gone or broken"]
    if other:
        return [f"made from another {file}" for file in other]
    if _stage(folder) == "report":
        return record["params"]
    return [arguments(_stage(folder), record["params"], record["inputs"])]


def _stage(folder: Path) -> str:
    return artifacts.at(folder).stage


def damaged(file: str) -> bool:
    """Whether a manifest was set aside because its artifact is damaged."""
    return file.endswith("/manifest.json") and not os.path.isfile(file) and Path(file).with_name(DAMAGED).is_file()


def _code() -> list[str]:
    """Digests of the modules that define a record's content, so that records of another version are rewritten."""
    return [sha256(Path(file)) for file in (__file__, artifacts.__file__)]


def _records() -> list[int]:
    """Number and total bytes of the records: Snakemake does not notice a missing or truncated one."""
    sizes = [os.stat(os.path.join(at, name)).st_size for at, _, names in os.walk(METADATA) for name in names]
    return [len(sizes), sum(sizes)]


def _write(folder: Path, inputs: list[tuple[str, str]], params: list[str]) -> None:
    """Write the records of an artifact's files in Snakemake's format. inputs: pairs of a file and its sha256."""
    files = sorted(file for file, _ in inputs)  # a file with two roles occurs twice
    record = {
        "rule": _stage(folder),
        "params": sorted(map(repr, params)),
        "input": files,
        "record_format_version": FORMAT,
    }
    record |= {"input_checksums": {file: f"sha256:{digest}" for file, digest in inputs}, "incomplete": False}
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.is_dir() or entry.name in ("config.yaml", "provenance.json", DAMAGED):
            continue
        file = record_file(f"{folder}/{entry.name}")
        before = read_object(file)
        if before | record != before:
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f"{file.name[:200]}.{os.getpid()}")
            beside.write_text(canonical(before | record), encoding="utf-8")
            beside.replace(file)


def record_file(output: str) -> Path:
    """The path of Snakemake's record of an output: its name in base 64, in parts of at most 254 characters."""
    name = base64.urlsafe_b64encode(output.encode()).decode()
    pieces = [name[start : start + 254] for start in range(0, len(name), 254)]
    return METADATA.joinpath(*(f"@{piece}" for piece in pieces[:-1]), pieces[-1])
