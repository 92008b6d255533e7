"""Identities of 4-bit NormalFloat, by bitsandbytes as `models/quantization.py` configures it.

Source: Dettmers et al. 2023 (arXiv 2305.14314).
"""

import tempfile
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from posttrain.identities import small
from posttrain.identities.small import Identity
from posttrain.models import policy, quantization

WIDTH, BLOCK = 512, 64


def quantized_weight(double: bool) -> bitsandbytes.nn.Params4bit:
    """A linear weight, WIDTH x WIDTH, of a model in NF4. double: whether its constants are quantised too."""
    with tempfile.TemporaryDirectory() as folder:
        small.llama(hidden_size=WIDTH, num_hidden_layers=1).save_pretrained(folder)
        model = policy.load_model(Path(folder), quantization.settings("float32", double))
    return model.model.layers[0].self_attn.q_proj.weight


def normal_levels() -> Tensor:
    """The 16 levels by quantiles of the normal distribution: 8 from 0 down to -1, 9 from 0 up to 1, with one 0
    (2305.14314, section 3; the outermost quantile is that of the authors' code)."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    negative, positive = (quantile(torch.linspace(0.5, outermost, count).double()) for count in (8, 9))
    return torch.cat([-negative.flip(0), positive[1:]]) / quantile(torch.tensor(outermost).double())


def nf4_levels() -> Identity:
    """The levels of quantised weights are those rebuilt from normal quantiles: largest distance from one of either to
    the nearest of the other. Control: 16 equal steps from -1 to 1."""
    packed = quantized_weight(double=False)
    state = packed.quant_state
    weights = dequantize_4bit(packed.data, state).reshape(-1, BLOCK) / state.absmax[:, None]
    distinct = weights.unique().cpu()

    def apart(levels: Tensor) -> float:
        distances = (distinct[:, None] - levels).abs()
        return max(distances.amin(dim=0).max().item(), distances.amin(dim=1).max().item())

    return apart(normal_levels()), apart(torch.linspace(-1, 1, 16))


def bits_of_constants(packed: bitsandbytes.nn.Params4bit) -> float:
    """Bits for each weight that hold the scales of its blocks, and the scales of these."""
    state = packed.quant_state
    held = [state.absmax] + ([state.state2.absmax] if state.nested else [])
    return 8 * sum(tensor.nbytes for tensor in held) / state.shape.numel()


def nf4_constants() -> Identity:
    """32 bits for 64 weights: 0.5 bits a weight (2305.14314, section 3). Control: quantised constants."""
    return bits_of_constants(quantized_weight(double=False)), bits_of_constants(quantized_weight(double=True))


def nf4_double_constants() -> Identity:
    """8 / 64 + 32 / (64 x 256) = 0.127 bits a weight with double quantisation (2305.14314, section 3). Control: without
    it."""
    return bits_of_constants(quantized_weight(double=True)), bits_of_constants(quantized_weight(double=False))


def nf4_bits() -> Identity:
    """4 + 0.127 bits a weight, with double quantisation (2305.14314, section 3). Control: in bfloat16."""
    packed = quantized_weight(double=True)
    count = packed.quant_state.shape.numel()
    return 8 * packed.data.nbytes / count + bits_of_constants(packed), 8 * torch.bfloat16.itemsize


def error(weights: Tensor, kind: str, **settings) -> float:
    """Root mean square of what quantisation changes, divided by that of the weights."""
    packed, state = quantize_4bit(weights, quant_type=kind, **{"blocksize": BLOCK} | settings)
    return ((dequantize_4bit(packed, state) - weights).square().mean().sqrt() / weights.square().mean().sqrt()).item()


def nf4_error() -> Identity:
    """Error on normal weights, NF4's as a share of 4-bit floats': under 1 (2305.14314, section 4 and table 2). Control:
    weights of two sizes, 1 and 1/2, which 4-bit floats hold exactly but for rounding."""
    normal = torch.randn(2**18)
    sizes = torch.where(normal > 0, 1.0, 0.5) * (1 + 0.01 * torch.randn(2**18))
    ratios = [error(weights, "nf4") / error(weights, "fp4") for weights in (normal, sizes)]
    return ratios[0], ratios[1]


def nf4_double_error() -> Identity:
    """By what share double quantisation of the constants raises the error on normal weights: none that counts
    (2305.14314, section 3). Control: one constant for 4096 weights."""
    weights = torch.randn(2**18)
    plain = error(weights, "nf4")
    doubled, coarse = (error(weights, "nf4", **how) for how in ({"compress_statistics": True}, {"blocksize": 4096}))
    return doubled / plain - 1, coarse / plain - 1
