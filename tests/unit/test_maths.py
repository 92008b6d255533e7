"""PPO's, sampling's and best-of-n's mathematics against closed forms and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch

from posttrain.maths import best_of_n, likelihood, ppo
from posttrain.maths.sampling import draw_tokens


@pytest.fixture
def batch():
    """Three answers of 4, 2 and 1 tokens, padded to 5, over a vocabulary of 7."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    return torch.randn(3, 5, 7), torch.randint(7, (3, 5)), mask


def test_log_probs_and_entropy(batch):
    logits, tokens, _ = batch
    known = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(likelihood.log_probs(logits, tokens), known.log_prob(tokens), atol=1e-6)
    assert torch.allclose(likelihood.entropy(logits), known.entropy(), atol=1e-6)
    assert torch.allclose(likelihood.entropy(torch.zeros(1, 1, 8)), torch.tensor(math.log(8)))


def test_kl_estimators_are_what_they_estimate():
    """Expected under pi, summed over the whole vocabulary: k1 and k3 are KL(pi, pi_ref), k2 is not."""
    torch.manual_seed(1)
    p, q = (torch.log_softmax(torch.randn(9), dim=0) for _ in range(2))
    true = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (p, q)))
    for estimator in (likelihood.kl_k1, likelihood.kl_k3):
        assert torch.allclose((p.exp() * estimator(p, q)).sum(), true, atol=1e-6)
    assert not torch.allclose((p.exp() * likelihood.kl_k2(p, q)).sum(), true, atol=1e-2)
    assert (
        (likelihood.kl_k3(p, q) >= 0).all()
        and (likelihood.kl_k2(p, q) >= 0).all()
        and (likelihood.kl_k1(p, q) < 0).any()
    )
    for estimator in (likelihood.kl_k1, likelihood.kl_k2, likelihood.kl_k3):
        assert (estimator(p, p) == 0).all()


def test_the_score_stands_on_the_last_token(batch):
    mask = batch[2]
    kl = torch.full(mask.shape, 0.5)
    rewards = ppo.token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, coefficient=0.2)
    expected = torch.tensor([[-0.1, -0.1, -0.1, 9.9, 0], [-0.1, 19.9, 0, 0, 0], [29.9, 0, 0, 0, 0]])
    assert torch.allclose(rewards, expected)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_sum_they_stand_for(batch, gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, by a double loop (GAE, eq. 16)."""
    mask = batch[2]
    torch.manual_seed(2)
    rewards, values = torch.randn(3, 5) * mask, torch.randn(3, 5)
    found, returns = ppo.advantages(rewards, values, mask, gamma, lam)
    for i, length in enumerate(mask.sum(dim=1).tolist()):
        v = [*values[i, :length].tolist(), 0.0]
        delta = [rewards[i, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
            assert found[i, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[i, t].item() == pytest.approx(expected + v[t], abs=1e-5)
        assert (found[i, length:] == 0).all() and (returns[i, length:] == 0).all()


def test_lambda_one_is_the_return_less_the_value(batch):
    mask = batch[2]
    rewards, values = torch.ones(3, 5) * mask, torch.randn(3, 5)
    found, returns = ppo.advantages(rewards, values, mask, 1.0, 1.0)
    left = mask.flip(1).cumsum(1).flip(1) * mask  # tokens still to come
    assert torch.allclose(returns, left.float(), atol=1e-5)
    assert torch.allclose(found, (left - values) * mask, atol=1e-5)


def test_padding_changes_no_advantage(batch):
    mask = batch[2]
    rewards, values = torch.randn(3, 5) * mask, torch.randn(3, 5)
    wide = [torch.nn.functional.pad(x, (0, 3), value=7.0) for x in (rewards, values)]
    padded = torch.nn.functional.pad(mask, (0, 3))
    found = ppo.advantages(wide[0] * padded, wide[1], padded, 0.9, 0.8)[0]
    assert torch.equal(found[:, :5], ppo.advantages(rewards, values, mask, 0.9, 0.8)[0])


def test_whitening(batch):
    mask, values = batch[2], torch.randn(3, 5) * 4 + 3
    white = ppo.whiten(values, mask)
    inside = white[mask.bool()]
    assert inside.mean().abs() < 1e-6 and inside.std(unbiased=False) == pytest.approx(1, abs=1e-4)
    kept = ppo.whiten(values, mask, shift=False)[mask.bool()]
    assert kept.mean() == pytest.approx(values[mask.bool()].mean().item(), abs=1e-5)
    assert (white[mask == 0] == 0).all()


def test_the_policy_loss_is_clipped_where_it_would_gain():
    """Equation 7: outside the clip the gradient is 0 where the objective would still rise, and stays where it falls."""
    old, advantage = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0])
    logp = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    loss = ppo.policy_loss(logp, old, advantage, clip=0.2)
    assert torch.allclose(loss, torch.tensor([-1.2, -math.exp(-0.5), math.exp(0.5), 0.8]))
    loss.sum().backward()
    assert logp.grad[[0, 3]].tolist() == [0, 0] and (logp.grad[[1, 2]] != 0).all()
    assert torch.equal(ppo.policy_loss(old, old, advantage, 0.2), -advantage), "ratio 1"
    assert ppo.clipped(logp.detach(), old, 0.2).tolist() == [1, 1, 1, 1]
    assert ppo.clipped(old, old, 0.2).sum() == 0


def test_the_value_loss_takes_the_worse_of_both():
    values, old, returns = torch.tensor([2.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 1.0])
    assert torch.allclose(ppo.value_loss(values, old, returns, clip=0.2), torch.tensor([1.8**2 / 2, 0.9**2 / 2]))


def test_explained_variance(batch):
    mask, returns = batch[2], torch.randn(3, 5)
    assert ppo.explained_variance(returns, returns, mask) == pytest.approx(1)
    assert ppo.explained_variance(torch.full((3, 5), 3.0), returns, mask) == pytest.approx(0, abs=1e-6)
    assert ppo.explained_variance(-returns, returns, mask) == pytest.approx(-3, abs=1e-5)


def test_kl_control():
    assert ppo.adapted_kl(0.1, kl=6.0, target=6.0, answers=64, horizon=640) == 0.1
    assert ppo.adapted_kl(0.1, kl=60.0, target=6.0, answers=64, horizon=640) == pytest.approx(0.1 * 1.02)
    assert ppo.adapted_kl(0.1, kl=5.4, target=6.0, answers=64, horizon=640) == pytest.approx(0.1 * 0.99)


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    worth, proxy = rng.normal(size=(2, 3, 9))
    for n in range(1, 10):
        brute = [
            np.mean(
                [worth[i][max(chosen, key=lambda k: proxy[i][k])] for chosen in itertools.combinations(range(9), n)]
            )
            for i in range(3)
        ]
        assert best_of_n.expected(worth, proxy, n) == pytest.approx(brute, abs=1e-10)
    assert best_of_n.expected(worth, proxy, 9) == pytest.approx(
        [w[p.argmax()] for w, p in zip(worth, proxy, strict=True)]
    )
    with pytest.raises(ValueError, match="best of 10"):
        best_of_n.expected(worth, proxy, 10)


@pytest.mark.parametrize("n, nats", [(1, 0.0), (4, 0.636), (16, 1.835), (128, 3.860)])
def test_kl_of_best_of_n(n, nats):
    assert best_of_n.kl(n) == pytest.approx(nats, abs=1e-3)


def test_each_token_is_drawn_as_often_as_it_is_likely():
    """Of N evenly spaced numbers a token takes N times its probability, rounded up or down; control: other logits."""
    count, logits = 5000, 2 * torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = torch.bincount(draw_tokens(logits.expand(count, -1), numbers), minlength=300)
    off = [(drawn - count * torch.softmax(values[0].double(), dim=0)).abs().max() for values in (logits, 1.1 * logits)]
    assert off[0] < 1.01 and off[1] > 10


def test_the_first_and_the_last_number_draw_tokens_that_can_be_drawn():
    """Of 151,936 tokens, the first and the last hundred are impossible; control: float32 sums, which another processor
    rounds otherwise, miss the last one for some logits."""

    def some_logits(seed: int) -> torch.Tensor:
        logits = torch.randn(151_936, generator=torch.Generator().manual_seed(seed))
        logits[:100] = logits[-100:] = -torch.inf
        logits[70_000:80_000] = -80  # possible by its logit, of no unit
        return logits

    logits = some_logits(0)
    numbers = torch.tensor([0, 1 - 2.0**-53, *torch.linspace(0.4, 0.6, 6, dtype=torch.float64)], dtype=torch.float64)
    first, last, *others = draw_tokens(logits.expand(8, -1), numbers).tolist()
    assert (first, last) == (100, 151_835)
    assert all(logits[token] > -80 for token in others)
    sums = [torch.softmax(some_logits(seed), dim=-1).cumsum(dim=-1) for seed in range(16)]
    assert {int(torch.searchsorted(of_one, 1 - 2.0**-24, right=True)) for of_one in sums} != {151_835}


def test_logits_that_are_no_numbers_draw_a_token():
    """So that the check of the losses, not an index error, tells of them."""
    drawn = draw_tokens(torch.full((2, 5), torch.nan), torch.tensor([0.0, 0.9], dtype=torch.float64))
    assert ((drawn >= 0) & (drawn < 5)).all()
