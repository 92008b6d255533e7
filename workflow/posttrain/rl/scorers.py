"""Scorers of a policy's answers: a reward model, or the user's own function."""

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain.config.sections import Ppo
from posttrain.models.completions import Answers
from posttrain.models.reward_head import RewardModel
from posttrain.rl import answers, handwritten

Scorer = Callable[[Answers, list[dict]], Tensor]  # B answers and the rows they answer -> B rewards


def by_model(model: RewardModel) -> Scorer:
    """A scorer by a reward model."""

    def score(batch: Answers, rows: list[dict]) -> Tensor:
        with torch.no_grad(), model.network.active():
            return answers.scores(model.network.model, model.head, batch)

    return score


def by_function(section: Ppo, tokenizer) -> Scorer:
    """A scorer by the function of `section.reward_function`."""
    judge = handwritten.load_judge(section, "reward")
    assert judge, "without a reward model ppo has a function"

    def score(batch: Answers, rows: list[dict]) -> Tensor:
        return torch.tensor(judge.scores(rows, answers.texts(tokenizer, batch)), device=batch.replies.device)

    return score
