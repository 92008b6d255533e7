"""The mathematics of PPO for language models, as pure functions.

Shapes: B answers of at most T tokens over a vocabulary of V. `mask` is 1 on the tokens of an answer, its end of turn
included, and 0 on padding. Losses are per token: their sum over the parts of a batch, divided by the tokens of the
whole batch, does not depend on micro-batches and processes.

Sources: PPO, Schulman et al. 2017 (arXiv 1707.06347); GAE, Schulman et al. 2016 (arXiv 1506.02438); KL control,
Ziegler et al. 2019 (arXiv 1909.08593); rewards at the end of an answer, Ouyang et al. 2022 (arXiv 2203.02155);
details, Huang et al. 2024 (arXiv 2403.17031).
"""

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Reward of each token: - beta KL_t, and the score on the last (2203.02155, eq. 2; 1909.08593, eq. 2).

    scores B, kl and mask B x T; returns B x T, 0 on padding.
    """
    rewards = -coefficient * kl * mask
    last = mask.sum(dim=1).long() - 1
    return rewards.index_put((torch.arange(len(scores), device=scores.device), last), scores, accumulate=True)


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that the value function is fitted to.

    delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last token (1707.06347, eq. 12);
    A_t = delta_t + gamma lambda A_{t+1} (eq. 11; 1506.02438, eq. 16); returns R_t = A_t + V_t.
    rewards, values and mask B x T; returns two B x T, 0 on padding.
    """
    values = values * mask
    following, after = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    estimates = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * after - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        estimates[:, t], after = following, values[:, t]
    return estimates, estimates + values


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked tokens."""
    return (values * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
    """Values of variance 1 over the mask, and of mean 0 unless `shift` is false (2403.17031, detail on whitening)."""
    centre = mean(values, mask)
    variance = mean((values - centre).square(), mask)
    scaled = (values - centre) * torch.rsqrt(variance + 1e-8)
    return (scaled if shift else scaled + centre) * mask


def policy_loss(logp: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """- min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t), r_t = pi / pi_old (1707.06347, eq. 7). B x T; per token."""
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2) / 2 (2403.17031, value clipping). Per token."""
    near = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def clipped(logp: Tensor, old: Tensor, clip: float) -> Tensor:
    """1 where the ratio is outside [1 - eps, 1 + eps], else 0. B x T."""
    return ((logp - old).exp() - 1).abs().gt(clip).float()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R): 1 for a perfect value function, 0 for one that predicts the mean. A scalar."""
    left = returns - values
    spread = mean((returns - mean(returns, mask)).square(), mask)
    return 1 - mean((left - mean(left, mask)).square(), mask) / spread.clamp(min=1e-12)


def adapted_kl(coefficient: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """beta (1 + e n / horizon), e = clip(KL / target - 1, -0.2, 0.2) (1909.08593, 2.2); KL in nats per answer."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * answers / horizon)
