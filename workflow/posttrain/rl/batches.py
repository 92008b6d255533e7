"""Choose the rows of an iteration, and divide answers into optimiser steps, micro-batches and processes."""

import math
from collections.abc import Sequence

import torch

from posttrain.config.sections import Sampled
from posttrain.rl.answers import stream
from posttrain.training import parallel


def rows_of_iteration(rows: int, count: int, seed: int | None, iteration: int, name: str = "prompts") -> list[int]:
    """The numbers of the `count` rows, of `rows`, that an iteration uses: passes through all rows, in random orders.

    They depend on the seed, the iteration and the stream's name only.
    """
    chosen: list[int] = []
    for place in range(iteration * count, (iteration + 1) * count):
        if not chosen or place % rows == 0:
            order = torch.Generator().manual_seed(stream(name, seed, place // rows))
            shuffled = torch.randperm(rows, generator=order).tolist()
        chosen.append(shuffled[place % rows])
    return chosen


def group_of(section: Sampled) -> int:
    """Answers to each prompt."""
    return getattr(section, "group", 1)


def minibatches(section: Sampled, order: Sequence[int]) -> list[list[int]]:
    """The numbers of the answers of each optimiser step, in the given order."""
    size = math.ceil(len(order) / section.minibatches)
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def micro_batches(section: Sampled, which: Sequence[int]) -> list[list[int]]:
    """This process's share of some answers, in micro-batches."""
    mine = [which[n] for n in parallel.share(len(which))]
    size = parallel.at_once(section, len(mine))
    return [mine[start : start + size] for start in range(0, len(mine), size)]
