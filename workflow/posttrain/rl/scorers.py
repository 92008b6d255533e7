"""Scorers of a policy's answers: a reward model, or the user's own function."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from posttrain.config.sections import Grpo, RewardPart, Sampled
from posttrain.models import reward_head
from posttrain.models.adapters import Foundation
from posttrain.models.completions import Answers
from posttrain.models.reward_head import RewardModel
from posttrain.rl import answers, handwritten, verifiable
from posttrain.rl.referee import Referee

Scorer = Callable[[Answers, list[dict]], Tensor]  # B answers and the rows they answer -> B rewards


def of(section: Sampled, models, foundation: Foundation, reward: Path | None) -> Scorer:
    """The scorer of a stage: the reward model, or the user's function. reward: the model's manifest."""
    return by_model(model_of(models, foundation, reward)) if reward else by_function(section, models.tokenizer)


@contextlib.contextmanager
def of_parts(section: Grpo, models, foundation: Foundation, reward: Path | None) -> Iterator[Scorer]:
    """The scorer of a sum of terms (`section.rewards`); by default of the reward model or the user's function alone,
    which runs in a process of its own. reward: the model's manifest."""
    parts = section.rewards or [RewardPart(kind="model" if reward else "function")]
    kinds = {part.kind for part in parts}
    model = by_model(model_of(models, foundation, reward)) if reward and "model" in kinds else None
    referee = Referee(section, section.reward_seconds) if "function" in kinds else None

    def term(part: RewardPart, batch: Answers, rows: list[dict], replies: list[str]) -> Tensor:
        if part.kind == "model":
            assert model, "checked with the config"
            return model(batch, rows)
        if part.kind == "function":
            assert referee
            return torch.tensor(referee.scores(rows, replies))
        return torch.tensor(verifiable.scores(part, rows, replies))

    def score(batch: Answers, rows: list[dict]) -> Tensor:
        replies = answers.texts(models.tokenizer, batch)
        device = batch.replies.device
        return torch.stack([part.weight * term(part, batch, rows, replies).to(device) for part in parts]).sum(dim=0)

    try:
        yield score
    finally:
        if referee:
            referee.close()


def model_of(models, foundation: Foundation, reward: Path) -> RewardModel:
    """The reward model, as an adapter on the policy's frozen weights where it was trained on these."""
    return reward_head.load(reward, foundation, models.policy.model if models.policy.adapter else None)


def by_model(model: RewardModel) -> Scorer:
    """A scorer by a reward model."""

    def score(batch: Answers, rows: list[dict]) -> Tensor:
        with torch.no_grad(), model.network.active():
            return answers.scores(model.network.model, model.head, batch)

    return score


def by_function(section: Sampled, tokenizer) -> Scorer:
    """A scorer by the function of `section.reward_function`."""
    judge = handwritten.load_judge(section, "reward")
    assert judge, "without a reward model ppo has a function"

    def score(batch: Answers, rows: list[dict]) -> Tensor:
        return torch.tensor(judge.scores(rows, answers.texts(tokenizer, batch)), device=batch.replies.device)

    return score
