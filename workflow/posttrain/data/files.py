"""The rows of a local file, as numbered objects, by the kind that its name tells."""

from collections.abc import Callable, Iterator
from pathlib import Path

from posttrain.config.sections import DOCUMENTS
from posttrain.config.sources import DATA_ENDS, TEXT_ENDS, without_packing
from posttrain.data import arrays, lines, tables
from posttrain.ground.errors import UserError

Reader = Callable[..., Iterator[tuple[int, object, bool]]]
READERS: dict[str, Reader] = {
    ".jsonl": lines.read_objects,
    ".ndjson": lines.read_objects,
    ".json": arrays.read_json,
    ".parquet": tables.read_parquet,
    ".csv": tables.read_csv,
    ".tsv": tables.read_csv,
    ".txt": lines.read_paragraphs,
    ".text": lines.read_paragraphs,
}


def read(path, task: str, max_line_bytes: int) -> Iterator[tuple[int, object, bool]]:
    """Yield (number of the line or row, value or RowError, whether a byte order mark was stripped).

    Raises UserError, naming file:line, where the file as a whole cannot be used.
    """
    return reader(path, task)(path, max_line_bytes)


def reader(path, task: str) -> Reader:
    """The function that reads a file. Raises UserError for a kind of file that is not read for the task."""
    end = Path(without_packing(path)).suffix.lower()
    allowed = f"{', '.join(DATA_ENDS)}, all but .parquet also with .gz or .zst"
    if end not in READERS or (end == ".parquet" and without_packing(path) != str(path)):
        if Path(path).is_dir():
            raise UserError(f"{path}: is a directory; name the files in it")
        raise UserError(f"{path}: unknown kind of file; allowed: {allowed}; for text {' or '.join(TEXT_ENDS)} too")
    if end in TEXT_ENDS and task not in DOCUMENTS:
        raise UserError(f"{path}: plain text is read for text and long only; for {task} allowed: {allowed}")
    return READERS[end]
