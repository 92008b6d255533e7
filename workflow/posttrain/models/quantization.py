"""Linear weights in 4-bit NormalFloat or 4-bit floats (Dettmers et al., arXiv 2305.14314), and back in float32."""

import copy
import re
from collections import Counter
from typing import Any, NamedTuple

from posttrain.ground.errors import UserError
from posttrain.ground.progress import say

LAYER = r"\.\d+\."  # in the name of a weight: the number of its layer
SMALL = 0.01  # share of the linear weights that may stay as they are without a word: the routers of a mixture


def configuration(contract: dict, skipped: list[str] | None = None):
    """bitsandbytes' configuration for 4 bits. contract: its `settings`.

    skipped: layers that are not quantised; None for transformers' own choice, the output embedding.
    """
    import torch
    from transformers import BitsAndBytesConfig

    from posttrain.training import parallel

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=contract["type"],
        bnb_4bit_use_double_quant=contract["double_quantization"],
        bnb_4bit_compute_dtype=getattr(torch, contract["compute"]),
        # The same bytes under another type: FSDP cannot shard integers.
        bnb_4bit_quant_storage=torch.float32 if parallel.sharded else torch.uint8,
        llm_int8_skip_modules=skipped,  # despite its name, for 4 bits too
    )


def settings(compute: str, double: bool = True, kind: str = "nf4") -> dict:
    """The quantisation to 4 bits as in a contract. compute: type of the arithmetic on the dequantised weights; double:
    whether the constants are quantised too; kind: `nf4`, NormalFloat, or `fp4`, floats."""
    return {"type": kind, "double_quantization": double, "compute": compute}


def finish(model) -> None:
    """Complete what transformers quantised: linear layers of a class of their own, and weights that stay in 4 bits.

    Raises UserError where no linear weight of the model can be quantised; says which part stays as it is.
    """
    quantize_own_classes(model)
    keep_quantized_weights(model)
    held = count(model)
    if not held.quantized:
        raise UserError(f"no linear weight of {type(model).__name__} can be quantised to 4 bits; set sft.method: lora")
    if warning := held.warning():
        say(f"warning: {warning}")


def quantize_own_classes(model) -> None:
    """Quantise the linear layers whose class only inherits from torch's (Falcon's), which transformers leaves out."""
    import bitsandbytes
    import torch

    chosen = model.config.quantization_config
    for name, layer in list(model.named_modules()):
        if type(layer) in (torch.nn.Linear, bitsandbytes.nn.Linear4bit) or not computes_a_product(layer):
            continue
        if layer is model.get_output_embeddings():
            continue
        options = {
            "compress_statistics": chosen.bnb_4bit_use_double_quant,
            "quant_type": chosen.bnb_4bit_quant_type,
            "quant_storage": chosen.bnb_4bit_quant_storage,
        }
        shape = layer.in_features, layer.out_features, layer.bias is not None
        with torch.device("meta"):
            of_four_bits = bitsandbytes.nn.Linear4bit(*shape, chosen.bnb_4bit_compute_dtype, **options)
        weight: Any = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, module=of_four_bits, **options)
        of_four_bits.weight, of_four_bits.bias = weight.to(layer.weight.device), layer.bias
        model.set_submodule(name, of_four_bits)


def computes_a_product(layer) -> bool:
    """Whether a layer is linear. One of a class that inherits from torch's may be something else, as the router of
    Phi-MoE is, so it is compared on random numbers with torch's."""
    import bitsandbytes
    import torch

    if not isinstance(layer, torch.nn.Linear) or type(layer) in (torch.nn.Linear, bitsandbytes.nn.Linear4bit):
        return isinstance(layer, torch.nn.Linear)
    values = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight)
    expected = torch.nn.functional.linear(values, layer.weight, layer.bias)
    with torch.no_grad():
        output = layer(values)
    rounding = 1e-4 if layer.weight.dtype == torch.float32 else 2e-2  # a bias may be added before or after rounding
    near = rounding * max(1.0, expected.abs().max().item())
    return isinstance(output, torch.Tensor) and torch.allclose(output, expected, atol=near)


def keep_quantized_weights(model) -> None:
    """Switch off bitsandbytes' repacking of 4-bit weights on CPUs with AVX512-BF16.

    The repacking happens in place in the first forward pass in evaluation mode and is never undone. After it,
    gradients, merging and saving are wrong without an error (bitsandbytes 0.50.2).
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


class Held(NamedTuple):
    """The linear weights of a model's layers, in numbers: those in 4 bits, and the others by name."""

    quantized: int
    others: dict[str, int]  # name without the number of the layer -> parameters
    bytes_of_others: int

    def warning(self) -> str:
        """How much is not in 4 bits, and the memory that it takes; "" where it is little."""
        left = sum(self.others.values())
        if left <= SMALL * (left + self.quantized):
            return ""
        share, names = self.quantized / (left + self.quantized), ", ".join(self.others)
        return (
            f"{share:.0%} of the linear weights are in 4 bits; {names} (held as one tensor, or in a class of its own) "
            f"stay as they are and take {self.bytes_of_others / 1e9:.3g} GB"
        )


def count(model) -> Held:
    """The linear weights of a model's layers, without adapters: matrices, and tensors that hold several."""
    import bitsandbytes
    import torch

    quantized, size, others = 0, 0, Counter[str]()
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            quantized += module.in_features * module.out_features
            continue
        for key, weight in module.named_parameters(recurse=False):
            layer, _, inside = re.sub(LAYER, "\0", f"{name}.{key}", count=1).partition("\0")
            matrix = weight.ndim > 1 and not isinstance(module, torch.nn.Embedding) and not key.endswith("bias")
            if layer and inside and matrix and "lora_" not in name:
                others[inside] += weight.numel()
                size += weight.nbytes
    return Held(quantized, dict(others), size)


def described(contract: dict | None, model) -> dict | None:
    """The settings for a contract, with the number of linear weights that are not in 4 bits where these are many."""
    held = count(model) if contract else None
    if not contract or not held or not held.warning():
        return contract
    return contract | {"unquantized_parameters": sum(held.others.values())}


def dequantized(model):
    """The model with its 4-bit weights in float32, in layers of the classes that its checkpoint is written for.

    transformers leaves torch's linear layer where there was a Conv1D (GPT-2's), whose weight is transposed.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        loaded = type(model)(copy.deepcopy(model.config))
    model = in_float32(model).dequantize(dtype=torch.float32)
    for name, layer in loaded.named_modules():
        if isinstance(layer, Conv1D) and not isinstance(linear := model.get_submodule(name), Conv1D):
            layer.weight, layer.bias = torch.nn.Parameter(linear.weight.T.contiguous()), linear.bias
            model.set_submodule(name, layer)
    return model


def in_float32(model):
    """The model with the same weights, 4-bit ones too, computing in float32; changed in place.

    Buffers stay as they are. `Module.float` is refused for quantised models.
    """
    import torch

    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes' layers
            module.compute_dtype = torch.float32
        for weight in module.parameters(recurse=False):
            if (state := getattr(weight, "quant_state", None)) is not None:
                state.dtype = torch.float32  # in which it is dequantised
            elif weight.is_floating_point():
                weight.data = weight.data.float()
    return model
