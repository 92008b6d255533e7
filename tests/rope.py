"""The mathematics of positions as the papers have it, to which transformers' own is held: RoPE, its rescalings, ALiBi.

Shapes: a head is `width` wide and turns in width / 2 planes; T positions. Angles are in radians.

Sources: RoPE, Su et al. 2021 (arXiv 2104.09864); position interpolation, Chen et al. 2023 (arXiv 2306.15595); dynamic
NTK and YaRN, Peng et al. 2023 (arXiv 2309.00071); ALiBi, Press et al. 2021 (arXiv 2108.12409).
"""

import math

import torch
from torch import Tensor


def frequencies(width: int, theta: float) -> Tensor:
    """theta_j = theta^(-2 j / width), radians a token (2104.09864, eq. 15). Returns width / 2."""
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)


def rotate(states: Tensor, positions: Tensor, freqs: Tensor) -> Tensor:
    """Turn each plane (x_j, x_(j + width/2)) by position x frequency (2104.09864, eq. 34; Llama's order of planes).

    states ... x T x width, positions T (any real numbers), freqs width / 2; returns the shape of states.
    """
    angles = positions.float()[:, None] * freqs
    cos, sin = angles.cos(), angles.sin()
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def interpolated(freqs: Tensor, factor: float) -> Tensor:
    """Frequencies that read position m as m / factor (2306.15595, eq. 4): f'(x, m) = f(x, m L / L')."""
    return freqs / factor


def dynamic_ntk(width: int, theta: float, factor: float, context: int, length: int) -> Tensor:
    """Frequencies of a larger base for a text of `length` tokens over `context`, the trained length; within it, RoPE's
    own (2309.00071, appendix B.1 and B.2, with s = factor length / context - (factor - 1))."""
    scale = factor * max(length, context) / context - (factor - 1)
    return frequencies(width, theta * scale ** (width / (width - 2)))


def yarn(width: int, theta: float, factor: float, context: int, fast: float = 32.0, slow: float = 1.0) -> Tensor:
    """NTK-by-parts: planes that turn more than `fast` times in the trained context stay, those that turn less than
    `slow` times are interpolated, a linear ramp between (2309.00071, eq. 17 to 20; the ramp is over planes, as in the
    authors' code, its ends rounded outwards)."""

    def plane(turns: float) -> float:
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(plane(fast)), 0), min(math.ceil(plane(slow)), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    trained = frequencies(width, theta)
    return trained * (1 - ramp) + interpolated(trained, factor) * ramp


def yarn_temperature(factor: float) -> float:
    """sqrt(1 / t) = 0.1 ln(factor) + 1, by which queries and keys are multiplied (2309.00071, eq. 22)."""
    return 0.1 * math.log(factor) + 1.0


def alibi_slopes(heads: int) -> Tensor:
    """m_i = 2^(-8 i / heads), i = 1 ... heads, for a power of two (2108.12409, section 3). Returns heads."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


def alibi_bias(slopes: Tensor, length: int) -> Tensor:
    """- m (i - j), added to the score of query i and key j <= i (2108.12409, section 3). Returns heads x T x T."""
    place = torch.arange(length)
    return -slopes[:, None, None] * (place[:, None] - place[None, :]).clamp(min=0)
