"""Rows in a file that is mapped into memory: of each row, memory holds a few numbers by which equal rows are told."""

import functools
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from posttrain.data.texts import fingerprints
from posttrain.ground.progress import say

EVERY = 30  # seconds between the lines of `counted`
BATCH = 1000  # rows that are written or read at once
ENCODER = json.JSONEncoder(ensure_ascii=False)
COLUMNS = ("exact", "near", "judged", "verdict", "id")  # see `texts.fingerprints`


class Rows(Sequence[dict]):
    """Canonical rows in an order. table: a datasets.Dataset with a row as JSON and, of numbered rows, its group and
    COLUMNS."""

    def __init__(self, table):
        self._table = table

    @functools.cached_property
    def _texts(self):
        return self._table.select_columns("row").with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, place):
        if isinstance(place, slice):  # the rows as a list: a Rows of their own would take as long as reading them
            return list(map(json.loads, self._texts[place].column("row").to_pylist()))
        return json.loads(self._table[place]["row"])

    def __iter__(self) -> Iterator[dict]:
        return map(json.loads, self.column("row"))

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def column(self, name: str) -> Iterator:
        """The values of a column, in batches that are read when they are needed."""
        for batch in self._table.select_columns(name).with_format("arrow").iter(BATCH):
            yield from batch.column(name).to_pylist()

    def numbers(self, *names: str) -> list[np.ndarray]:
        """Columns of COLUMNS, 8 bytes a row each."""
        start, columns = 0, [np.empty(len(self), np.uint64) for _ in names]
        for batch in self._table.select_columns(list(names)).with_format("arrow").iter(BATCH):
            for name, column in zip(names, columns, strict=True):
                column[start : start + len(batch)] = batch.column(name).to_numpy()
            start += len(batch)
        return columns

    def write(self, file: Path) -> None:
        """Write the rows as JSON Lines."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w", encoding="utf-8") as lines:
            lines.writelines(f"{row}\n" for row in self.column("row"))

    def take(self, places: np.ndarray) -> "Rows":
        """The rows at places, in their order."""
        return Rows(self._table.select(places))


def store(rows: Iterable[dict], scratch: Path | None = None, numbered: bool = True) -> Rows:
    """Write rows into a file, see `write`. numbered: with the columns by which rows are told and divided."""
    return write((record(batch, numbered) for batch in batches(rows, BATCH)), scratch, numbered)


def write(records: Iterable, scratch: Path | None, numbered: bool = True) -> Rows:
    """Write records of rows into a file of a folder, by default that for temporary files, which nothing else sees: the
    file is gone when the process ends or is killed."""
    import datasets
    import pyarrow as pa

    with tempfile.NamedTemporaryFile(dir=scratch, suffix=".arrow") as file:
        with pa.ipc.new_stream(file, record([], numbered).schema) as writer:
            for one in records:
                writer.write_batch(one)
        file.flush()
        return Rows(datasets.Dataset.from_file(file.name))


def record(rows: Iterable[dict], numbered: bool = True):
    """Rows as an Arrow record batch. Each is read once, as it comes: the words of its texts are still known."""
    import pyarrow as pa

    numbers = [("group", pa.large_string()), *((name, pa.uint64()) for name in COLUMNS)] if numbered else []
    columns: list[list]
    if numbered:
        read = [(ENCODER.encode(row), row["group"], fingerprints(row)) for row in rows]
        columns = [[json_text for json_text, *_ in read], [group for _, group, _ in read]]
        columns += [[prints[name] for *_, prints in read] for name in COLUMNS]
    else:
        columns = [list(map(ENCODER.encode, rows))]
    return pa.record_batch(columns, schema=pa.schema([("row", pa.large_string()), *numbers]))


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one part after the other; numbered where all are."""
    import datasets

    tables = [part._table for part in parts if len(part)] or [part._table for part in parts[:1]]
    if not tables:
        return store([])
    shared = [name for name in tables[0].column_names if all(name in table.column_names for table in tables)]
    return Rows(datasets.concatenate_datasets([table.select_columns(shared) for table in tables]))


def batches(items: Iterable, size: int) -> Iterator[list]:
    """The items in lists of a size, the last of which may be shorter."""
    waiting = iter(items)
    while batch := list(islice(waiting, size)):
        yield batch


def counted(items: Iterable, what: str, total: int = 0) -> Iterator:
    """The items of a long job. Every EVERY seconds a line tells how many are done, how many a second and, with a total,
    the minutes that are left."""
    start = last_line = time.monotonic()
    for number, item in enumerate(items):
        if (now := time.monotonic()) - last_line >= EVERY:
            last_line, speed = now, number / (now - start)
            if total:
                minutes = (total - number) / speed / 60
                say(f"{what}: {number:,} rows of {total:,}, {speed:,.1f} a second, {minutes:.0f} min left")
            else:
                say(f"{what}: {number:,} rows, {speed:,.1f} a second")
        yield item


def first_with(numbers: np.ndarray) -> np.ndarray:
    """For each number, the place of the first one that is equal."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return first[inverse]
