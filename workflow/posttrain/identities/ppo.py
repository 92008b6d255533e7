"""Identities of PPO, of KL estimators and of best-of-n, by `maths/ppo.py`, `maths/likelihood.py`, `maths/best_of_n.py`.

Sources: PPO, Schulman et al. 2017 (arXiv 1707.06347); GAE, Schulman et al. 2016 (arXiv 1506.02438); KL estimators,
Schulman 2020 (joschu.net/blog/kl-approx.html); rewards, Ouyang et al. 2022 (arXiv 2203.02155).
"""

import peft
import torch
from torch import Tensor

from posttrain.identities import small
from posttrain.identities.small import Identity, largest
from posttrain.maths import likelihood, ppo
from posttrain.models import completions
from posttrain.models.network import adapter

CLIP = 0.2


def ppo_gae() -> Identity:
    """A_t = sum_k (gamma lambda)^k delta_(t+k) (1506.02438, eq. 16), summed directly. Control: another lambda."""
    gamma, lam, length = 0.95, 0.9, 12
    rewards, values = torch.randn(2, 3, length)
    advantages, _ = ppo.advantages(rewards, values, torch.ones(3, length), gamma, lam)
    errors = rewards + gamma * torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1) - values
    later = torch.arange(length) - torch.arange(length)[:, None]  # k, rows t, columns t + k

    def sums(decay: float) -> Tensor:
        return errors @ ((gamma * decay) ** later.clamp(min=0) * (later >= 0)).T

    return largest(advantages, sums(lam)), largest(advantages, sums(1.0))


def ppo_clip() -> Identity:
    """Largest gradient of the clipped objective beyond the clip, on the side that would gain: 0 (1707.06347, eq. 7).
    Control: the gradient within the clip."""
    advantage = torch.tensor([1.0, -1.0])

    def gradient(ratio: list[float]) -> float:
        logp = torch.tensor(ratio).log().requires_grad_()
        (slope,) = torch.autograd.grad(ppo.policy_loss(logp, torch.zeros(2), advantage, CLIP).sum(), logp)
        return largest(slope)

    return gradient([1 + 1.1 * CLIP, 1 - 1.1 * CLIP]), gradient([1 + 0.9 * CLIP, 1 - 0.9 * CLIP])


def ppo_start() -> Identity:
    """At ratio 1, the objective's gradient is the policy gradient: dL / d log pi = - A (1707.06347, eq. 6).
    Control: at ratio 1 + eps / 2."""
    advantage = torch.randn(32)

    def off(log_ratio: float) -> float:
        logp = torch.full((32,), log_ratio, requires_grad=True)
        (slope,) = torch.autograd.grad(ppo.policy_loss(logp, torch.zeros(32), advantage, CLIP).sum(), logp)
        return largest(slope, -advantage)

    return off(0.0), off(CLIP / 2)


def policy_and_answers() -> tuple[peft.PeftModel, completions.Answers]:
    """A policy that starts as its frozen weights, and answers to prompts of other lengths."""
    model = peft.get_peft_model(small.llama(), peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    prompts, replies = ([small.tokens(count) for count in lengths] for lengths in ((3, 7, 5), (6, 2, 9)))
    return model, completions.answers_of(small.tokenizer(), prompts, replies, "cpu")


@torch.no_grad()
def ppo_ratio() -> Identity:
    """The ratio of an unchanged policy is 1 in the first epoch: largest |r - 1|. Control: the adapter is moved."""
    model, answers = policy_and_answers()
    old = completions.log_probs(model, answers)
    unchanged = completions.log_probs(model, answers)
    small.draw_b(model)
    changed = completions.log_probs(model, answers)
    return largest((unchanged - old).exp(), 1.0), largest((changed - old).exp(), 1.0)


@torch.no_grad()
def ppo_kl() -> Identity:
    """KL to the reference, k1 by token, is 0 at the start: policy and reference are one model with and without its
    adapter (1909.08593, section 2.2). Control: the adapter is moved."""
    model, answers = policy_and_answers()

    def kl() -> Tensor:
        with adapter(model, None):
            reference = completions.log_probs(model, answers)
        return likelihood.kl_k1(completions.log_probs(model, answers), reference)

    start = kl()
    small.draw_b(model)
    return largest(start), largest(kl())


def ppo_reward() -> Identity:
    """The rewards of an answer's tokens sum to r(x, y) - beta KL (2203.02155, eq. 2). Control: half of beta."""
    beta, mask = 0.2, torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    scores, kl = torch.randn(2), torch.rand(2, 4)
    total = ppo.token_rewards(scores, kl, mask, beta).sum(dim=1)
    right, other = (scores - factor * (kl * mask).sum(dim=1) for factor in (beta, beta / 2))
    return largest(total, right), largest(total, other)


def two_policies() -> tuple[Tensor, Tensor]:
    """Log-probabilities of 9 tokens under two policies."""
    first, second = torch.log_softmax(torch.randn(2, 9).double(), dim=-1)
    return first, second


def kl_unbiased() -> Identity:
    """E[k1] = E[k3] = KL(pi, pi_ref), the expectation summed over the vocabulary (Schulman 2020). Control: k2."""
    policy, reference = two_policies()
    true = (policy.exp() * (policy - reference)).sum()

    def bias(estimator) -> float:
        return largest((policy.exp() * estimator(policy, reference)).sum(), true)

    return max(bias(likelihood.kl_k1), bias(likelihood.kl_k3)), bias(likelihood.kl_k2)


def kl_sign() -> Identity:
    """How far below 0 k3 goes on any token: nowhere (Schulman 2020). Control: k1."""
    policies = two_policies()
    below, other = (max(0.0, -estimator(*policies).min().item()) for estimator in (likelihood.kl_k3, likelihood.kl_k1))
    return below, other
