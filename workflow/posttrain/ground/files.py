"""Hash and lock files, write and verify manifests, read and write JSON."""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from posttrain.ground.errors import Unreadable, UserError

UMASK = os.umask(0o077)  # it can only be read by being set
os.umask(UMASK)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(file: int) -> bool | None:
    """Lock an open file until it is closed or the process ends.

    Returns whether that succeeded: False where another process holds the lock, None where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def read_json(path: Path):
    """The content of a JSON file. Raises UserError where it does not exist or is not JSON, Unreadable where the file
    system fails."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON: {error}") from None


def read_object(path: Path) -> dict:
    """The JSON object in a file; {} where the file cannot be read or holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_text(path: Path, text: str) -> None:
    """Write a text by rename, for a file that several processes may write at once."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_json(path: Path, value) -> None:
    """Write a JSON file by rename, so that readers see the old content or the new."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON Lines file of `prepare`. Raises UserError where it does not exist."""
    return list(rows_of(path))


def rows_of(path: Path) -> Iterator[dict]:
    """The rows of a JSON Lines file, one at a time. Raises UserError where it does not exist."""
    if not path.is_file():
        raise UserError(f"{path}: does not exist: the prepared data has no such rows; its metrics.json counts them")
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write rows as JSON Lines, keys in their own order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


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

    Raises UserError naming every file that is missing or has another size or other bytes, and the command to remake it.
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
        raise UserError(f"{manifest}: is not a manifest of an artifact")
    return files


def of_another_size(manifest: Path, absent: bool = False) -> str | None:
    """The first file of an artifact whose size is not that of its manifest; None where there is none.

    absent: whether a file that is not there counts. An artifact may be pulled in part, where nothing needs the rest.
    """
    try:
        sizes = {str(manifest.parent / name): size for name, (_, size) in listed(manifest).items()}
    except UserError:
        return str(manifest) if absent else None
    for file, status in stats_of(sizes).items():
        differs = absent if status is None else status[0] != sizes[file]
        if differs:
            return file
    return None


def stats_of(files: Iterable[str]) -> dict[str, list[int] | None]:
    """Size, dates and inode of each file; None where it does not exist. The ctime shows an overwritten file whose
    modification date was restored."""
    stats: dict[str, list[int] | None] = {}
    for file in files:
        try:
            status = os.stat(file)
            stats[file] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        except OSError:
            stats[file] = None
    return stats


def permit(folder: Path) -> None:
    """Give all files below a folder the permissions that the umask leaves; safetensors lets only their owner read them.

    In a folder of a group (setgid), new files and folders belong to the group by themselves. A link, and a file with
    several names, stay as they are: they are also a kept artifact's or lie in DVC's cache.
    """
    for path in folder.rglob("*"):
        status = path.lstat()
        mode, is_folder = status.st_mode, stat.S_ISDIR(status.st_mode)
        if stat.S_ISLNK(mode) or (status.st_nlink > 1 and not is_folder):
            continue
        whole = 0o777 if is_folder or mode & stat.S_IXUSR else 0o666
        if (wanted := whole & ~UMASK | mode & stat.S_ISGID) != stat.S_IMODE(mode):
            path.chmod(wanted)
