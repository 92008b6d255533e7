"""Means with their standard errors, deviations over seeds, and intervals of shares."""

import math
from collections.abc import Iterable


def mean_stderr(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and its standard error s/√n, s with n - 1 as in lm-eval; for 0/1 values √(p(1-p)/(n-1))."""
    values = list(values)
    n, mean = len(values), sum(values) / len(values)
    if n < 2 or not math.isfinite(mean):
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) * (x - mean) for x in values) / (n - 1) / n)


def over_seeds(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1) of one figure over the seeds of an experiment."""
    values = list(values)
    mean, stderr = mean_stderr(values)
    return mean, None if stderr is None else stderr * math.sqrt(len(values))


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of n questions, inside [0, 1] and not empty at 0 or 1 (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def most_differing(total: int, asked: int, confidence: float = 0.95) -> int:
    """The largest number of `total` items that may differ from the record, where `asked` of them, drawn at random
    without replacement, were all equal to it.

    It is the largest x with C(total - x, asked) / C(total, asked) >= 1 - confidence, the exact upper limit of the
    hypergeometric distribution (Buonaccorsi 1987, The American Statistician 41, 215-218).
    """
    chances = ((x, math.comb(total - x, asked) / math.comb(total, asked)) for x in range(total - asked, -1, -1))
    return next(x for x, chance in chances if chance >= 1 - confidence)
