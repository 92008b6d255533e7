"""The mathematics of GRPO and RLOO for language models, as pure functions.

Shapes: B answers of at most T tokens, those to one prompt one after the other. `mask` is 1 on the tokens of an answer,
its end of turn included, and 0 on padding.

Sources: GRPO, Shao et al. 2024 (arXiv 2402.03300); RLOO, Ahmadian et al. 2024 (arXiv 2402.14740); Dr. GRPO, Liu et al.
2025 (arXiv 2503.20783); DAPO, Yu et al. 2025 (arXiv 2503.14476); GSPO, Zheng et al. 2025 (arXiv 2507.18071).
"""

import torch
from torch import Tensor

TINY = 1e-4  # added to a group's standard deviation, as in TRL


def advantages(rewards: Tensor, group: int, leave_one_out: bool = False, scale: bool = False) -> Tensor:
    """Reward less the mean of its group (2402.03300, section 4.1.2), or less that of the group's other answers
    (RLOO, 2402.14740), divided by the group's standard deviation where `scale`. rewards B; returns B."""
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    centred = centred.masked_fill(equal(rewards, group).unsqueeze(1), 0.0)  # their mean is rounded
    if leave_one_out:  # r_i - (sum - r_i) / (G - 1) = (r_i - mean) G / (G - 1)
        centred = centred * group / (group - 1)
    if scale:
        centred = centred / (grouped.std(dim=1, keepdim=True) + TINY)
    return centred.flatten()


def equal(rewards: Tensor, group: int) -> Tensor:
    """Whether all rewards of each group are equal, so that its answers teach nothing. rewards B; returns B / group."""
    grouped = rewards.view(-1, group)
    return (grouped == grouped[:, :1]).all(dim=1)


def token_weights(mask: Tensor, average: str, longest: int) -> Tensor:
    """Weight of each token's loss in the mean, B x T; those of a batch whose answers all count sum to 1 but for
    `longest`.

    average: `answers` (2402.03300, eq. 3), `tokens` (2503.14476, section 3.3), or `longest`, over B x longest
    (2503.20783).
    An answer whose mask is 0 everywhere does not count.
    """
    lengths = mask.sum(dim=1, keepdim=True)
    if average == "tokens":
        return mask / lengths.sum().clamp(min=1)
    answers = (lengths > 0).sum().clamp(min=1)
    return mask / (lengths.clamp(min=1) if average == "answers" else longest) / answers


def log_ratio(logp: Tensor, old: Tensor, mask: Tensor, sequence: bool) -> Tensor:
    """log pi / pi_old of each token, or on each token its mean over the answer (2507.18071, section 4.1). B x T."""
    difference = (logp - old) * mask
    if not sequence:
        return difference
    mean = difference.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mean.expand_as(difference)


def policy_loss(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """- min(r A, clip(r, 1 - low, 1 + high) A) of each token (2402.03300, eq. 3; two bounds: 2503.14476, section 3.1).

    log_ratio B x T, advantages B; returns B x T.
    """
    ratio, advantage = log_ratio.exp(), advantages.unsqueeze(1)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
