"""Artifacts: the manifest lists their bytes; the identity is a digest of settings, code and inputs."""

import hashlib
import json
import os
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, sha256

DAMAGED = "damaged-manifest.json"  # the manifest of a damaged artifact is renamed to this


def canonical(value) -> str:
    """JSON with sorted keys and no spaces: equal values give equal texts."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def named(text: str) -> str:
    """The file that holds a text under its own digest, so that its content cannot change."""
    return f".snakemake/campaigns/{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def write_named(text: str) -> str:
    """Write a text to the file of that name, and return the name."""
    file = Path(named(text))
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)
    return str(file)


def record_of(folder: Path) -> dict:
    """The `provenance.json` of an artifact; {} where it is missing or malformed."""
    try:
        record = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        whole = all(isinstance(value, str) for value in [record["stage"], *record["params"]])
        digests = [digest for files in record["inputs"].values() for digest in files.values()]
        json.loads(record["params"][0]) if record["stage"] != "report" else None
        return record if whole and len(record["params"]) == 3 and all(isinstance(d, str) for d in digests) else {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, IndexError):
        return {}


def manifest_of(folder: Path, parts: list[str]) -> dict:
    """The manifest of the files and folders `parts` of `folder`: the sha256 and size of each file."""
    files = {}
    for part in parts:
        path = folder / part
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and not file.name.startswith("."):  # Snakemake leaves .snakemake_timestamp in folders
                files[file.relative_to(folder).as_posix()] = {"sha256": sha256(file), "size": file.stat().st_size}
    return {"files": files}


def verify(manifest: Path) -> None:
    """Compare an artifact's bytes with its manifest.

    Raises UserError naming every file that is gone, has another size or other bytes, and how to mend it.
    """
    problems = []
    for name, (digest, size) in listed(manifest).items():
        file = manifest.parent / name
        if not file.is_file():
            problems.append(f"{file}: is gone")
        elif file.stat().st_size != size:
            problems.append(f"{file}: has {file.stat().st_size} bytes, its manifest says {size}")
        elif sha256(file) != digest:
            problems.append(f"{file}: its bytes differ from its manifest")
    if problems:
        raise UserError(*problems, f"remake it: rm {manifest} and run snakemake again")


def listed(manifest: Path) -> dict[str, tuple[str, int]]:
    """File -> sha256 and size, by a manifest. Raises UserError where it lists none."""
    try:
        files = {name: (entry["sha256"], entry["size"]) for name, entry in read_json(manifest)["files"].items()}
    except (AttributeError, KeyError, TypeError):
        files = {}
    if not files:
        raise UserError(f"{manifest}: is no manifest of an artifact")
    return files


def identity(stage: str, section: dict, code: str, read: dict[str, dict[str, str]]) -> str:
    """Digest of a stage's settings, code, and the sha256 of its inputs by role (not their paths), as 16 hex digits.

    Checkpoints lie in a folder of this name, so that a run never continues from another run's state.
    """
    inputs = {role: list(files.values()) for role, files in sorted(read.items())}
    return hashlib.sha256(canonical([stage, section, code, inputs]).encode()).hexdigest()[:16]
