"""Standard errors over clusters, tests against a region of tolerated values, and Holm's correction."""

import math
from collections.abc import Hashable, Sequence

from scipy.stats import t


def clustered(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float | None, int]:
    """(mean, its standard error over clusters, number of clusters); the error is None for fewer than two clusters.

    Deviations are added up within a cluster first: sqrt(sum_c (sum_i (x_ci - mean))^2) / n, times sqrt(c / (c - 1))
    for c clusters (Miller 2024, arXiv 2411.00640, section 2.2). With clusters of one value it is s / sqrt(n).
    """
    n = len(values)
    mean = math.fsum(values) / n
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    count = len(sums)
    if count < 2:
        return mean, None, count
    return mean, math.sqrt(math.fsum(part * part for part in sums.values()) * count / (count - 1)) / n, count


def against(estimate: float, stderr: float, freedom: int, low: float, high: float) -> tuple[float, float]:
    """(p of the value lying outside [low, high], p of its lying inside), each of a test of that hypothesis.

    A small first one shows that the value lies inside (two one-sided tests, Schuirmann 1987), a small second one that
    it lies outside. low, high: may be infinite. freedom: degrees of the t distribution.
    """
    above, below = (_upper((estimate - low), stderr, freedom), _upper((high - estimate), stderr, freedom))
    sides = [p for p, bound in ((above, low), (below, high)) if math.isfinite(bound)]
    if not sides:
        return 0.0, 1.0
    return max(sides), min(1.0, len(sides) * min(1 - p for p in sides))


def _upper(distance: float, stderr: float, freedom: int) -> float:
    """P(T >= distance / stderr); for no error 0 where the distance is not negative, else 1."""
    if stderr == 0:
        return 0.0 if distance >= 0 else 1.0
    return float(t.sf(distance / stderr, freedom))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values in the given order (Holm 1979): the k-th smallest of m is multiplied by m - k + 1."""
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted


def smallest_effect(stderr: float, freedom: int, level: float = 0.05, power: float = 0.8) -> float:
    """The smallest difference that a two-sided test at `level` shows with probability `power`, which is
    (t_(1-level/2) + t_power) standard errors."""
    return stderr * float(t.ppf(1 - level / 2, freedom) + t.ppf(power, freedom))
