"""PEFT's configuration of each method of supervised fine-tuning."""

import peft
import torch

from posttrain.config.sections import Sft
from posttrain.models import targets
from posttrain.training import parallel


def adapter(section: Sft, model):
    """PEFT's configuration for the method; None for full weights. Raises UserError for layers that get no adapter."""
    if section.method in ("lora", "qlora"):
        if section.dora:
            parallel.refuse_sharded("sft.dora")
        return peft.LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,
            lora_dropout=section.dropout,
            use_rslora=bool(section.rank_stabilized),
            use_dora=bool(section.dora),
            init_lora_weights=section.initialization or True,
            target_modules=targets.layers(model, section.target_modules, "sft.target_modules", section.layers),
            layers_to_transform=section.layers,
            task_type="CAUSAL_LM",
        )
    if section.method == "prefix":
        layers, heads, width = cached_keys(model)
        return peft.PrefixTuningConfig(
            num_virtual_tokens=section.virtual_tokens, task_type="CAUSAL_LM",
            num_layers=layers, num_attention_heads=heads, token_dim=heads * width,
        )  # fmt: skip
    if section.method == "prompt":
        return peft.PromptTuningConfig(
            num_virtual_tokens=section.virtual_tokens, task_type="CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB",
            num_attention_heads=cached_keys(model)[1],
        )  # fmt: skip
    return None


def cached_keys(model) -> tuple[int, int, int]:
    """(layers, heads, width of a head) of the keys that a model caches, measured on one token.

    PEFT reads them from the configuration, where Falcon has the heads of its queries and MPT another name.
    """
    with torch.no_grad():
        cache = model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True).past_key_values
    return len(cache.layers), cache.layers[0].keys.shape[1], cache.layers[0].keys.shape[3]
