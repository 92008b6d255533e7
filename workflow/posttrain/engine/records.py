"""Snakemake's records of what was made, kept true to the artifacts' own: after a pull, a copy, a replaced file.

Snakemake decides by its records under `.snakemake/metadata` and by dates. Neither travels with an artifact, and it
misses a file that was replaced by an older one. Each artifact's `provenance.json` says from what it was made, so that
the records can be written from there. It is done whenever a workflow is planned, and reads only what has changed.
"""

import base64
import json
import os
from pathlib import Path

from posttrain.dag import artifacts
from posttrain.dag.artifacts import arguments
from posttrain.ground.errors import UserError
from posttrain.ground.files import sha256
from posttrain.ground.identity import DAMAGED, canonical, listed, record_of
from posttrain.ground.progress import say

METADATA = Path(".snakemake/metadata")
SEEN = Path(".snakemake/seen.json")  # size, date and number of every file that was looked at
FORMAT = 6  # of Snakemake's records, `RECORD_FORMAT_VERSION` of the pinned version


def sync(folders: list[str]) -> None:
    """Write Snakemake's records of the artifacts in `folders` anew, if one of them or a file that one was made from is
    not as it was when they were last looked at."""
    before = _read(SEEN)
    known: dict = before["files"] if isinstance(before.get("files"), dict) else {}
    said = {"folders": folders, "code": _code()}
    if known and before | said | {"records": _records()} == before and _stats(known) == known:
        return
    seen: dict[str, list[int] | None] = {}
    digests: dict[str, str | None] = {}
    for folder in map(Path, folders):
        made, manifest = folder / "provenance.json", folder / "manifest.json"
        if not manifest.is_file():
            continue
        if _stats([str(manifest)])[str(manifest)] != known.get(str(manifest)):
            set_aside_if_short(manifest)
        record, stage = record_of(folder), folder.parts[2] if len(folder.parts) > 2 else "report"
        remarks = [] if record else ["of unknown origin: its provenance.json is gone or broken"]
        inputs = [read for files in record.get("inputs", {}).values() for read in files.items()]
        seen |= _stats([str(made), str(manifest), *(file for file, _ in inputs)])
        for file, _ in inputs:
            if file not in digests:
                digests[file] = sha256(Path(file)) if os.path.isfile(file) else None
        other = dict.fromkeys(file for file, digest in inputs if digests[file] not in (digest, None) or damaged(file))
        remarks += [f"made from another {file}" for file in other]
        if not remarks:
            remarks = record["params"] if stage == "report" else [stage, arguments(record["params"], record["inputs"])]
        _write(folder, stage, inputs, remarks)
    if seen:
        SEEN.parent.mkdir(exist_ok=True)
        text = json.dumps(said | {"files": seen, "records": _records()})
        SEEN.with_suffix(f".{os.getpid()}").write_text(text)
        SEEN.with_suffix(f".{os.getpid()}").replace(SEEN)


def damaged(file: str) -> bool:
    """Whether a manifest was set aside because its artifact is damaged."""
    return file.endswith("/manifest.json") and not os.path.isfile(file) and Path(file).with_name(DAMAGED).is_file()


def _code() -> list[str]:
    """Digests of the modules that say what stands in a record: records that another version wrote are written anew."""
    return [sha256(Path(file)) for file in (__file__, artifacts.__file__)]


def _records() -> list[int]:
    """How many records there are, and their bytes: one that is gone or cut short would not be missed by Snakemake."""
    sizes = [os.stat(os.path.join(at, name)).st_size for at, _, names in os.walk(METADATA) for name in names]
    return [len(sizes), sum(sizes)]


def _stats(files) -> dict[str, list[int] | None]:
    """Size, dates and number of each file; None where there is none. The date of the last change of any kind tells a
    file that was written over in place and given its old date again."""
    found: dict[str, list[int] | None] = {}
    for file in files:
        try:
            stat = os.stat(file)
            found[file] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        except OSError:
            found[file] = None
    return found


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def set_aside_if_short(manifest: Path) -> None:
    """An artifact of which a file is cut short loses its manifest, so that it is made anew. One that was not
    pulled as a whole is left alone: nothing may need it."""
    try:
        sizes = {str(manifest.parent / name): size for name, (_, size) in listed(manifest).items()}
    except UserError:
        sizes = {}
    there = _stats(sizes)
    short = [file for file, size in sizes.items() if (stats := there[file]) and stats[0] != size]
    for file in short:
        say(f"{file}: is not of the size that its manifest says; {manifest.parent} is made anew")
    if short:
        manifest.replace(manifest.with_name(DAMAGED))


def _write(folder: Path, stage: str, inputs: list[tuple[str, str]], params: list[str]) -> None:
    """The records of an artifact's files, as Snakemake writes them."""
    files = sorted(file for file, _ in inputs)  # one that plays two roles stands there twice
    said = {"rule": stage, "params": sorted(map(repr, params)), "input": files, "record_format_version": FORMAT}
    said |= {"input_checksums": {file: f"sha256:{digest}" for file, digest in inputs}, "incomplete": False}
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.is_dir() or entry.name in ("config.yaml", "provenance.json", DAMAGED):
            continue
        file = record_file(f"{folder}/{entry.name}")
        before = _read(file)
        if before | said != before:
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f"{file.name[:200]}.{os.getpid()}")
            beside.write_text(canonical(before | said), encoding="utf-8")
            beside.replace(file)


def record_file(output: str) -> Path:
    """Where Snakemake keeps its record of an output: under its name in base 64, in pieces of a file name's length."""
    name = base64.urlsafe_b64encode(output.encode()).decode()
    pieces = [name[start : start + 254] for start in range(0, len(name), 254)]
    return METADATA.joinpath(*(f"@{piece}" for piece in pieces[:-1]), pieces[-1])
