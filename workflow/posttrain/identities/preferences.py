"""Identities of DPO, KTO and reward models, by the trainers of the stages.

Sources: DPO, Rafailov et al. 2023 (arXiv 2305.18290); KTO, Ethayarajh et al. 2024 (arXiv 2402.01306); reward models,
Ouyang et al. 2022 (arXiv 2203.02155).
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import peft
import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, RewardConfig, RewardTrainer

from posttrain.config.sections import Dpo, Kto, Reward
from posttrain.identities import small
from posttrain.identities.small import Identity, largest
from posttrain.models import completions, referenced, reward_head
from posttrain.models.adapters import Foundation, Start
from posttrain.training import trainers
from posttrain.training.unpaired import UnpairedTrainer

BETA = 0.5
ROWS = 4


class Pair(NamedTuple):
    """A trainer of DPO, one pair, and the log-probability of either answer less that under the reference, in nats."""

    trainer: Any
    row: dict
    ratios: Tensor  # of the chosen answer and of the rejected one, with gradients

    def rewards(self) -> Tensor:
        """The implicit rewards beta log(pi / pi_ref) of both answers (2305.18290, section 4)."""
        return BETA * self.ratios.detach()

    def gradient(self, of: Tensor) -> Tensor:
        """The gradient of a number, over all trained weights."""
        weights = [weight for weight in self.trainer.model.parameters() if weight.requires_grad]
        return torch.cat([part.flatten() for part in torch.autograd.grad(of, weights, retain_graph=True)])

    def loss(self, row: dict | None = None) -> Tensor:
        """TRL's loss of the pair, or of a changed one."""
        return small.loss_of(self.trainer, [row or self.row])


def policy() -> peft.PeftModel:
    """A small Llama with a LoRA that is not 0."""
    model = peft.get_peft_model(small.llama(), peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    small.draw_b(model, std=0.02)
    return model


def trainer_of(kind: type, config: type, section: Dpo | Kto, model, rows: list[dict]):
    """The trainer of a stage, as `models/referenced.py` makes it, with rows to train on and to evaluate."""
    start = Start(Foundation(Path(), None, None), small.tokenizer(), model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = referenced.trainer_of(
            kind, config, section, start, (rows, rows), Path(folder), loss_type=section.loss
        )
    return small.quiet(trainer)


def settings() -> dict:
    """Settings of one step on ROWS rows."""
    return {"beta": BETA, "seed": 0, "steps": 1, "batch_size": ROWS, "max_length": 32}


def answer_logps(model, prompt: list[int], answers: list[list[int]]) -> Tensor:
    """Log-probabilities of answers to one prompt, summed over their tokens."""
    batch = completions.answers_of(small.tokenizer(), [prompt] * len(answers), answers, model.device)
    return completions.log_probs(model, batch).sum(dim=1).cpu()


def pair(apart: float = 1.0) -> Pair:
    """A pair whose policy is moved from its reference. apart: nats by which the chosen answer is more likely; the
    rejected one is less likely by 0.6 of that."""
    prompt, answers = small.tokens(5), [[*small.tokens(count), small.END] for count in (6, 3)]
    model = policy()
    logps = answer_logps(model, prompt, answers)
    names = ("chosen", "rejected")
    row = {"prompt_ids": prompt} | {f"{name}_ids": ids for name, ids in zip(names, answers, strict=True)}
    reference = (logps.detach() - apart * torch.tensor([1.0, -0.6])).tolist()
    row |= {f"ref_{name}_logps": logp for name, logp in zip(names, reference, strict=True)}
    trainer = trainer_of(DPOTrainer, DPOConfig, Dpo(**settings()), model, [row] * ROWS)
    return Pair(trainer, row, answer_logps(model, prompt, answers) - torch.tensor(reference))


def swapped(row: dict) -> dict:
    """A pair with the other answer as the chosen one."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {"_".join(other.get(word, word) for word in key.split("_")): value for key, value in row.items()}


def dpo_start() -> Identity:
    """The loss while policy and reference are equal: log 2 (2305.18290, eq. 7). Control: another reference."""
    return pair(apart=0.0).loss().item(), pair(apart=5.0).loss().item()


def dpo_loss() -> Identity:
    """TRL's loss is - log sigma(beta log(pi_w / ref_w) - beta log(pi_l / ref_l)) (2305.18290, eq. 7). Control: labels
    swapped."""
    one = pair()
    chosen, rejected = one.rewards()
    expected = -torch.nn.functional.logsigmoid(chosen - rejected)
    return largest(one.loss(), expected), largest(one.loss(swapped(one.row)), expected)


def dpo_sign() -> Identity:
    """Cosine between the step, against the loss's gradient, and the gradient of log pi(y_w) - log pi(y_l): 1, as in
    2305.18290, section 4. Control: labels swapped, as the paper's own eq. 21 has them: -1."""
    one = pair()
    rises = one.gradient(one.ratios[0] - one.ratios[1])
    step, other = (-one.gradient(loss) for loss in (one.loss(), one.loss(swapped(one.row))))
    cosine = torch.nn.functional.cosine_similarity
    return cosine(step, rises, dim=0).item(), cosine(other, rises, dim=0).item()


def dpo_weight() -> Identity:
    """|gradient| = beta sigma(r_l - r_w) |gradient of log pi(y_w) - log pi(y_l)| (2305.18290, section 4): deviation of
    sigma. Control: sigma(r_w - r_l)."""
    one = pair()
    chosen, rejected = one.rewards()
    weight = one.gradient(one.loss()).norm() / one.gradient(one.ratios[0] - one.ratios[1]).norm() / BETA
    return largest(weight, torch.sigmoid(rejected - chosen)), largest(weight, torch.sigmoid(chosen - rejected))


def dpo_reward() -> Identity:
    """The reward that TRL logs is beta log(pi / pi_ref) (2305.18290, section 4). Control: the same without beta."""
    one = pair()
    figures = one.trainer.evaluate()
    logged = torch.tensor([figures[f"eval_rewards/{name}"] for name in ("chosen", "rejected")])
    return largest(logged, one.rewards()), largest(logged, one.rewards() / BETA)


def kto_start() -> Identity:
    """The loss while policy and reference are equal, at weights 1: 1/2 (2402.01306, eq. 7). Control: another
    reference."""

    def loss(apart: float) -> float:
        model, rows = policy(), []
        for number in range(ROWS):
            prompt, answer = small.tokens(4), [*small.tokens(5), small.END]
            logp = answer_logps(model, prompt, [answer]).item() - apart
            rows.append({"prompt_ids": prompt, "completion_ids": answer, "label": number < 1, "ref_logps": logp})
        return trainer_of(UnpairedTrainer, KTOConfig, Kto(**settings()), model, rows).evaluate()["eval_loss"]

    return loss(0.0), loss(5.0)


def reward_trainer(rows: list[dict], model):
    """The trainer of `reward`, on pairs."""
    section = Reward(seed=0, steps=1, batch_size=len(rows), max_length=32)
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(**trainers.arguments(section, Path(folder)), max_length=32)
        pairs = datasets.Dataset.from_list(rows)
        return RewardTrainer(model=model, args=config, train_dataset=pairs, processing_class=small.tokenizer())


def reward_pairs() -> tuple[Any, list[dict]]:
    """A trainer of a reward model, and its pairs."""
    rows = [{f"{name}_ids": small.tokens(count) for name in ("chosen", "rejected")} for count in (3, 5, 8, 4)]
    return reward_trainer(rows, small.classifier()), rows


def reward_loss() -> Identity:
    """TRL's loss is the mean of - log sigma(r_w - r_l) (2203.02155, eq. 1). Control: labels swapped."""
    trainer, rows = reward_pairs()
    with torch.no_grad():
        loss = small.loss_of(trainer, rows)
    chosen, rejected = (
        torch.tensor(reward_head.classify(trainer.model, small.tokenizer(), [row[f"{name}_ids"] for row in rows]))
        for name in ("chosen", "rejected")
    )
    right, other = (-torch.nn.functional.logsigmoid(sign * (chosen - rejected)).mean() for sign in (1, -1))
    return largest(loss, right), largest(loss, other)


def reward_shift() -> Identity:
    """A constant that is added to every score leaves the loss as it is (2203.02155, section 3.5). Control: with scores
    centred, as `reward.centering` does (2312.09244, eq. 2)."""
    trainer, rows = reward_pairs()

    @torch.no_grad()
    def loss(constant: float) -> Tensor:
        hook = trainer.model.score.register_forward_hook(lambda *call: call[-1] + constant)
        value = small.loss_of(trainer, rows)
        hook.remove()
        return value

    moved = largest(loss(3.0), loss(0.0))
    trainer.args.center_rewards_coefficient = 0.1
    return moved, largest(loss(3.0), loss(0.0))


def reward_padding() -> Identity:
    """The score of a text is the same alone and beside longer ones: largest difference. Control: a model that takes
    another token for padding, and reads the score there."""
    model, tokenizer = small.classifier(), small.tokenizer()
    texts = [[*small.tokens(count), small.END] for count in (3, 6, 12)]
    alone = torch.tensor([reward_head.classify(model, tokenizer, [text])[0] for text in texts])
    together = torch.tensor(reward_head.classify(model, tokenizer, texts))
    model.config.pad_token_id = small.END
    other = torch.tensor(reward_head.classify(model, tokenizer, texts))
    return largest(together, alone), largest(other, alone)
