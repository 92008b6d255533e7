"""The order in which a run reads its rows: passes through all or, of a mixture, through those of each source."""

import array
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from posttrain.config.sections import Training
from posttrain.ground.files import read_json
from posttrain.ground.progress import say

APART = 1_000_003  # between the seeds of two sources of a mixture
SORTED = 50  # most batches that are sorted by length together, as in transformers


class Part(NamedTuple):
    """Rows of one source of a mixture, which follow each other.

    share: of all rows that a run reads. weight: of all that weights count, rows or, with `weigh_by: tokens`, tokens.
    """

    name: str
    rows: int
    share: float
    weight: float


def parts_of(data: Path, task: str) -> list[Part]:
    """The parts of a task's training rows; none where no source has a weight. data: manifest of `prepare`."""
    file = data.parent / "data" / task / "mixture.json"
    entries = read_json(file) if file.is_file() else []
    return [Part(entry["source"], entry["rows"], entry["share"], entry["weight"]) for entry in entries]


def divided(count: int, parts: Sequence[Part]) -> Iterator[tuple[str, range]]:
    """(name, numbers of its rows) of each part; without parts, of all `count` rows."""
    start = 0
    for part in parts or [Part("all sources", count, 1.0, 1.0)]:
        yield part.name, range(start, start + part.rows)
        start += part.rows


def in_sequences(parts: Sequence[Part], counts: Sequence[int]) -> list[Part]:
    """The parts counted in the sequences that their rows were packed into, each part's apart.

    A row is read as often as its sequence, and as often, beside rows of other parts, as without packing. counts:
    sequences of each part; without parts, not looked at.
    """
    shares = [part.share / part.rows * count for part, count in zip(parts, counts, strict=False)]
    return [
        part._replace(rows=count, share=share / sum(shares))
        for part, count, share in zip(parts, counts, shares, strict=False)
    ]


def in_batches(
    rows, training: Training, parts: Sequence[Part] = (), what: str = "rows", lengths: np.ndarray | None = None
) -> torch.utils.data.Subset:
    """The rows of a whole run in the order of its batches: passes through all rows, each in a random order, or in that
    of the file; with `parts`, passes through each of them, in their shares. It says how often a row is read.

    Without it, a trainer would end each pass with a smaller batch, which processes and micro-batches would share
    unevenly; and from a checkpoint of the last step it would take another step, as rows would be left.
    rows: a sequence, of several rows for each one of `parts` where they were divided. what: the word for them, such as
    packed sequences. lengths: of the rows, where those of a batch are to be alike. Returns `steps` x `batch_size` rows.
    """
    wanted = training.steps * training.batch_size
    if parts:
        numbers = mixed(len(rows), wanted, training, parts, what)
    else:
        say(f"{wanted:,} {what} are read in all: each of {len(rows):,} {wanted / len(rows):.2f} times")
        numbers = passes(len(rows), wanted, training)
    if lengths is not None:
        numbers = grouped(numbers, lengths, training.batch_size)
    return torch.utils.data.Subset(rows, numbers)


def grouped(numbers: array.array, lengths: np.ndarray, batch_size: int) -> array.array:
    """The numbers of rows with those of each stretch of batches sorted by length, the longest first, as transformers'
    `LengthGroupedSampler` does: a stretch has 50 batches, or a quarter of all rows where these are fewer."""
    size = batch_size * max(1, min(SORTED, len(lengths) // (4 * batch_size)))
    order = np.array(numbers, np.int64)
    for start in range(0, len(order), size):
        stretch = order[start : start + size]
        order[start : start + size] = stretch[np.argsort(-lengths[stretch], kind="stable")]
    return array.array("q", order.tobytes())


def mixed(count: int, wanted: int, training: Training, parts: Sequence[Part], what: str = "rows") -> array.array:
    """`wanted` numbers of rows. At every place, a part has been read as often as its share says, within two rows, and
    none of its rows more than once more than another."""
    times = count // sum(part.rows for part in parts)
    owners, order = turns(wanted, [part.share for part in parts]), np.zeros(wanted, np.int64)
    start = 0
    for number, part in enumerate(parts):
        places, size = np.flatnonzero(owners == number), part.rows * times
        order[places] = start + np.array(passes(size, len(places), training, number * APART), np.int64)
        start += size
        often = f"each of its {size:,} {len(places) / size:.2f} times"
        say(f"{len(places):,} of {wanted:,} {what} that are read are of {part.name}: {often}")
    return array.array("q", order.tobytes())


def turns(wanted: int, shares: Sequence[float]) -> np.ndarray:
    """Whose turn it is at each of `wanted` places. A longer run begins as a shorter one.

    The k-th row of a share s is due at (k + 1/2) / s; the rows stand in the order of these times.
    """
    counts = [math.ceil(wanted * share) + 1 for share in shares]
    due = np.concatenate([(np.arange(n) + 0.5) / share for n, share in zip(counts, shares, strict=True)])
    return np.repeat(np.arange(len(shares)), counts)[np.argsort(due, kind="stable")[:wanted]]


def passes(count: int, wanted: int, training: Training, apart: int = 0) -> array.array:
    """`wanted` numbers of rows: passes through `count` rows, so that none is read more than once more than another."""
    assert training.seed is not None, "filled in when the campaign was read"
    order = array.array("q")  # of eight bytes: a run may read millions
    for number in range(math.ceil(wanted / count)):
        if training.order == "file":
            order.extend(range(count))
        else:
            shuffle = torch.Generator().manual_seed(training.seed + number + apart)
            order.extend(torch.randperm(count, generator=shuffle).tolist())
    return order[:wanted]
