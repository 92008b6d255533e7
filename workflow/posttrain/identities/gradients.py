"""Identities of the gradient of one optimiser step, by transformers' trainer with the arguments of the stages."""

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from posttrain.config.sections import Sft
from posttrain.identities import small
from posttrain.identities.small import Identity, largest
from posttrain.training import trainers

LENGTHS = (3, 21, 6, 12)  # tokens of each row


class Kept(TrainerCallback):
    """Keeps the gradient of the first optimiser step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()]).cpu()


def of_step(model, rows: list[dict], micro: int) -> Tensor:
    """The gradient of one step on all rows, in micro-batches of `micro` rows, over all weights."""
    section = Sft(method="full", seed=0, steps=1, batch_size=len(rows), micro_batch_size=micro, max_grad_norm=1e9)
    kept = Kept()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=copy.deepcopy(model), args=TrainingArguments(**trainers.arguments(section, Path(folder))),
            train_dataset=rows, data_collator=padded, callbacks=[kept],
        )  # fmt: skip
        small.quiet(trainer).train()
    return kept.gradient


def padded(batch: list[dict]) -> dict[str, Tensor]:
    """Rows of tokens as a batch, padded on the right."""
    rows = [torch.tensor(row["input_ids"]) for row in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=small.PAD)
    mask = (ids != small.PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradient_accumulation() -> Identity:
    """The gradient of a batch is that of its micro-batches, whose rows have other numbers of tokens: largest
    difference, as a share of the largest gradient. Control: the mean of the gradients of each row's mean loss."""
    model, rows = small.llama(), [{"input_ids": small.tokens(count)} for count in LENGTHS]
    whole = of_step(model, rows, micro=len(rows))
    split = of_step(model, rows, micro=1)
    mean = sum(model(**padded([row])).loss for row in rows) / len(rows)
    means = torch.cat([part.flatten() for part in torch.autograd.grad(mean, list(model.parameters()))])
    return largest(split, whole) / largest(whole), largest(means, whole) / largest(whole)
