"""Check a bundle with Python alone: this file imports nothing but the standard library, and lies in every bundle.

posttrain verify-bundle FILE
python verify_bundle.py [FILE OR FOLDER]    # in a bundle that was unpacked, where posttrain is not installed
"""

import hashlib
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

SUMS, METADATA, INDEX = "sha256sums.txt", "ro-crate-metadata.json", "bundle.json"
PROFILE = "https://w3id.org/ro/wfrun/provenance/0.5"
UNLISTED = {SUMS, f"{SUMS}.sig", f"{SUMS}.asc"}  # the sums themselves and their signature
ROOT = ("name", "description", "datePublished", "license", "conformsTo", "mainEntity", "hasPart")
WORKFLOW = ("programmingLanguage", "hasPart", "step")
RUN = ("instrument", "actionStatus", "agent", "endTime")
COMPLETED = ("result", "startTime")
PROVENANCE = ("stage", "params", "inputs", "identity", "seconds", "started", "shape", "git_commit")
INDEXED = ("title", "version", "snakemake", "started", "published", "artifacts", "missing", "absent", "blind")


def verify_bundle(file: Path) -> int:
    """Print what is wrong with a bundle, a .zip file or the folder of one; returns 0 where nothing is, else 1."""
    try:
        faults = list(faults_of(file))
    except FileNotFoundError as error:
        faults = [f"{file}: is no bundle: there is no {error.filename}"]
    except zipfile.BadZipFile:
        faults = [f"{file}: is no .zip archive"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        faults = [f"{file}: cannot be read as a bundle: {type(error).__name__}: {error}"]
    for fault in faults[:50]:
        print(f"error: {fault}")
    if faults:
        print(f"not valid: {len(faults)} faults")
        return 1
    print(f"valid: {file}: every file has its checksum, every artifact its files and its provenance")
    return 0


def faults_of(file: Path) -> Iterator[str]:
    """What is wrong with a bundle."""
    if file.is_dir():
        yield from Bundle(file).faults()
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(file) as packed:
        for name in packed.namelist():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                yield f"{name}: leads out of the bundle"
                return
        packed.extractall(folder)
        yield from Bundle(Path(folder)).faults()


class Bundle:
    """An unpacked bundle."""

    def __init__(self, root: Path):
        self.root = root
        self.sums = dict(sum_of(line) for line in self.text(SUMS).splitlines())
        self.index = json.loads(self.text(INDEX))
        self.absent = {one["name"]: one for one in self.index.get("absent", [])}

    def text(self, name: str) -> str:
        """The text of a file."""
        return (self.root / name).read_text(encoding="utf-8")

    def faults(self) -> Iterator[str]:
        """What is wrong."""
        yield from self.of_files()
        yield from (f"{INDEX}: the field {key} is missing" for key in INDEXED if key not in self.index)
        yield from self.of_metadata()
        for one in self.index.get("artifacts", []):
            yield from self.of_artifact(one["name"])

    def of_files(self) -> Iterator[str]:
        """Files whose bytes are not those of the list of checksums, and files that stand in no list."""
        there = {file.relative_to(self.root).as_posix() for file in self.root.rglob("*") if file.is_file()}
        yield from (f"{name}: is missing" for name in sorted(self.sums.keys() - there))
        unlisted = {name for name in there - self.sums.keys() - UNLISTED if "__pycache__" not in name}
        yield from (f"{name}: stands in no checksum" for name in sorted(unlisted))
        for name in sorted(self.sums.keys() & there):
            if digest(self.root / name) != self.sums[name]:
                yield f"{name}: its bytes are not those of {SUMS}"

    def of_metadata(self) -> Iterator[str]:
        """What the RO-Crate lacks of what its profile requires."""
        graph = {entity["@id"]: entity for entity in json.loads(self.text(METADATA))["@graph"]}
        root, runs = graph.get("./", {}), [one for one in graph.values() if "CreateAction" in one["@type"]]
        workflow = graph.get(first(root.get("mainEntity")), {})
        yield from lacking("the root dataset", root, ROOT)
        yield from lacking("the workflow", workflow, WORKFLOW)
        if PROFILE not in ids(root.get("conformsTo")):
            yield f"{METADATA}: the root dataset does not conform to {PROFILE}"
        for run in runs:
            more = COMPLETED if str(run.get("actionStatus")).endswith("/CompletedActionStatus") else ("error",)
            yield from lacking(run["@id"], run, (*RUN, *more))
        if not any("OrganizeAction" in one["@type"] for one in graph.values()):
            yield f"{METADATA}: there is no OrganizeAction, the run of Snakemake"
        for name in self.sums.keys() - {METADATA}:
            if graph.get(quote(name), {}).get("sha256") not in (self.sums[name], None):
                yield f"{METADATA}: {name} has another sha256 than in {SUMS}"
        for entity in graph.values():
            name = unquote(entity["@id"])
            if "File" in entity["@type"] and not re.match(r"\w+:|#", name) and name not in self.sums:
                yield f"{METADATA}: {name} is not in the bundle"
            for part in (part for value in entity.values() for part in ids(value) if part.startswith("#")):
                if part not in graph:
                    yield f"{METADATA}: {entity['@id']} refers to {part}, which is not described"

    def of_artifact(self, folder: str) -> Iterator[str]:
        """What an artifact lacks: files of its manifest, fields of its provenance, inputs with the bytes on record."""
        for name, entry in json.loads(self.text(f"{folder}/manifest.json"))["files"].items():
            path = f"{folder}/{name}"
            held = self.sums.get(path) or self.absent.get(path, {}).get("sha256")
            if held is None:
                yield f"{path}: of the artifact's manifest, and neither in the bundle nor named as absent"
            elif held != entry["sha256"]:
                yield f"{path}: its bytes are not those of the artifact's manifest"
        record = json.loads(self.text(f"{folder}/provenance.json"))
        yield from (f"{folder}/provenance.json: the field {key} is missing" for key in PROVENANCE if key not in record)
        for file, digest in (item for files in record.get("inputs", {}).values() for item in files.items()):
            if file.endswith("/manifest.json") and self.sums.get(file, digest) != digest:
                yield f"{folder}: was made from another {file} than the one in the bundle"


def sum_of(line: str) -> tuple[str, str]:
    """(path, digest) of a line as `sha256sum` writes it. Raises ValueError for another line."""
    match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
    if not match:
        raise ValueError(f"{SUMS}: not a line of sha256sum: {line[:80]}")
    return match[2], match[1]


def digest(file: Path) -> str:
    """sha256 of a file, by what an old Python has too."""
    sum = hashlib.sha256()
    with open(file, "rb") as stream:
        for part in iter(lambda: stream.read(2**20), b""):
            sum.update(part)
    return sum.hexdigest()


def lacking(what: str, entity: dict, keys) -> Iterator[str]:
    """The fields that an entity lacks."""
    yield from (f"{METADATA}: {what}: the field {key} is missing" for key in keys if entity.get(key) in (None, "", []))


def ids(value) -> list[str]:
    """The ids that a value of JSON-LD refers to."""
    values = value if isinstance(value, list) else [value]
    return [one["@id"] for one in values if isinstance(one, dict) and "@id" in one]


def first(value) -> str:
    """The first id of a value; "" where there is none."""
    return next(iter(ids(value)), "")


if __name__ == "__main__":
    sys.exit(verify_bundle(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)))
