"""Identities of GRPO and RLOO, by `maths/grpo.py`.

Sources: GRPO, Shao et al. 2024 (arXiv 2402.03300); RLOO, Ahmadian et al. 2024 (arXiv 2402.14740); groups of
equal rewards, DAPO, Yu et al. 2025 (arXiv 2503.14476).
"""

import itertools

import torch
from torch import Tensor

from posttrain.identities.small import Identity, largest
from posttrain.maths import grpo

GROUP, ANSWERS, CLIP = 3, 4, 0.2


def rloo_unbiased() -> Identity:
    """The expectation of RLOO's gradient over all groups of 3 answers is the gradient of the expected reward
    (2402.14740). Control: the mean of the whole group as baseline, which holds the answer itself."""
    weights, rewards = torch.randn(ANSWERS, requires_grad=True), torch.randn(ANSWERS)
    logp = torch.log_softmax(weights, 0)
    (true,) = torch.autograd.grad((logp.exp() * rewards).sum(), weights, retain_graph=True)

    def expected(leave_one_out: bool) -> Tensor:
        total = torch.tensor(0.0)
        for drawn in map(list, itertools.product(range(ANSWERS), repeat=GROUP)):
            gains = grpo.advantages(rewards[drawn], GROUP, leave_one_out)
            total = total + logp[drawn].sum().detach().exp() * (gains * logp[drawn]).mean()
        return torch.autograd.grad(total, weights, retain_graph=True)[0]

    return largest(expected(True), true), largest(expected(False), true)


def grpo_equal_rewards() -> Identity:
    """Largest gradient of the loss where a group's rewards are all equal: 0, scaled by their deviation or not
    (2503.14476, section 3.2). Control: rewards that differ."""
    logp = torch.randn(GROUP, 5, requires_grad=True)
    equal, other = torch.randn(1).expand(GROUP), torch.randn(GROUP)

    def gradient(rewards: Tensor, leave_one_out: bool, scale: bool) -> float:
        gains = grpo.advantages(rewards, GROUP, leave_one_out, scale)
        loss = grpo.policy_loss(logp - logp.detach(), gains, CLIP, CLIP).sum()
        return largest(torch.autograd.grad(loss, logp)[0])

    ways = [(leave_one_out, scale) for leave_one_out in (False, True) for scale in (False, True)]
    return max(gradient(equal, *way) for way in ways), min(gradient(other, *way) for way in ways)
