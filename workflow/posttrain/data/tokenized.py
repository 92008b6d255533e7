"""The tokens of prepared rows, in `data/TASK/SIDE.arrow` beside the rows: written once by `prepare`, read by trainers.

A row of `sft` has `input_ids` and `labels`; of `preference`, `prompt_ids`, `chosen_ids` and `rejected_ids`; of `kto`,
`prompt_ids` and `completion_ids`. Rows are in the order of SIDE.jsonl.
"""

import hashlib
import json
import struct
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.ground.errors import UserError
from posttrain.ground.files import rows_of

BATCH = 1000  # rows of a record batch
PROBE = "Élan: 3 * 14 = 42.\n\tWas it “fine”, ﬁne, 好的 or 👍🏽? don't</s>"


class Writer:
    """Writes the tokens of rows, one row after the other, into a file; there is no file where there is no row."""

    def __init__(self, tokenizer, file: Path):
        self.tokenizer, self.file = tokenizer, file
        self._rows: list[dict[str, bytes]] = []
        self._stream: Any = None  # pyarrow's, once there is a row

    def add(self, row: dict[str, bytes]) -> None:
        """Append a row: the name of each column with its `packed` tokens."""
        self._rows.append(row)
        if len(self._rows) == BATCH:
            self._flush()

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._rows:
            self._flush()
        if self._stream is not None:
            self._stream.close()

    def _flush(self) -> None:
        import pyarrow as pa

        columns = {name: unpacked([row[name] for row in self._rows]) for name in self._rows[0]}
        if self._stream is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            schema = pa.table(columns).schema.with_metadata({"tokenizer": digest(self.tokenizer)})
            self._stream = pa.ipc.new_stream(str(self.file), schema)
        self._stream.write_table(pa.table(columns))
        self._rows.clear()


def packed(ids: list[int]) -> bytes:
    """Tokens as 32-bit numbers, which are sent from one process to another and written as they are."""
    return struct.pack(f"{len(ids)}i", *ids)


def unpacked(rows: list[bytes]):
    """Packed tokens of rows as a column of an Arrow table."""
    import pyarrow as pa

    ends = np.cumsum([0, *(len(row) // 4 for row in rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, np.frombuffer(b"".join(rows), np.int32))


def load(tokenizer, data: Path, task: str, side: str, longest: int | None = None):
    """The tokens of one side's rows as a datasets.Dataset, which is mapped into memory; None where there are no rows.

    data: manifest of `prepare`. Raises UserError, naming a row with more than `longest` tokens, and where the tokens
    are those of another tokenizer: the model would read other words than the rows hold.
    """
    import pyarrow as pa

    file = data.parent / "data" / task / f"{side}.arrow"
    if not file.is_file():
        return None
    with pa.memory_map(str(file)) as opened:
        names = pa.ipc.open_stream(opened).schema.metadata  # datasets leaves it out
    if names[b"tokenizer"].decode() != digest(tokenizer):
        raise UserError(f"{file}: holds tokens of another tokenizer than that of the base; remake both: rm {data}")
    tokens = mapped(file)
    sizes = lengths(tokens)
    if longest is not None and (over := np.flatnonzero(sizes > longest)).size:
        row = next(islice(rows_of(file.with_suffix(".jsonl")), int(over[0]), None))
        what = f"row {row['id']} ({row['source']}), {sizes[over[0]]} tokens"
        raise UserError(f"{what}: over max_length ({longest} tokens)")
    return tokens


def mapped(file: Path):
    """The tokens in a file as a datasets.Dataset."""
    import datasets

    datasets.disable_caching()  # what is derived from the rows is not written beside them
    return datasets.Dataset.from_file(str(file))


def digest(tokenizer) -> str:
    """A fingerprint of a tokenizer: its vocabulary, how it divides a text, its chat template and its end of turn."""
    parts = [tokenizer.get_vocab(), tokenizer(PROBE).input_ids, tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def lengths(tokens) -> np.ndarray:
    """The number of tokens of each row; of a pair, with the longer answer."""
    import pyarrow.compute

    of_column = {
        name: pyarrow.compute.list_value_length(tokens.data.column(name)).to_numpy()
        for name in tokens.column_names
        if name != "labels"
    }
    prompt = of_column.pop("prompt_ids", 0)
    return prompt + np.maximum.reduce(list(of_column.values()))


def count(tokens) -> dict[str, int]:
    """Numbers of rows of `sft`, their tokens, and the tokens that are trained. Masked labels are negative."""
    import pyarrow.compute

    labels = tokens.data.column("labels").chunks
    trained = sum(pyarrow.compute.sum(pyarrow.compute.greater_equal(part.flatten(), 0)).as_py() or 0 for part in labels)
    return {"rows": len(tokens), "tokens": int(lengths(tokens).sum()), "trained_tokens": trained}
