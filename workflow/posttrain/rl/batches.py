"""How the answers of an iteration are chosen and divided: rows, optimiser steps, micro-batches and processes."""

import math
from collections.abc import Sequence

import torch

from posttrain.config.sections import Ppo
from posttrain.rl.answers import stream
from posttrain.training import parallel


def rows_of_iteration(rows: int, count: int, seed: int | None, iteration: int, name: str = "prompts") -> list[int]:
    """The `count` numbers, of `rows` rows, that an iteration uses: passes through all rows, each in a fresh order.

    They depend on the seed, the iteration and the stream's name alone.
    """
    chosen: list[int] = []
    for place in range(iteration * count, (iteration + 1) * count):
        if not chosen or place % rows == 0:
            order = torch.Generator().manual_seed(stream(name, seed, place // rows))
            shuffled = torch.randperm(rows, generator=order).tolist()
        chosen.append(shuffled[place % rows])
    return chosen


def minibatches(section: Ppo, order: Sequence[int]) -> list[list[int]]:
    """Answers in the given order, one list for each optimiser step."""
    size = math.ceil(len(order) / section.minibatches)
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def micro_batches(section: Ppo, which: Sequence[int]) -> list[list[int]]:
    """This process's part of some answers, in pieces of at most `micro_batch_size`."""
    mine = [which[n] for n in parallel.share(len(which))]
    size = parallel.at_once(section, len(mine))
    return [mine[start : start + size] for start in range(0, len(mine), size)]
