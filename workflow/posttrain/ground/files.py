"""Hash and lock files; read and write JSON."""

import fcntl
import hashlib
import json
from pathlib import Path

from posttrain.ground.errors import Unreadable, UserError


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


def write_json(path: Path, value) -> None:
    """Write a JSON file by rename: readers see the old content or the new."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON Lines file that `prepare` wrote. Raises UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"{path}: is not there: the prepared data has no such rows; its metrics.json counts them")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON Lines, keys in their own order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
