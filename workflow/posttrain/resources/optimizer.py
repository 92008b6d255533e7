"""The bytes of an optimiser's state, by its name and the shapes of what it trains.

posttrain plan EXPERIMENT/STAGE
"""

import math
from typing import NamedTuple

BLOCK = 256  # numbers that share a constant in bitsandbytes' 8-bit state (arXiv 2110.02861, section 2.1)
SMALLEST_8BIT = 4096  # numbers of a tensor from which its state has 8 bits
SMALLEST_PAGED = 100_000  # numbers of a tensor from which its state is paged


class Tensors(NamedTuple):
    """Trained tensors of one shape. embedding: whether they are embeddings, whose state no optimiser makes smaller."""

    number: int
    shape: tuple[int, ...]
    embedding: bool = False


def state(optimizer: str | None, tensors: list[Tensors]) -> float:
    """Bytes of an optimiser's state; AdamW's where there is no name."""
    return sum(part.number * _of_one(optimizer or "adamw", part) for part in tensors)


def paged(optimizer: str | None, tensors: list[Tensors]) -> float:
    """The bytes of the state that a GPU hands to host memory where its own runs out."""
    large = [part for part in tensors if math.prod(part.shape) >= SMALLEST_PAGED]
    return state(optimizer, large) if (optimizer or "").startswith("paged") else 0


def _of_one(optimizer: str, part: Tensors) -> float:
    """The bytes for one tensor. A number has two moments of 4 bytes in AdamW, one in RMSprop and for a matrix in Muon;
    in 8-bit AdamW two of 1 byte, with 4 bytes for each block of them. Adafactor has sums of rows and of columns (arXiv
    1804.04235, algorithm 4)."""
    numbers, matrix = math.prod(part.shape), len(part.shape) > 1
    if optimizer == "rmsprop" or (optimizer == "muon" and matrix and not part.embedding):
        return 4 * numbers
    if optimizer == "adafactor":
        return 4 * sum(part.shape) if matrix else 4 * numbers
    if optimizer.endswith("8bit") and numbers >= SMALLEST_8BIT and not part.embedding:
        return 2 * (numbers + 4 * math.ceil(numbers / BLOCK))
    return 8 * numbers
