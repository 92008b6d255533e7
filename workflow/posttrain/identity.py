"""What an artifact is: the bytes it holds (its manifest), and the settings and inputs it was made from."""

import ast
import hashlib
import importlib.util
import json
from pathlib import Path

from posttrain.errors import UserError
from posttrain.files import read_json, sha256


def canonical(value) -> str:
    """One spelling for equal values: JSON with sorted keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def manifest_of(folder: Path, parts: list[str]) -> dict:
    """sha256 and size of every file of an artifact: of `parts` (files and folders) below `folder`."""
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
    """sha256 and size of each file that a manifest lists. Raises UserError for one that lists none."""
    try:
        files = {name: (known["sha256"], known["size"]) for name, known in read_json(manifest)["files"].items()}
    except (AttributeError, KeyError, TypeError):
        files = {}
    if not files:
        raise UserError(f"{manifest}: is no manifest of an artifact")
    return files


def identity(stage: str, section: dict, inputs: dict[str, Path | list[Path]]) -> str:
    """What a stage's run is, as 16 hex digits: its settings and the manifests of its inputs.

    Checkpoints lie under it, so that a run never continues from another run's state.
    """
    digests = {
        role: [sha256(path) for path in paths] if isinstance(paths, list) else sha256(paths)
        for role, paths in sorted(inputs.items())
    }
    return hashlib.sha256(canonical([stage, section, digests]).encode()).hexdigest()[:16]


def function_file(named: str) -> Path:
    """The file that holds a function named as `file.py:function` or `package.module:function`; does not run it."""
    place = named.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    try:
        found = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        found = None
    return Path(found.origin) if found and found.origin else Path(place)


def fingerprint(file: Path) -> str:
    """sha256 of a module's syntax tree, so that comments and formatting never count.

    Raises UserError when it is no Python.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file}: is no Python module that can be read: {error}") from None
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
