"""Identities of best-of-n sampling, by `maths/best_of_n.py`.

Sources: Stiennon et al. 2020 (arXiv 2009.01325, appendix G.3); Nakano et al. 2021 (arXiv 2112.09332, appendix I).
"""

import itertools
import math

import numpy as np
import torch

from posttrain.identities.small import Identity
from posttrain.maths import best_of_n

ANSWERS = 9


def best_of_4_kl() -> Identity:
    """KL of the best of 4 in nats: log n - (n - 1) / n = 0.636 (2009.01325, appendix G.3). Control: log n."""
    return best_of_n.kl(4), math.log(4)


def best_of_16_kl() -> Identity:
    """KL of the best of 16 in nats: 1.835. Control: log n."""
    return best_of_n.kl(16), math.log(16)


def best_of_128_kl() -> Identity:
    """KL of the best of 128 in nats: 3.860. Control: log n."""
    return best_of_n.kl(128), math.log(128)


def best_of_n_kl() -> Identity:
    """Deviation from the KL of the best of 16 of 100,000 equally likely answers, summed over them. Control: of 15."""
    answers = np.arange(1, 100_001) / 100_000

    def divergence(n: int) -> float:
        chosen = np.diff(answers**n, prepend=0.0)
        return float(np.sum(chosen * np.log(np.maximum(chosen, 1e-300) * len(answers))))

    return abs(best_of_n.kl(16) - divergence(16)), abs(best_of_n.kl(16) - divergence(15))


def best_of_n_estimate() -> Identity:
    """The unbiased estimate is the mean over all subsets of n of 9 answers, for every n (2112.09332, appendix I).
    Control: subsets of n - 1."""
    worth, ranked_by = torch.randn(2, 1, ANSWERS).double().numpy()

    def mean(n: int) -> float:
        subsets = list(itertools.combinations(range(ANSWERS), n))
        return sum(worth[0, max(some, key=lambda place: ranked_by[0, place])] for some in subsets) / len(subsets)

    estimates = {n: best_of_n.expected(worth, ranked_by, n)[0] for n in range(2, ANSWERS + 1)}
    right, other = (max(abs(estimates[n] - mean(n - less)) for n in estimates) for less in (0, 1))
    return float(right), float(other)
