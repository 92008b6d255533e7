"""Identities of RoPE, position interpolation, wrapped positions and ALiBi, by transformers' own layers.

Sources: RoPE, Su et al. 2021 (arXiv 2104.09864); position interpolation, Chen et al. 2023 (arXiv 2306.15595); ALiBi,
Press et al. 2021 (arXiv 2108.12409).
"""

import math

import torch
from torch import Tensor
from transformers import BloomConfig, BloomModel, LlamaConfig, LlamaModel, MptConfig, MptModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from posttrain.identities.small import Identity, largest
from posttrain.models import positions

WIDTH, BASE, CONTEXT, FACTOR = 128, 10000.0, 2048, 4.0  # of LLaMA's heads and of 2306.15595
PAIRS, SCORES = 64, 16  # random queries, each with a key; random scores as functions of the distance
HEADS, LENGTH = 16, 32


def rotary(method: str = "none") -> LlamaRotaryEmbedding:
    """Llama's rotations for heads of WIDTH, with the positions that a method of `longctx` gives a model."""
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8,
        max_position_embeddings=CONTEXT, rope_parameters={"rope_theta": BASE},
    )  # fmt: skip
    positions.rescale(config, method, FACTOR)
    model = LlamaModel(config)
    positions.read_modulo(model)
    return model.rotary_emb


def turned(layer: LlamaRotaryEmbedding, states: Tensor, place: float) -> Tensor:
    """States, N x WIDTH, at one position."""
    states = states[None, None]
    cos, sin = layer(states, torch.full((1, states.shape[2]), float(place)))
    return apply_rotary_pos_emb(states, states, cos, sin)[0][0, 0]


def scores(layer: LlamaRotaryEmbedding, unit: tuple[Tensor, Tensor], query: float, key: float) -> Tensor:
    """Products of PAIRS unit queries and keys at two positions."""
    return (turned(layer, unit[0], query) * turned(layer, unit[1], key)).sum(dim=-1)


def unit_pairs() -> tuple[Tensor, Tensor]:
    """Random queries and keys of length 1, each PAIRS x WIDTH."""
    first, second = torch.nn.functional.normalize(torch.randn(2, PAIRS, WIDTH), dim=-1)
    return first, second


def rope_relative() -> Identity:
    """score(m, n) = score(m + k, n + k) (2104.09864, eq. 16). Control: only the query is moved by k."""
    layer, unit = rotary(), unit_pairs()
    score = scores(layer, unit, 70, 40)
    return largest(scores(layer, unit, 570, 540), score), largest(scores(layer, unit, 570, 40), score)


def rope_norm() -> Identity:
    """A rotation keeps the norm (2104.09864, section 3.2.2). Control: YaRN's, whose temperature scales it."""
    states = unit_pairs()[0]
    plain, scaled = (turned(rotary(method), states, 777).norm(dim=-1) for method in ("none", "yarn"))
    return largest(plain, 1.0), largest(scaled, 1.0)


def pi_positions() -> Identity:
    """f'(x, m) = f(x, m L / L'): interpolation by s reads position s p as the base reads p (2306.15595, eq. 4).
    Control: the base at s p."""
    states, place = unit_pairs()[0], 300
    base, stretched = rotary(), rotary("linear")
    expected = turned(base, states, place)
    there = FACTOR * place
    return largest(turned(stretched, states, there), expected), largest(turned(base, states, there), expected)


def pi_bound() -> Identity:
    """The largest share of its bound that the interpolation error of random scores has; theorem: at most 1.

    |a(s) - a_linear(s)| <= d max_j |h_j| (s - s1)(s2 - s) / (8 ln c), with a(s) = Re sum_j h_j e^(i s theta_j) between
    the positions s1 and s2 = s1 + 1 (2306.15595, theorem 2.1). Control: the score at the position that is not
    interpolated, s FACTOR, beyond the context, held to the same bound.
    """
    waves = torch.randn(SCORES, WIDTH // 2, dtype=torch.complex128)
    frequencies = rotary().inv_freq.double()

    def score(place: Tensor) -> Tensor:
        return (waves[:, None] * torch.polar(torch.ones(()).double(), place[:, None] * frequencies)).sum(-1).real

    first = torch.arange(CONTEXT // FACTOR, CONTEXT, dtype=torch.float64)
    share = torch.rand(len(first), dtype=torch.float64).clamp(0.1, 0.9)
    straight = (1 - share) * score(first) + share * score(first + 1)
    bound = WIDTH * waves.abs().max(dim=1).values[:, None] * share * (1 - share) / (8 * math.log(BASE))
    inside, outside = ((score(place) - straight).abs() / bound for place in (first + share, FACTOR * (first + share)))
    return inside.max().item(), outside.max().item()


def pi_advantage() -> Identity:
    """How many times smaller the bound of interpolated scores is than that of extrapolated ones.

    2 B(s) / (d g^2 / (32 ln c)) for positions g = 1 apart, B(s) = sum_k |sum_(j < k) e^(i s theta_j)|, least over s
    beyond the context; with B(s) >= d it is over 2 x 294.73, about 600 (2306.15595, section 2.3). Control:
    positions 8 apart.
    """
    place = torch.arange(CONTEXT, 2 * CONTEXT, dtype=torch.float64)
    waves = torch.polar(torch.ones(()).double(), place[:, None] * rotary().inv_freq.double())
    extrapolated = 2 * waves.cumsum(dim=-1).abs().sum(dim=-1).min().item()

    def interpolated(apart: int) -> float:
        return WIDTH * apart**2 / (32 * math.log(BASE))

    return extrapolated / interpolated(1), extrapolated / interpolated(8)


def wrapped_positions() -> Identity:
    """How far `position_ids % L`, the method modulo of `longctx`, moves the score of tokens L + 1 and L - 1.

    Their distance is 2, and it reads them as 1 and L - 1; queries and keys have length 1. Control: positions as they
    are, whose score depends on the distance only.
    """
    unit, places = unit_pairs(), (CONTEXT + 1, CONTEXT - 1)
    expected = scores(rotary(), unit, 2, 0)
    wrapped, plain = (scores(rotary(method), unit, *places) for method in ("modulo", "none"))
    return largest(wrapped, expected), largest(plain, expected)


def alibi_biases() -> list[Tensor]:
    """What BLOOM and MPT add to the score of each key, HEADS x LENGTH."""
    bloom = BloomModel(BloomConfig(hidden_size=2 * HEADS, n_layer=1, n_head=HEADS, vocab_size=8))
    mpt = MptModel(MptConfig(d_model=2 * HEADS, n_layers=1, n_heads=HEADS, vocab_size=8))
    return [
        bloom.build_alibi_tensor(torch.ones(1, LENGTH), HEADS, torch.float32)[:, 0],
        mpt.build_mpt_alibi_tensor(HEADS, LENGTH)[:, 0],
    ]


def alibi_slopes() -> Identity:
    """Slopes m_i = 2^(-8 i / h), i = 1 ... h (2108.12409, section 3). Control: 2^(-4 i / h)."""
    heads = torch.arange(1, HEADS + 1)
    slopes = [bias[:, 1] - bias[:, 0] for bias in alibi_biases()]
    right, other = (2.0 ** (-power * heads / HEADS) for power in (8, 4))
    return max(largest(slope, right) for slope in slopes), min(largest(slope, other) for slope in slopes)


def alibi_penalties() -> list[Tensor]:
    """How far the bias of each key is below that of the query itself: heads x queries x keys, 0 for later keys."""
    seen = torch.ones(LENGTH, LENGTH).tril()
    return [(bias[:, :, None] - bias[:, None, :]) * seen for bias in alibi_biases()]


def alibi_distance() -> Identity:
    """The penalty of key j for query i is m (i - j) (2108.12409, section 3). Control: m (i - j)^2."""
    slope = 2.0 ** (-8 * torch.arange(1, HEADS + 1) / HEADS)
    place = torch.arange(LENGTH)
    distance = (place[:, None] - place).clamp(min=0)
    right, other = (slope[:, None, None] * distance**power for power in (1, 2))
    penalties = alibi_penalties()
    return max(largest(off, right) for off in penalties), min(largest(off, other) for off in penalties)


def alibi_shift() -> Identity:
    """Penalties stay where query and key move alike (2108.12409, section 3). Control: only the key moves."""
    penalties = alibi_penalties()
    both = max(largest(off[:, 1:, 1:], off[:, :-1, :-1]) for off in penalties)
    return both, min(largest(off[:, :, 1:], off[:, :, :-1]) for off in penalties)
