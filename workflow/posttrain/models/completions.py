"""Prompts with replies as padded batches, and their log-probabilities under a model.

A batch is `prompts` padded on the left and `replies` padded on the right, so that replies begin in one column.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.maths import likelihood


@dataclass
class Answers:
    """B answers: `prompts` B x P padded on the left, `replies` B x T padded on the right, each with its mask.

    A reply's mask covers its tokens up to and including the end of turn; `ended` (B): whether it has an end of turn.
    """

    prompts: Tensor
    prompt_mask: Tensor
    replies: Tensor
    mask: Tensor
    ended: Tensor

    def rows(self, which) -> "Answers":
        """Some of the answers, with unchanged padding."""
        return Answers(*(getattr(self, name)[which] for name in ("prompts", "prompt_mask", "replies", "mask", "ended")))

    def __len__(self) -> int:
        return len(self.replies)

    def by_length(self, parts: int) -> Iterator[tuple[list[int], "Answers"]]:
        """(numbers, answers) of parts of similar length; each part is padded to its longest only, to save time."""
        lengths = self.mask.sum(dim=1)
        for part in torch.tensor_split(lengths.argsort(stable=True), parts):
            if len(part):
                some, longest = self.rows(part), int(lengths[part].max())
                trimmed = replace(some, replies=some.replies[:, :longest], mask=some.mask[:, :longest])
                yield part.tolist(), trimmed


def answers_of(tokenizer, prompts: list[list[int]], replies: list[list[int]], device) -> Answers:
    """A batch of given token ids: prompts, each with its reply."""
    pad = tokenizer.pad_token_id
    width, length = max(map(len, prompts)), max(map(len, replies))
    rows = [[pad] * (width - len(p)) + p + r + [pad] * (length - len(r)) for p, r in zip(prompts, replies, strict=True)]
    ids = torch.tensor(rows, device=device)
    prompt_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in replies], device=device)
    return cut_after_turn(ids[:, :width], prompt_mask, ids[:, width:], tokenizer, ends=mask)


def cut_after_turn(
    prompts: Tensor, prompt_mask: Tensor, replies: Tensor, tokenizer, ends: Tensor | None = None
) -> Answers:
    """Answers cut after their first end of turn; tokens after it become padding.

    ends: a mask of replies that may stop before an end of turn. All are trimmed to the longest.
    """
    is_end = replies == tokenizer.eos_token_id
    before = is_end.long().cumsum(dim=1) - is_end.long()  # ends of turn before each token
    mask = (before == 0).long() * (1 if ends is None else ends)
    longest = int(mask.sum(dim=1).max())
    replies = replies.masked_fill(mask == 0, tokenizer.pad_token_id)
    ended = (is_end * mask).any(dim=1)
    return Answers(prompts, prompt_mask, replies[:, :longest], mask[:, :longest], ended)


def inputs(model, answers: Answers) -> dict[str, Tensor]:
    """A model's inputs: prompt and reply in one row, with positions counted from the first token after padding."""
    mask = torch.cat([answers.prompt_mask, answers.mask], dim=1)
    arguments = {"input_ids": torch.cat([answers.prompts, answers.replies], dim=1), "attention_mask": mask}
    if "position_ids" in inspect.signature(causal(model).forward).parameters:
        arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return arguments


def causal(model):
    """The transformers model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def reply_logits(model, answers: Answers, temperature: float = 1.0) -> Tensor:
    """Logits / temperature of each reply token, B x T x V; those of the prompt are not computed."""
    count = answers.replies.shape[1] + 1
    logits = causal(model)(**inputs(model, answers), logits_to_keep=count, use_cache=False).logits
    return logits[:, -count:-1].float() / temperature


def log_probs(model, answers: Answers, temperature: float = 1.0) -> Tensor:
    """log pi of each reply token under the active adapter, B x T, 0 on padding."""
    return likelihood.log_probs(reply_logits(model, answers, temperature), answers.replies) * answers.mask


def hidden(model, answers: Answers) -> Tensor:
    """Last hidden states of prompt and reply, B x (P + T) x H, under the active adapter."""
    return causal(model).base_model(**inputs(model, answers), use_cache=False).last_hidden_state


def autocast(model, precision: str):
    """A context for forward passes in `float32`, or in `bfloat16` by autocast."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=torch.bfloat16)
