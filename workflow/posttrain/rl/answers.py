"""Sample a policy's answers in batches, and compute their values and rewards.

Each answer has its own random stream, so that it does not depend on its batch.
"""

import hashlib

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from posttrain.ground.errors import UserError
from posttrain.maths import rope
from posttrain.maths.sampling import draw_tokens
from posttrain.models import positions
from posttrain.models.completions import Answers, causal, cut_after_turn, hidden
from posttrain.training import parallel


class Sampler(LogitsProcessor):
    """Leaves of each answer's next-token scores only the token that is drawn from softmax(scores / temperature), for a
    greedy choice to take.

    numbers: B x T in [0, 1), one for each answer and token (`uniform_numbers`).
    """

    def __init__(self, numbers: Tensor, temperature: float):
        self.columns = iter(numbers.unbind(dim=1))
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = draw_tokens(scores.float() / self.temperature, next(self.columns))
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)


def uniform_numbers(seeds: list[int], longest: int) -> Tensor:
    """A row of `longest` numbers in [0, 1) for each random stream; a longer row begins with the same ones."""
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(longest, generator=stream, dtype=torch.float64) for stream in streams])


def draw(
    model,
    tokenizer,
    prompts: list[list[int]],
    seeds: list[int],
    longest: int,
    temperature: float,
    at_once: int | None = None,
    only: list[int] | None = None,
) -> Answers:
    """Answers of at most `longest` tokens, sampled from the model with its active adapter.

    prompts: token ids; seeds: those of the answers' random streams; at_once: most answers that are drawn together
    (default: all); only: the rows that this process samples, of those that all processes return.
    """
    device, pad = model.device, tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    mine = list(range(len(prompts))) if only is None else only
    replies = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    size = at_once or max(1, len(mine))
    for part in (mine[start : start + size] for start in range(0, len(mine), size)):
        numbers = uniform_numbers([seeds[n] for n in part], longest).to(device)
        replies[part] = sample(model, tokenizer, ids[part], mask[part], numbers, temperature)
    if only is not None:
        replies = parallel.summed(replies)
    return cut_after_turn(ids, mask, replies, tokenizer)


def replaced(batch: Answers, places: list[int], others: Answers, pad: int) -> Answers:
    """The answers with others at some places, all padded to one width. pad: the padding token."""
    pad_by = torch.nn.functional.pad
    before = max(batch.prompts.shape[1], others.prompts.shape[1])
    after = max(batch.replies.shape[1], others.replies.shape[1])

    def widened(some: Answers) -> Answers:
        left, right = (before - some.prompts.shape[1], 0), (0, after - some.replies.shape[1])
        prompts, replies = pad_by(some.prompts, left, value=pad), pad_by(some.replies, right, value=pad)
        return Answers(prompts, pad_by(some.prompt_mask, left), replies, pad_by(some.mask, right), some.ended)

    whole, new = widened(batch), widened(others)
    order = torch.arange(len(batch), device=whole.ended.device)
    order[places] = len(batch) + torch.arange(len(others), device=order.device)
    both = {name: torch.cat([getattr(whole, name), getattr(new, name)])[order] for name in vars(whole)}
    return Answers(**both)


def sample(model, tokenizer, ids: Tensor, mask: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """Replies, B x T, to the prompts `ids` (B x P, `mask` 0 on padding); numbers: B x T (`uniform_numbers`)."""
    longest, pad = numbers.shape[1], tokenizer.pad_token_id
    # A model's own generation_config.json (penalties, forbidden tokens) would change the distribution, so that the
    # log-probabilities would be those of another one.
    inner = causal(model)
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    replies = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            use_cache=True,
        ),
        logits_processor=LogitsProcessorList([Sampler(numbers, temperature)]),
    )[:, ids.shape[1] :]
    inner.generation_config = own
    return torch.nn.functional.pad(replies, (0, longest - replies.shape[1]), value=pad)


def values(model, head, answers: Answers) -> Tensor:
    """V(s_t), the value before each reply token is chosen, B x T, 0 on padding. head: H -> 1."""
    length = answers.replies.shape[1]
    states = hidden(model, answers)[:, -length - 1 : -1]
    return apply_head(head, states).squeeze(-1) * answers.mask


def scores(model, head, answers: Answers) -> Tensor:
    """A reward model's score of each answer: its head on the answer's last token. Returns B."""
    states = hidden(model, answers)
    last = answers.prompts.shape[1] + answers.mask.sum(dim=1) - 1
    return apply_head(head, states[torch.arange(len(answers)), last]).squeeze(-1)


def apply_head(head, states: Tensor) -> Tensor:
    """A scalar head, in float32 even under autocast: advantages are differences of values, and bfloat16 has 8 bits."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.float())


def stream(*name) -> int:
    """The seed (56 bits) of the random stream with a name; streams are independent of each other."""
    return int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:7], "big")


def refuse_long(model, rows: list[dict], longest: int) -> None:
    """Raise UserError where a prompt (`ids`) with an answer of `longest` tokens is longer than the model's context."""
    config = causal(model).config
    values = positions.values_of(config)
    context = rope.end(values) if rope.kind(values) == "alibi" else positions.contract(config, 0)["context"]
    most = max((len(row["ids"]) for row in rows), default=0)
    if context and most + longest > context:
        raise UserError(
            f"max_new_tokens {longest} and the longest prompt ({most} tokens) are over the model's context of {context}"
        )


def texts(tokenizer, answers: Answers) -> list[str]:
    """The replies as text, without special tokens."""
    rows = zip(answers.replies.tolist(), answers.mask.sum(dim=1).tolist(), strict=True)
    return [tokenizer.decode(reply[:length], skip_special_tokens=True) for reply, length in rows]
