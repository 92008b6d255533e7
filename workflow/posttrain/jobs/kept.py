"""Keep artifacts by identity, for reuse when a stage has the same settings, inputs and code again.

posttrain clean

A kept file is a hard link to the artifact's file: it takes no space until the artifact is replaced. No file of an
artifact is ever written in place.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import of_another_size, read_json, verify, write_json
from posttrain.ground.identity import DAMAGED, record_of
from posttrain.jobs import damage

KEPT = Path("results/.kept")


def take(name: str, versions: dict, work: Path) -> dict | None:
    """Fill the folder `work` with the kept artifact of an identity (`name`) and of these versions of packages.

    Returns its provenance, None where there is none. The copy in `work` is verified, as other jobs may delete the kept
    artifact meanwhile. A damaged artifact is deleted.
    """
    folder = KEPT / name
    try:
        record = read_json(folder / "provenance.json")
        if record.get("shape", {}).get("versions") != versions:
            return None
        link(folder, work, [part.name for part in folder.iterdir()])
        verify(work / "manifest.json")
        if damage.altered(damage.beside(work / "manifest.json")):
            raise UserError(f"{folder}: is damaged")
        return record
    except OSError:  # no hard links here
        shutil.rmtree(work, ignore_errors=True)
    except UserError:
        for damaged in (folder, work):
            shutil.rmtree(damaged, ignore_errors=True)
    return None


def differs(name: str, shape: dict, digest: str) -> str | None:
    """A warning where an earlier run of this identity made other bytes, else None. Records this run.

    digest: that of the manifest. Bytes may differ between shapes (versions, threads, processors), not within one.
    """
    file = KEPT / f"{name}.json"
    before = read_json(file) if file.is_file() else None
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"manifest": digest, "shape": shape})
    if before is None or before["manifest"] == digest:
        return None
    other = sorted(key for key in shape if shape[key] != before["shape"].get(key))
    if other:
        return f"the bytes differ from those of an earlier run with other {', '.join(other)}"
    return "not reproducible: an earlier run of the same settings, inputs, code and shape made other bytes"


def keep_pulled(folders: Iterable[str], limit: float) -> None:
    """Keep the artifacts in `folders`, which a run is about to replace, and which were pulled: those made here are kept
    already. One of which a file is absent cannot be taken again, and is not kept. limit: as of `keep`."""
    for home in map(Path, folders):
        name = record_of(home).get("identity", "")
        if not re.fullmatch("[0-9a-f]{16}", name) or (KEPT / name).exists():
            continue
        if (home / "manifest.json").is_file() and not of_another_size(home / "manifest.json", absent=True):
            parts = [part.name for part in home.iterdir() if not part.name.startswith(".")]
            keep(name, home, [part for part in parts if part not in ("checkpoints", DAMAGED)], limit)


def keep(name: str, home: Path, parts: list[str], limit: float) -> None:
    """Keep the parts of a finished artifact, and delete the oldest kept ones over `limit` GB (10^9 bytes)."""
    folder = KEPT / name
    making = KEPT / f".making-{name}-{os.getpid()}"
    shutil.rmtree(making, ignore_errors=True)
    try:
        link(home, making, parts)
        shutil.rmtree(folder, ignore_errors=True)
        making.replace(folder)
    except OSError:  # no hard links here, or another job kept the same meanwhile; keeping is optional
        shutil.rmtree(making, ignore_errors=True)
    forget(limit)


def link(source: Path, target: Path, parts: list[str]) -> None:
    """Hard-link files and folders into another folder. Raises OSError where the file system has no hard links."""
    target.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, copy_function=os.link, dirs_exist_ok=True)
        else:
            os.link(source / part, target / part)


def sizes() -> dict[Path, int]:
    """Kept artifact -> bytes that it shares with no artifact in use, oldest first; without those that share all."""
    dated = []
    for folder in KEPT.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another job replaced or deleted it meanwhile
            if folder.is_dir() and not folder.name.startswith("."):
                dated.append((folder.stat().st_mtime, folder, _unshared(folder)))
    return {folder: size for _, folder, size in sorted(dated) if size}


def _unshared(folder: Path) -> int:
    files = [file.lstat() for file in folder.rglob("*") if file.is_file()]  # of a link into DVC's cache, the link
    return sum(file.st_size for file in files if file.st_nlink == 1)


def forget(limit: float, since: float = 60) -> None:
    """Delete the oldest kept artifacts over `limit` GB, except those younger than `since` seconds."""
    unshared = sizes()
    over = sum(unshared.values()) - limit * 1e9
    for folder, size in unshared.items():
        with contextlib.suppress(FileNotFoundError):
            if over > 0 and time.time() - folder.stat().st_mtime > since:
                shutil.rmtree(folder, ignore_errors=True)
                over -= size
