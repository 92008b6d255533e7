"""Reward models on ranked lists: all pairs of a prompt's answers are one element of the batch.

Ouyang et al. 2022 (arXiv 2203.02155), section 3.5 and eq. 1: the loss of a prompt with K answers is the mean over its
pairs of -log sigmoid(r(better) - r(worse)), and each answer is computed once.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from trl import RewardTrainer

from posttrain.config.sections import Reward
from posttrain.training import parallel
from posttrain.training.order import Part


def elements(pairs: list[dict]) -> list[dict]:
    """Pairs of one place (`source`) as one element: `answers`, each once, the places of each pair in that list, and the
    `margins` of pairs that have one."""
    of_place: dict[str, list[dict]] = defaultdict(list)
    for pair in pairs:
        of_place[pair["source"]].append(pair)
    lists = []
    for listed in of_place.values():
        places: dict[tuple, int] = {}
        better, worse = (
            [places.setdefault(tuple(pair[side]), len(places)) for pair in listed]
            for side in ("chosen_ids", "rejected_ids")
        )
        margins = {"margins": [pair["margin"] for pair in listed]} if "margin" in listed[0] else {}
        lists.append({"answers": [list(ids) for ids in places], "better": better, "worse": worse} | margins)
    return lists


def parts(pairs: list[dict], of_pairs: Sequence[Part]) -> list[Part]:
    """The parts of a mixture counted in elements. of_pairs: counted in pairs."""
    counted, start = [], 0
    for part in of_pairs:
        places = {pair["source"] for pair in pairs[start : start + part.rows]}
        counted.append(part._replace(rows=len(places)))
        start += part.rows
    return counted


def fitting(section: Reward, lists: list[dict]) -> Reward:
    """The section with a micro-batch whose answers take the memory of the pairs for which it was planned."""
    answers = 2 * parallel.at_once(section, section.batch_size)
    most = max(len(element["answers"]) for element in lists)
    return section.model_copy(update={"micro_batch_size": max(1, answers // most)})


@dataclass
class Collator:
    """Elements as one padded batch: `input_ids` and `attention_mask` (answers x length); of each pair the places of its
    answers, `better` and `worse`, its `margin`, 0 where it has none, and its `weight`, equal for all elements and for
    all pairs of one; the sum is 1."""

    pad: int

    def __call__(self, batch: list[dict]) -> dict:
        answers = [torch.tensor(ids) for element in batch for ids in element["answers"]]
        better, worse, weight, margin, before = [], [], [], [], 0
        for element in batch:
            better += [before + place for place in element["better"]]
            worse += [before + place for place in element["worse"]]
            weight += [1 / len(element["better"]) / len(batch)] * len(element["better"])
            margin += element.get("margins", [0.0] * len(element["better"]))
            before += len(element["answers"])
        return {
            "input_ids": pad_sequence(answers, batch_first=True, padding_value=self.pad),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in answers], batch_first=True),
            "better": torch.tensor(better),
            "worse": torch.tensor(worse),
            "weight": torch.tensor(weight),
            "margin": torch.tensor(margin),
        }


class RankingTrainer(RewardTrainer):
    """TRL's trainer with the loss of ranked lists; with two answers each, it is TRL's own."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.figures: dict[bool, list] = {True: [], False: []}  # while it trains or not: accuracy and margin of a batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch of `Collator`."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        rewards = outputs.logits.squeeze(-1)
        better, worse, weight = rewards[inputs["better"]], rewards[inputs["worse"]], inputs["weight"]
        losses = -logsigmoid(better - worse - inputs["margin"])
        if self.args.center_rewards_coefficient is not None:
            losses = losses + self.args.center_rewards_coefficient * (better + worse) ** 2
        figures = torch.stack([(weight * (better > worse)).sum(), (weight * (better - worse)).sum()]).detach()
        self.figures[self.model.training].append(self.accelerator.reduce(figures, "mean").tolist())
        loss = (weight * losses).sum()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean accuracy and margin of the batches since the last log, as TRL does."""
        prefix, figures = "" if self.model.training else "eval_", self.figures[self.model.training]
        means = [sum(values) / len(values) for values in zip(*figures, strict=True)]
        figures.clear()
        super().log(logs | dict(zip((f"{prefix}accuracy", f"{prefix}margin"), means, strict=False)), start_time)
