"""GRPO and RLOO: their mathematics by hand and beside TRL, rewards that a program checks, the process that scores."""

import math
from types import SimpleNamespace

import pytest
import torch

from posttrain.config.sections import Grpo, RewardPart
from posttrain.ground.errors import UserError
from posttrain.maths import grpo
from posttrain.rl import verifiable
from posttrain.rl.referee import Referee
from posttrain.stages import grpo as stage

REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 0.0, 1.0, 2.0, 3.0])


def test_advantages_by_hand():
    by_mean = grpo.advantages(REWARDS, 4)
    assert by_mean[:4].tolist() == [0.75, -0.25, -0.25, -0.25] and not by_mean[4:8].any(), "equal rewards teach nothing"
    others = grpo.advantages(REWARDS, 4, leave_one_out=True)
    assert others[0] == 1.0 and others[1] == pytest.approx(-1 / 3) and others[9] == pytest.approx(1 - 5 / 3)
    scaled = grpo.advantages(REWARDS, 4, scale=True)
    assert scaled[8:].tolist() == pytest.approx([x / (math.sqrt(5 / 3) + 1e-4) for x in (-1.5, -0.5, 0.5, 1.5)])
    assert not scaled[4:8].any() and grpo.equal(REWARDS, 4).tolist() == [False, True, False]
    third = torch.full((3,), 0.9)
    assert third.mean() != third[0] and not grpo.advantages(third, 3, scale=True).any(), (
        "equal, though their mean is rounded"
    )


def test_leave_one_out_is_unbiased_and_the_group_mean_is_not():
    """E[(r - b) d log pi] over all groups of two answers, each drawn from pi, against d E[r]. The mean with the answer
    itself is (G - 1) / G of it."""
    theta = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 3.0])
    policy = torch.softmax(theta, 0)
    (true,) = torch.autograd.grad((policy * rewards).sum(), theta)
    sums = {}
    for leave_one_out in (True, False):
        total = torch.zeros(3)
        for first in range(3):
            for second in range(3):
                gains = grpo.advantages(rewards[[first, second]], 2, leave_one_out)
                logp = torch.log_softmax(theta, 0)[[first, second]]
                (slope,) = torch.autograd.grad((gains * logp).mean(), theta)
                total += (policy[first] * policy[second]).detach() * slope
        sums[leave_one_out] = total
    assert torch.allclose(sums[True], true, atol=1e-6)
    assert torch.allclose(sums[False], true / 2, atol=1e-6) and not torch.allclose(sums[False], true, atol=1e-3)


@pytest.mark.parametrize("average, scale, theirs", [
    ("answers", True, ("grpo", "group")), ("longest", False, ("dr_grpo", "none")), ("tokens", False, ("dapo", "none")),
])  # fmt: skip
def test_the_loss_is_trls(average, scale, theirs):
    """Of TRL's GRPOTrainer, on the same tensors, with its formulas of `loss_type` and `scale_rewards` written out."""
    torch.manual_seed(0)
    logp, old = torch.randn(12, 5) * 0.3 - 1, torch.randn(12, 5) * 0.3 - 1
    mask = (torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5, 5, 3, 2, 4, 1, 5])[:, None]).float()
    advantages = grpo.advantages(REWARDS, 4, scale=scale)
    ratio = grpo.log_ratio(logp, old, mask, sequence=False)
    weights = grpo.token_weights(mask, average, longest=8)
    ours = (grpo.policy_loss(ratio, advantages, 0.2, 0.28) * weights).sum()
    grouped = REWARDS.view(-1, 4)
    centred = REWARDS - grouped.mean(1).repeat_interleave(4)
    gains = centred / (grouped.std(1).repeat_interleave(4) + 1e-4) if theirs[1] == "group" else centred
    coefficients = torch.exp(logp - old)
    clipped = torch.clamp(coefficients, 1 - 0.2, 1 + 0.28)
    losses = -torch.min(coefficients * gains[:, None], clipped * gains[:, None])
    expected = {
        "grpo": ((losses * mask).sum(-1) / mask.sum(-1)).mean(),
        "dr_grpo": (losses * mask).sum() / (12 * 8),
        "dapo": (losses * mask).sum() / mask.sum(),
    }
    assert torch.allclose(ours, expected[theirs[0]], atol=1e-6)
    assert all(not torch.allclose(ours, value, atol=1e-4) for name, value in expected.items() if name != theirs[0])


def test_a_ratio_of_the_whole_answer():
    logp = torch.tensor([[0.1, 0.3, 9.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    ratio = grpo.log_ratio(logp, torch.zeros(1, 3), mask, sequence=True)
    assert ratio[0].tolist() == pytest.approx([0.2] * 3)
    loss = (grpo.policy_loss(ratio, torch.tensor([1.0]), 0.5, 0.5) * grpo.token_weights(mask, "answers", 3)).sum()
    (slope,) = torch.autograd.grad(loss, logp)
    assert slope[0].tolist() == pytest.approx([-math.exp(0.2) / 2, -math.exp(0.2) / 2, 0.0])


def test_answers_that_are_left_out_do_not_count():
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    for average in ("answers", "tokens"):
        assert grpo.token_weights(mask, average, 2).sum() == pytest.approx(1.0)
    assert grpo.token_weights(mask, "answers", 2)[0].tolist() == [0.25, 0.25]
    assert not grpo.token_weights(torch.zeros(2, 2), "answers", 2).any()


@pytest.mark.parametrize("part, right, wrong", [
    ({"kind": "exact"}, [("so it is 1,234.", "#### 1234"), ("7 and then -3", "-3"), ("2.50", "2.5")],
     [("1234 or 5", "1234"), ("none", "3"), ("3", None), ("12", "no number")]),
    ({"kind": "exact", "answer": "text"}, [("The red  Fox!", "red fox")],
     [("red foxes", "red fox"), ("", ""), ("x", None)]),
    ({"kind": "exact", "pattern": r"####\s*(\S+)"}, [("so 7 #### 12, not 13", "12")],
     [("12", "12"), ("#### 13", "12")]),
    ({"kind": "pattern", "pattern": r"^\d+$"}, [("12", None)], [("12 ", None), ("a", None)]),
    ({"kind": "tags", "tags": ["think", "answer"]}, [("<think>a\nb</think> <answer>3</answer>", None)],
     [("<answer>3</answer><think>a</think>", None), ("<think>a</think>", None),
      ("<think>a</think><think>b</think><answer>3</answer>", None)]),
    ({"kind": "length", "words": 3}, [("a b c", None), ("", None)], [("a b c d", None)]),
])  # fmt: skip
def test_rewards_that_a_program_checks(part, right, wrong):
    holds = verifiable.check(RewardPart(**part))
    assert all(holds(*pair) for pair in right)
    assert not any(holds(*pair) for pair in wrong)


ROW = {"id": "row-7", "prompt": "p", "answer": "a"}
FUNCTION = """
import os, time
def judge(prompt, reply, answer):
    if reply == "hang":
        time.sleep(60)
    if reply == "die":
        os._exit(3)
    if reply == "raise":
        raise RuntimeError("no")
    return {"nan": float("nan"), "text": "many", "none": None, "number": "7"}.get(reply, len(reply))
"""


def test_a_reward_that_fails_costs_its_answer_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTION)
    referee = Referee(Grpo(reward_function="mine.py:judge"), seconds=3.0)
    try:
        replies = ["abc", "raise", "nan", "text", "die", "hang", "abcd", "none", "number"]
        assert referee.scores([ROW] * len(replies), replies) == [3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0, 0.0, 7.0]
        assert referee.failures == 6
    finally:
        referee.close()
    printed = capsys.readouterr().err
    assert printed.endswith("reward_function gave no score for 6 of 9 answers: 0 each\n")
    assert "reward_function raised RuntimeError: no for the row row-7, reply 'raise': counts as 0" in printed
    assert printed.count("counts as 0") == 3, "the others are counted"
    referee = Referee(Grpo(reward_function="mine.py:judge"), seconds=3.0)
    with pytest.raises(UserError, match=r"raised RuntimeError: no for the row row-7, .* as for all 32 answers so far"):
        referee.scores([ROW] * 40, ["raise"] * 40)
    referee.close()
    with pytest.raises(UserError, match="cannot be loaded"):
        Referee(SimpleNamespace(reward_function="mine.py:nosuch", reward_code=None), seconds=1.0)


def test_a_pattern_that_takes_too_long_costs_its_reply_alone(monkeypatch, capsys):
    """A search whose time is exponential in the reply."""
    monkeypatch.setattr(verifiable, "SECONDS", 0.1)
    part = RewardPart(kind="pattern", pattern="^(a|aa)+$")
    assert verifiable.scores(part, [ROW] * 3, ["aaa", "a" * 60 + "!", "b"]) == [1.0, 0.0, 0.0]
    assert "took over 0.1 s for 1 of 3 replies, the first to the row row-7, reply 'aaaa" in capsys.readouterr().err


def test_exact_answers_need_answers(capsys):
    """Control: rows of which one has none are told, and trained on."""
    section = Grpo(rewards=[RewardPart(kind="exact")])
    rows = [{"id": "a", "answer": None}, {"id": "b", "answer": "Paris"}]
    with pytest.raises(UserError, match=r"rewards\[0\]: exact compares with a number .* none of 2 preference prompts"):
        stage.refuse_unanswered(section, rows)
    stage.refuse_unanswered(section, [*rows, {"id": "c", "answer": "so #### 1,000"}])
    assert "2 of 3 prompts, first a, have none: 0" in capsys.readouterr().err
    stage.refuse_unanswered(Grpo(rewards=[RewardPart(kind="length", words=3)]), rows)
