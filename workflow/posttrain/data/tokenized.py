"""The tokens of prepared rows, in `data/TASK/SIDE.arrow` beside the rows: written once by `prepare`, read by trainers.

A row of `sft` has `input_ids` and `labels`; of `preference`, `prompt_ids`, `chosen_ids` and `rejected_ids`; of `kto`,
`prompt_ids` and `completion_ids`. Rows are in the order of SIDE.jsonl.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from posttrain.ground.errors import UserError

BATCH = 1000  # rows of a record batch
MASKED = -100  # as in `models.tokens`, which reading tokens does not need
PROBE = "Élan: 3 * 14 = 42.\n\tWas it “fine”, ﬁne, 好的 or 👍🏽? don't</s>"


@contextmanager
def writing(tokenizer, file: Path) -> Iterator[Callable[[dict[str, list[int]]], None]]:
    """Yields a function that appends the tokens of a row. There is no file where it is not called."""
    import pyarrow as pa

    waiting: list[dict[str, list[int]]] = []
    writer = None

    def flush() -> None:
        nonlocal writer
        if not waiting:
            return
        table = pa.table({key: pa.array([row[key] for row in waiting], pa.list_(pa.int32())) for key in waiting[0]})
        table = table.replace_schema_metadata({"tokenizer": digest(tokenizer)})
        if writer is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            writer = pa.ipc.new_stream(str(file), table.schema)
        writer.write_table(table)
        waiting.clear()

    def append(row: dict[str, list[int]]) -> None:
        waiting.append(row)
        if len(waiting) == BATCH:
            flush()

    try:
        yield append
        flush()
    finally:
        if writer is not None:
            writer.close()


def load(tokenizer, data: Path, task: str, side: str):
    """The tokens of one side's rows as a datasets.Dataset, which is mapped into memory; None where there are no rows.

    data: manifest of `prepare`. Raises UserError where the tokens are those of another tokenizer: the model would read
    other words than the rows hold.
    """
    import pyarrow as pa

    file = data.parent / "data" / task / f"{side}.arrow"
    if not file.is_file():
        return None
    with pa.memory_map(str(file)) as opened:
        names = pa.ipc.open_stream(opened).schema.metadata  # datasets leaves it out
    if names[b"tokenizer"].decode() != digest(tokenizer):
        raise UserError(f"{file}: holds tokens of another tokenizer than that of the base; remake both: rm {data}")
    return mapped(file)


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

    of = {
        name: pyarrow.compute.list_value_length(tokens.data.column(name)).to_numpy()
        for name in tokens.column_names
        if name != "labels"
    }
    whole = of.pop("prompt_ids", 0)
    return whole + np.maximum.reduce(list(of.values()))


def count(tokens) -> dict[str, int]:
    """Numbers of rows of `sft`, their tokens, and the tokens that are trained."""
    import pyarrow.compute

    trained = sum(
        pyarrow.compute.sum(pyarrow.compute.not_equal(part.flatten(), MASKED)).as_py() or 0
        for part in tokens.data.column("labels").chunks
    )
    return {"rows": len(tokens), "tokens": int(lengths(tokens).sum()), "trained_tokens": trained}
