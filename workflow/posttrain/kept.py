"""Earlier artifacts, by identity: what was made once from the same settings, inputs and code is not made again.

posttrain clean

Each file is a second name (hard link) of the artifact's own file, so that it costs nothing until the artifact is
replaced. No file of an artifact is ever written in place.
"""

import os
import shutil
import time
from pathlib import Path

from posttrain.errors import UserError
from posttrain.files import read_json, write_json
from posttrain.identity import verify

KEPT = Path("results/.kept")


def find(name: str, versions: dict) -> Path | None:
    """The folder of a whole earlier artifact of this identity and of these versions; None where there is none.

    A damaged one is removed: it would be found again.
    """
    folder = KEPT / name
    try:
        verify(folder / "manifest.json")
        made = read_json(folder / "provenance.json")
        return folder if made.get("shape", {}).get("versions") == versions else None
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        return None


def differs(name: str, shape: dict, digest: str) -> str | None:
    """What is to be said where an earlier run of this identity made other bytes; remembers this one's.

    digest: of the manifest. Bytes may differ between shapes (versions, threads, processors), never within one.
    """
    file = KEPT / f"{name}.json"
    before = read_json(file) if file.is_file() else None
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"manifest": digest, "shape": shape})
    if before is None or before["manifest"] == digest:
        return None
    other = sorted(key for key in shape if shape[key] != before["shape"].get(key))
    if other:
        return f"other bytes than an earlier run made, with other {', '.join(other)}"
    return "not reproducible: an earlier run of the same settings, inputs, code and shape made other bytes"


def keep(name: str, home: Path, parts: list[str], limit: float) -> None:
    """Give the parts of a finished artifact a second name, and forget the oldest earlier ones over `limit` GB."""
    folder = KEPT / name
    making = KEPT / f".making-{name}-{os.getpid()}"
    shutil.rmtree(making, ignore_errors=True)
    try:
        link(home, making, parts)
    except OSError:  # another file system, or one without hard links: then nothing is kept
        shutil.rmtree(making, ignore_errors=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    making.replace(folder)
    forget(limit)


def link(source: Path, target: Path, parts: list[str]) -> None:
    """The same files under another folder. Raises OSError where the file system has no hard links."""
    target.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part, copy_function=os.link, dirs_exist_ok=True)
        else:
            os.link(source / part, target / part)


def sizes() -> dict[Path, int]:
    """Bytes that each earlier artifact takes by itself, oldest first; what is still in use takes none."""
    folders = [folder for folder in KEPT.glob("*") if folder.is_dir() and not folder.name.startswith(".")]
    found = {folder: _alone(folder) for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime)}
    return {folder: size for folder, size in found.items() if size}


def _alone(folder: Path) -> int:
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(file.st_size for file in files if file.st_nlink == 1)


def forget(limit: float, since: float = 60) -> None:
    """Delete the oldest earlier artifacts until the rest takes at most `limit` GB; none of the last minute."""
    found = sizes()
    over = sum(found.values()) - limit * 1e9
    for folder, size in found.items():
        if over > 0 and time.time() - folder.stat().st_mtime > since:
            shutil.rmtree(folder, ignore_errors=True)
            over -= size
