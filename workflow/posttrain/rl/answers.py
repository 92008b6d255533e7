"""A policy's own answers: drawn in batches, and their log-probabilities, values and rewards under any adapter.

A batch of answers is `prompts` padded on the left and `replies` padded on the right, so that answers begin in one
column. Each answer has a random stream of its own: what is drawn does not depend on the batch it is drawn in.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from posttrain.ground.errors import UserError
from posttrain.maths import likelihood
from posttrain.training import parallel


@dataclass
class Answers:
    """B answers: `prompts` B x P padded on the left, `replies` B x T padded on the right, each with its mask.

    A reply's mask covers its tokens up to and with the end of turn; `ended` (B) says whether it has one.
    """

    prompts: Tensor
    prompt_mask: Tensor
    replies: Tensor
    mask: Tensor
    ended: Tensor

    def rows(self, which) -> "Answers":
        """Some of the answers, padded as they all are."""
        return Answers(*(getattr(self, name)[which] for name in ("prompts", "prompt_mask", "replies", "mask", "ended")))

    def __len__(self) -> int:
        return len(self.replies)

    def by_length(self, parts: int) -> Iterator[tuple[list[int], "Answers"]]:
        """Rows of similar length with their numbers, each part padded to its own longest: less to compute."""
        lengths = self.mask.sum(dim=1)
        for part in torch.tensor_split(lengths.argsort(stable=True), parts):
            if len(part):
                some, longest = self.rows(part), int(lengths[part].max())
                trimmed = replace(some, replies=some.replies[:, :longest], mask=some.mask[:, :longest])
                yield part.tolist(), trimmed


class Gumbel(LogitsProcessor):
    """Makes a greedy choice a draw from softmax(logits / temperature): the Gumbel-max trick (Maddison et al. 2014).

    A token's noise comes from the answer's own stream: `seeds`, one number for each answer.
    """

    def __init__(self, seeds: list[int], temperature: float):
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        size = scores.shape[-1]
        noise = torch.stack([torch.empty(size).exponential_(generator=stream) for stream in self.streams])
        return scores.float() / self.temperature - noise.clamp(min=1e-30).log().to(scores.device)


def draw(
    model, tokenizer, prompts: list[list[int]], seeds: list[int], longest: int, temperature: float, only=None
) -> Answers:
    """Answers of at most `longest` tokens to prompts (token ids), by the model as it stands.

    seeds: the random stream of each answer. only: the rows that this process draws; all processes then hold all.
    """
    device, pad, end = model.device, tokenizer.pad_token_id, tokenizer.eos_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    mine = list(range(len(prompts))) if only is None else only
    replies = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    # What a published model's generation_config.json sets (penalties, forbidden tokens) would draw from another
    # distribution than the one that log-probabilities are taken of.
    causal(model).generation_config = GenerationConfig()
    if mine:
        drawn = model.generate(
            input_ids=ids[mine],
            attention_mask=mask[mine],
            generation_config=GenerationConfig(
                max_new_tokens=longest, do_sample=False, pad_token_id=pad, eos_token_id=end, use_cache=True
            ),
            logits_processor=LogitsProcessorList([Gumbel([seeds[n] for n in mine], temperature)]),
        )[:, width:]
        replies[mine] = torch.nn.functional.pad(drawn, (0, longest - drawn.shape[1]), value=pad)
    if only is not None:
        replies = parallel.summed(replies)
    return finished(ids, mask, replies, tokenizer)


def finished(prompts: Tensor, prompt_mask: Tensor, replies: Tensor, tokenizer, ends: Tensor | None = None) -> Answers:
    """Answers cut after their first end of turn: what follows it is padding and never counts.

    ends: a mask of replies that may stop before it; all are trimmed to the longest.
    """
    is_end = replies == tokenizer.eos_token_id
    before = is_end.long().cumsum(dim=1) - is_end.long()  # ends of turn before each token
    mask = (before == 0).long() * (1 if ends is None else ends)
    longest = int(mask.sum(dim=1).max())
    replies = replies.masked_fill(mask == 0, tokenizer.pad_token_id)
    ended = (is_end * mask).any(dim=1)
    return Answers(prompts, prompt_mask, replies[:, :longest], mask[:, :longest], ended)


def given(tokenizer, prompts: list[list[int]], replies: list[list[int]], device) -> Answers:
    """Answers from token ids that are there already."""
    pad = tokenizer.pad_token_id
    width, length = max(map(len, prompts)), max(map(len, replies))
    rows = [[pad] * (width - len(p)) + p + r + [pad] * (length - len(r)) for p, r in zip(prompts, replies, strict=True)]
    ids = torch.tensor(rows, device=device)
    prompt_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in replies], device=device)
    return finished(ids[:, :width], prompt_mask, ids[:, width:], tokenizer, ends=mask)


def inputs(model, answers: Answers) -> dict[str, Tensor]:
    """What a model is called with: prompt and reply in one row, positions counted from the first real token."""
    mask = torch.cat([answers.prompt_mask, answers.mask], dim=1)
    called = {"input_ids": torch.cat([answers.prompts, answers.replies], dim=1), "attention_mask": mask}
    if "position_ids" in inspect.signature(causal(model).forward).parameters:
        called["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return called


def causal(model):
    """The transformers model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def reply_logits(model, answers: Answers, temperature: float = 1.0) -> Tensor:
    """Logits / temperature of each reply token, B x T x V; those of the prompt are never made."""
    kept = answers.replies.shape[1] + 1
    logits = causal(model)(**inputs(model, answers), logits_to_keep=kept, use_cache=False).logits
    return logits[:, -kept:-1].float() / temperature


def log_probs(model, answers: Answers, temperature: float = 1.0) -> Tensor:
    """log pi of each reply token under the active adapter, B x T, 0 on padding."""
    return likelihood.log_probs(reply_logits(model, answers, temperature), answers.replies) * answers.mask


def hidden(model, answers: Answers) -> Tensor:
    """Last hidden states of prompt and reply, B x (P + T) x H, under the active adapter."""
    return causal(model).base_model(**inputs(model, answers), use_cache=False).last_hidden_state


def values(model, head, answers: Answers) -> Tensor:
    """V(s_t), the value before each reply token is chosen, B x T, 0 on padding. head: H -> 1."""
    length = answers.replies.shape[1]
    states = hidden(model, answers)[:, -length - 1 : -1]
    return exact(head, states).squeeze(-1) * answers.mask


def scores(model, head, answers: Answers) -> Tensor:
    """A reward model's score of each answer: its head on the answer's last token. Returns B."""
    states = hidden(model, answers)
    last = answers.prompts.shape[1] + answers.mask.sum(dim=1) - 1
    return exact(head, states[torch.arange(len(answers)), last]).squeeze(-1)


def exact(head, states: Tensor) -> Tensor:
    """A scalar head in float32, under autocast too: bfloat16 has 8 bits, and advantages are differences of values."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.float())


def stream(*what) -> int:
    """A random stream by its name, 56 bits: nothing drawn depends on what was drawn before."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7], "big")


def refuse_long(model, rows: list[dict], longest: int) -> None:
    """Raise UserError where a prompt (`ids`) with an answer of `longest` tokens is over the model's context."""
    context = getattr(causal(model).config, "max_position_embeddings", None)  # ALiBi has none
    most = max((len(row["ids"]) for row in rows), default=0)
    if context and most + longest > context:
        raise UserError(
            f"max_new_tokens {longest} and the longest prompt ({most} tokens) are over the model's context of {context}"
        )


def autocast(model, precision: str):
    """Arithmetic of a forward pass: `float32`, or `bfloat16` by autocast."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def adapter(model, name: str | None):
    """Have one adapter active and trained; `None` switches all of them off."""
    if name is None:
        with model.disable_adapter():
            yield model
    else:
        model.set_adapter(name)
        yield model


def texts(tokenizer, answers: Answers) -> list[str]:
    """The replies as text, without special tokens."""
    rows = zip(answers.replies.tolist(), answers.mask.sum(dim=1).tolist(), strict=True)
    return [tokenizer.decode(reply[:length], skip_special_tokens=True) for reply, length in rows]
