"""Read a table, as Parquet or CSV, in bounded memory: each row as an object whose keys are the columns."""

import csv
from collections.abc import Iterator

from posttrain.data import lines
from posttrain.data.lines import RowError
from posttrain.ground.errors import UserError

BATCH = 256  # rows of a Parquet file that are held at a time


def read_parquet(path, max_line_bytes: int = lines.MAX_LINE_BYTES) -> Iterator[tuple[int, object, bool]]:
    """Yield (number of the row from 1, row, False). Raises UserError where the file is no Parquet file, is damaged or
    has no rows."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with lines.opened(path) as stream, ParquetFile(stream, pre_buffer=False) as table:
            for batch in table.iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, False
    except (pyarrow.ArrowException, OSError) as error:
        what = f"cannot be read on after row {number}, the file is damaged" if number else "not a Parquet file"
        raise UserError(f"{path}: {what}: {str(error).splitlines()[0]}") from None
    if not number:
        raise UserError(f"{path}: file has no rows")


def read_csv(path, max_line_bytes: int = lines.MAX_LINE_BYTES) -> Iterator[tuple[int, object, bool]]:
    """Yield (number of the row's first line, row or RowError, whether a byte order mark was stripped).

    Cells are separated by commas, in .tsv files by tabs, and may be quoted (RFC 4180); the first line names the
    columns. Raises UserError for text that is not CSV, names that occur twice, and where there are no rows.
    """
    csv.field_size_limit(max_line_bytes)
    first, header, marked, empty = 1, None, False, True
    numbered = lines.text_lines(path, max_line_bytes)
    tabs = ".tsv" in str(path).lower()
    reader = csv.reader((line for _, line in numbered), delimiter="\t" if tabs else ",", strict=True)
    try:
        for cells in reader:
            start, first = first, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                marked = cells[0].startswith(lines.BOM)
                header = _columns(path, [cells[0].removeprefix(lines.BOM), *cells[1:]])
                continue
            yield start, _row(header, cells), marked and empty
            empty = False
    except csv.Error as error:
        quote = (
            "; hint: a quote is opened and not closed" if "end of data" in str(error) or "larger" in str(error) else ""
        )
        raise UserError(f"{path}:{first}: not CSV: {error}{quote}") from None
    if empty:
        raise UserError(f"{path}: file has no rows")


def _columns(path, names: list[str]) -> list[str]:
    """The names of the columns. Raises UserError where one occurs twice or the cells are separated by another sign."""
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"{path}:1: column {min(twice)!r} appears twice in the header")
    if len(names) == 1 and (sign := next((sign for sign in ";\t|" if sign in names[0]), "")):
        hint = f"cells seem to be separated by {sign!r}; allowed: commas (.csv) or tabs (.tsv)"
        raise UserError(f"{path}:1: the header is one column, {names[0]!r}; hint: {hint}")
    return names


def _row(header: list[str], cells: list[str]) -> dict | RowError:
    """The row, by column; a RowError where it has another number of cells than the header."""
    if len(cells) != len(header):
        return RowError("cells", f"{len(cells)} cells, while the header names {len(header)} columns")
    return dict(zip(header, cells, strict=True))
