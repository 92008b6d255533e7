"""The layers of a model that get an adapter."""

import functools
from collections.abc import Collection

import torch
from transformers.pytorch_utils import Conv1D

from posttrain.ground.errors import UserError
from posttrain.maths import fused
from posttrain.models.quantization import computes_a_product
from posttrain.training import parallel

# Names that PEFT takes for the experts of a mixture and their router, whatever layer has them (PEFT 0.21).
EXPERTS = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}


def layers(
    model, wanted: Collection[str] | str, key: str = "target_modules", numbers: list[int] | None = None
) -> Collection[str] | str:
    """PEFT's `target_modules` for the wanted layers of a model: names, or `all-linear`. key: the setting's. numbers: of
    the transformer's layers that have them; None for all.

    In a mixture whose experts are one tensor, `all-linear` is the linear layers of attention.

    Raises UserError for layers that the model lacks, since PEFT ignores them if it finds at least one; for the output
    embedding, whose weight TRL multiplies directly; and for an embedding with the same weights, into which an adapter
    cannot be merged without changing the other.
    """
    if wanted == "all-linear":
        stacked = any(weight.ndim > 2 and ".experts." in name for name, weight in model.named_parameters())
        if numbers:  # PEFT takes numbers with names alone
            return sorted(linear(model) - (EXPERTS if stacked else set()))
        return sorted(linear(model) - EXPERTS) if stacked else wanted
    places = {
        target: [module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
        for target in wanted
    }
    if unknown := [target for target in places if not places[target]]:
        known = ", ".join(sorted(linear(model)))
        raise UserError(f"{key}: the base has no {', '.join(unknown)}; its linear layers: {known}")
    head = model.get_output_embeddings()
    for target, modules in places.items():
        if head is not None and any(getattr(module, "weight", None) is head.weight for module in modules):
            raise UserError(
                f"{key}: {target} can get no adapter: it is the output embedding, or shares its weights with it "
                f"(tie_word_embeddings); linear layers: {', '.join(sorted(linear(model)))}"
            )
    return wanted


def hold(model, parts: Collection[str] | None, name: str = "default") -> None:
    """Keep an adapter from changing what is not among some parts of the matrix of queries, keys and values.

    Rows of B that are 0 stay 0 without a gradient: no optimiser and no weight decay moves them. parts: None for all.
    Raises UserError where the model's rows are not known or have no adapter.
    """
    if not parts:
        return
    parallel.refuse_sharded("sft.fused_parts")
    family = model.config.model_type
    ends = f".{fused.MATRICES.get(family, '')}"
    adapted = [module for path, module in model.named_modules() if path.endswith(ends) and name in _b_of(module)]
    if not adapted or family not in fused.MATRICES:
        raise UserError(f"sft.fused_parts: {family} has no adapter on a matrix of queries, keys and values")
    kept = torch.tensor(fused.rows(model.config, parts))[:, None]
    for weight in (_b_of(module)[name].weight for module in adapted):
        if len(weight) != len(kept):
            raise UserError(
                f"sft.fused_parts: {family} has {len(weight)} rows in{ends.replace('.', ' ')}, not {len(kept)}"
            )
        trained = weight.requires_grad
        weight.requires_grad_(True).register_hook(functools.partial(_only, kept))
        weight.requires_grad_(trained)


def _b_of(module) -> dict:
    """B of each adapter of a layer; {} of a layer without one."""
    return getattr(module, "lora_B", {})


def _only(kept: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient without some of its rows."""
    return gradient * kept.to(gradient)


def linear(model) -> set[str]:
    """Last parts of the names of a model's linear layers, without its head."""
    ends = [model.get_output_embeddings(), getattr(model, "score", None)]
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if (computes_a_product(module) or isinstance(module, Conv1D)) and not any(module is end for end in ends)
    }
