"""Read and write the project's own JSON files; what is written appears whole or not at all."""

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
    """Lock an open file until it is closed, or its process ends: False where another process has it, None where the
    file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def read_json(path: Path):
    """The content of a JSON file. Raises UserError when it is absent or not JSON, Unreadable when nobody can tell."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON: {error}") from None


def write_json(path: Path, value) -> None:
    """Write a JSON file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON Lines file that `prepare` wrote. Raises UserError when it wrote none."""
    if not path.is_file():
        raise UserError(f"{path}: is not there: the prepared data has no such rows; its metrics.json counts them")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON Lines, keys in the order they stand in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
