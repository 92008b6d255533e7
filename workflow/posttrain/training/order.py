"""The order in which a run reads its rows."""

import array
import math

import torch

from posttrain.config.sections import Training
from posttrain.ground.progress import say


def in_batches(rows, training: Training) -> torch.utils.data.Subset:
    """The rows of a whole run in the order of its batches: passes through all rows, each in a random order, or in that
    of the file. It says how often a row is read.

    Without it, a trainer would end each pass with a smaller batch, which processes and micro-batches would share
    unevenly; and from a checkpoint of the last step it would take another step, as rows would be left.
    rows: a sequence. Returns `steps` x `batch_size` rows.
    """
    wanted = training.steps * training.batch_size
    say(f"{wanted:,} rows are read in all: each of {len(rows):,} {wanted / len(rows):.2f} times")
    return torch.utils.data.Subset(rows, passes(len(rows), wanted, training))


def passes(count: int, wanted: int, training: Training) -> array.array:
    """`wanted` numbers of rows: passes through `count` rows, so that no row is read twice more often than another."""
    assert training.seed is not None, "filled in when the campaign was read"
    order = array.array("q")  # of eight bytes: a run may read millions
    for number in range(math.ceil(wanted / count)):
        if training.order == "file":
            order.extend(range(count))
        else:
            shuffle = torch.Generator().manual_seed(training.seed + number)
            order.extend(torch.randperm(count, generator=shuffle).tolist())
    return order[:wanted]
