"""LoRA adapters that start as the SFT policy, on the policy's frozen weights, or the whole SFT policy.

Every alignment method starts here. After LoRA and QLoRA, the frozen weights are the base, and the adapter starts as a
copy of `sft`'s. After full fine-tuning, they are the fine-tuned model, quantised to NF4 once unless the section's
`method` says otherwise, and the adapter starts at zero; with `method: full` there is none, and all weights are trained.
"""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.config.sections import Adapter
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, sha256
from posttrain.models import policy, quantization

# Ends of the names of an adapter's weights on linear layers, DoRA's lengths among them, and of a classifier's head.
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "score.weight")


class Foundation(NamedTuple):
    """Frozen weights, how they are quantised, and the artifact whose adapter is the SFT policy (None: no adapter)."""

    weights: Path
    quantization: dict | None
    adapter: Path | None


class Start(NamedTuple):
    """The start of an alignment stage: the SFT policy, as the adapter `default` or a whole model, which is trained."""

    foundation: Foundation
    tokenizer: Any
    model: Any


def foundation_of(base: Path, sft: Path, method: str | None = None) -> Foundation:
    """The frozen weights of the SFT policy. base, sft: manifests; after full fine-tuning both are the SFT policy.
    method: of what is trained on them (`config.sections.Adapter`).

    Raises UserError for virtual tokens, on which no adapter can be trained, and for the adapter of another base.
    """
    contract = policy.read_contract(sft)
    if contract["method"] == "weights":
        quantized = method in (None, "qlora")
        return Foundation(sft, quantization.settings(policy.dtype_of(sft)) if quantized else None, None)
    if contract["method"] not in policy.MERGEABLE:
        raise UserError(f"{sft}: {contract['method']} tuning cannot be aligned; set sft.method to lora, qlora or full")
    if sha256(base) != contract["base"]:
        raise UserError(f"{sft}: its adapter was trained on another base than {base}")
    return Foundation(base, contract["quantization"], sft)


def scale(settings: dict) -> float:
    """The factor of BA by PEFT's settings of an adapter: alpha / r (arXiv 2106.09685, section 4.1), or alpha / sqrt(r)
    where it is rank-stabilised (arXiv 2312.03732, section 3)."""
    return settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])


def lora_config(section: Adapter, foundation: Foundation, dropout: float = 0.0, **options):
    """PEFT's configuration of an adapter that can start as the SFT policy's; options are LoraConfig's.

    Raises UserError where the new adapter is smaller than the SFT policy's.
    """
    import peft

    old = _settings(foundation.adapter) if foundation.adapter else {}
    rank = section.rank or old.get("r", 16)
    stabilized = bool(old.get("use_rslora"))
    modules = section.target_modules or old.get("target_modules") or "all-linear"
    if old and rank < old["r"]:
        raise UserError(f"rank {rank} is under that of the SFT policy's adapter ({old['r']}), from which it starts")
    missing = sorted(set(old.get("target_modules") or []) - set(modules)) if modules != "all-linear" else []
    if missing:
        raise UserError(f"target_modules lacks {', '.join(missing)}, which the SFT policy's adapter has")
    alpha = section.alpha
    if alpha is None:  # that of the same scale
        alpha = (scale(old) if old else 2.0) * (math.sqrt(rank) if stabilized else rank)
    kind = {"use_rslora": stabilized, "use_dora": bool(old.get("use_dora"))}
    return peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, **kind, **options)


def load_to_align(section, base: Path, sft: Path, head: bool = False) -> Start:
    """The SFT policy as a new adapter or a whole model, by `section.method`; random weights are drawn by the section's
    seed.

    head: whether to load a classifier with one output, `score`, in place of the language model.
    """
    from transformers import set_seed

    foundation = foundation_of(base, sft, section.method)
    tokenizer = policy.load_tokenizer(foundation.weights)
    set_seed(section.seed)
    if section.method == "full":
        return Start(foundation, tokenizer, policy.load_verified(foundation.weights, head=head, dtype="float32"))
    return Start(foundation, tokenizer, load_as_sft(foundation, section, section.dropout, head=head))


def load_as_sft(
    foundation: Foundation,
    section: Adapter | None = None,
    dropout: float = 0.0,
    name: str = "default",
    head: bool = False,
):
    """The SFT policy as a trainable adapter on its frozen weights.

    section: the adapter's shape; None for the SFT policy's. head: as in `policy.load_model`.
    """
    import peft

    from posttrain.models import targets
    from posttrain.training import parallel

    kind = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if head else {"task_type": "CAUSAL_LM"}
    config = lora_config(section or Adapter(), foundation, dropout, **kind)
    model = policy.load_verified(foundation.weights, foundation.quantization, head)
    numbers = _settings(foundation.adapter).get("layers_to_transform") if foundation.adapter else None
    config.target_modules = targets.layers(model, config.target_modules, numbers=numbers)
    config.layers_to_transform = numbers
    if config.use_dora:
        parallel.refuse_sharded("sft.dora")
    model = peft.get_peft_model(model, config, adapter_name=name)
    start_as_sft(model, foundation, name)
    train_copies_in_float32(model)  # a classifier's head
    return model


def train_copies_in_float32(model, cast_back: bool = False) -> None:
    """Make the trained copies of layers, those of `modules_to_save`, compute in float32 between frozen layers of
    another type. cast_back: whether their output gets the type of the frozen layers."""
    import peft
    import torch

    wrappers = [module for module in model.modules() if isinstance(module, peft.utils.ModulesToSaveWrapper)]
    for wrapper in wrappers:
        frozen = wrapper.original_module
        for copy in [] if frozen.weight.dtype == torch.float32 else wrapper.modules_to_save.values():
            copy.float().register_forward_pre_hook(_in_float32)
            if cast_back:
                copy.register_forward_hook(functools.partial(_as_frozen, frozen))


def _in_float32(_, states: tuple) -> tuple:
    """The inputs of a layer: numbers of another type in float32, tokens as they are."""
    return tuple(state.float() if state.is_floating_point() else state for state in states)


def _as_frozen(frozen, _layer, _states, output):
    """The output of a trained copy in the type of the frozen layer that it replaces."""
    return output.to(frozen.weight.dtype)


def start_as_sft(model, foundation: Foundation, name: str = "default") -> None:
    """Make a new adapter compute the SFT policy: copy its A and B into the first ranks, and set B = 0 in the others.
    DoRA's lengths are copied.

    B is rescaled to cancel a different `scale`. Raises UserError where the adapter is on a layer that is not
    linear.
    """
    import peft

    state = peft.get_peft_model_state_dict(model, adapter_name=name)
    odd = sorted(key for key in state if not key.endswith(PARTS))
    if odd:
        raise UserError(f"target_modules: {odd[0]} is not an adapter of a linear layer; name linear layers only")
    if foundation.adapter is None:
        return
    old, config = _settings(foundation.adapter), model.peft_config[name]
    rescale = scale(old) / scale(config.to_dict())
    weights = peft.load_peft_weights(foundation.adapter.parent / "model", device="cpu")
    if lacking := sorted(weights.keys() - state.keys()):
        raise UserError(f"target_modules: {lacking[0]} of the SFT policy's adapter has no counterpart in this model")
    for key, weight in weights.items():
        if "lora_A" in key:
            state[key][: weight.shape[0]] = weight
        elif "lora_B" not in key:
            state[key] = weight
        else:
            state[key].zero_()
            state[key][:, : weight.shape[1]] = weight * rescale
    peft.set_peft_model_state_dict(model, state, adapter_name=name)
    hold(model, foundation, name)


def hold(model, foundation: Foundation, name: str = "default") -> None:
    """Keep an adapter to the parts of fused matrices that the SFT policy's changes."""
    from posttrain.models import targets

    if parts := foundation.adapter and policy.read_contract(foundation.adapter).get("fused_parts"):
        targets.hold(model, parts, name)


def _settings(adapter: Path) -> dict:
    """PEFT's settings of an artifact's adapter."""
    return read_json(adapter.parent / "model" / "adapter_config.json")


def publish(
    model, tokenizer, foundation: Foundation, folder: Path, method: str | None = None, name: str = "default"
) -> None:
    """Write a trained adapter, or a whole trained model, with its tokenizer and its contract. Every process must call
    it; the first writes.

    method: the kind in the contract; None for a policy's.
    """
    from posttrain.training import parallel

    contract = policy.read_contract(foundation.adapter or foundation.weights)
    form, parts = contract.get("form"), contract.get("fused_parts")
    dtype = policy.dtype_of(foundation.weights)
    if not hasattr(model, "peft_config"):
        policy.publish_whole(model, tokenizer, folder, form, dtype, method or "weights")
        return
    state = parallel.gathered(model)
    if not parallel.main():
        return
    save(model, folder, foundation.weights, name, state)
    tokenizer.save_pretrained(folder)
    method = method or ("qlora" if foundation.quantization else "lora")
    settings = quantization.described(foundation.quantization, model)
    policy.write_contract(folder, method, tokenizer, model.config, foundation.weights, settings, form, dtype, parts)


def save(model, folder: Path, base: Path, name: str = "default", state: dict | None = None) -> None:
    """Write one adapter; equal weights give equal bytes. base: manifest of the frozen weights. state: the weights,
    where
    the model holds only a shard of them (`parallel.gathered`)."""
    config = model.peft_config[name]
    config.base_model_name_or_path = str(base.parent / "model")
    if isinstance(getattr(config, "target_modules", None), set):
        config.target_modules = sorted(config.target_modules)  # a set's order follows the hash seed
    model.save_pretrained(folder, selected_adapters=[name], state_dict=state)
    if name != "default":  # PEFT writes any other adapter into a subfolder
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        (folder / name).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # a model card with this machine's paths
