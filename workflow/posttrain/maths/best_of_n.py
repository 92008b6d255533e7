"""Best-of-n sampling from N answers to each prompt: the expected worth, by one reward, of the best of n by another.

Sources: Stiennon et al. 2020 (arXiv 2009.01325, appendix G.3); the unbiased estimator, Nakano et al. 2021
(arXiv 2112.09332, appendix I).
"""

import math

import numpy as np


def kl(n: int) -> float:
    """KL in nats of the best of n to the policy that is sampled from: log n - (n - 1) / n (2009.01325)."""
    return math.log(n) - (n - 1) / n


def expected(worth: np.ndarray, ranked_by: np.ndarray, n: int) -> np.ndarray:
    """Unbiased estimate of the worth of the best of n answers, for each prompt, from all N of them.

    The answer of rank i (1 is the worst of N by `ranked_by`) is the best of C(i - 1, n - 1) of the C(N, n) subsets
    (2112.09332, appendix I). worth, ranked_by: prompts x N; returns one number per prompt. Raises ValueError for n > N.
    """
    answers = worth.shape[1]
    if not 1 <= n <= answers:
        raise ValueError(f"best of {n} of {answers} answers")
    weights = [math.comb(rank - 1, n - 1) / math.comb(answers, n) for rank in range(1, answers + 1)]
    order = np.argsort(ranked_by, axis=1, kind="stable")
    return np.take_along_axis(worth, order, axis=1) @ np.array(weights)
