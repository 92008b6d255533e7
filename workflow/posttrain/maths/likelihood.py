"""Log-probabilities, entropy and estimators of the KL divergence between two policies, as pure functions.

Shapes: B answers of at most T tokens over a vocabulary of V. All numbers are in nats.

Source of the estimators k1, k2, k3: Schulman 2020 (joschu.net/blog/kl-approx.html).
"""

import torch
from torch import Tensor


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log pi(a_t | s_t) of the given tokens, in nats. logits B x T x V, tokens B x T; returns B x T."""
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution in nats: - sum_a pi(a) log pi(a). B x T x V; returns B x T."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


def kl_k1(logp: Tensor, reference: Tensor) -> Tensor:
    """log pi - log pi_ref: unbiased for KL(pi, pi_ref) on samples of pi, and may be negative (Schulman 2020, k1)."""
    return logp - reference


def kl_k2(logp: Tensor, reference: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2: never negative, biased, of low variance (Schulman 2020, k2)."""
    return (logp - reference).square() / 2


def kl_k3(logp: Tensor, reference: Tensor) -> Tensor:
    """r - 1 - log r with r = pi_ref / pi: unbiased and never negative (Schulman 2020, k3)."""
    log_ratio = reference - logp
    return log_ratio.exp() - 1 - log_ratio
