"""PEFT's configuration of each method of supervised fine-tuning."""

import peft
import torch

from posttrain.config.sections import Sft
from posttrain.ground.errors import UserError
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
            prefix_projection=bool(section.prefix_projection), encoder_hidden_size=section.prefix_projection,
        )  # fmt: skip
    if section.method == "prompt":
        return peft.PromptTuningConfig(
            num_virtual_tokens=section.virtual_tokens, task_type="CAUSAL_LM",
            num_attention_heads=cached_keys(model)[1], **prompt_start(section, model),
        )  # fmt: skip
    return None


def prompt_start(section: Sft, model) -> dict[str, str]:
    """PEFT's settings of what virtual tokens start as. Raises UserError for a text that has more tokens, which PEFT
    would cut."""
    if section.prompt_text is None:
        return {"prompt_tuning_init": "SAMPLE_VOCAB"}
    from transformers import AutoTokenizer

    count = len(AutoTokenizer.from_pretrained(model.name_or_path)(section.prompt_text).input_ids)
    if count > section.virtual_tokens:
        raise UserError(f"sft.prompt_text: has {count} tokens, over sft.virtual_tokens ({section.virtual_tokens})")
    return {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": section.prompt_text,
        "tokenizer_name_or_path": model.name_or_path,
    }


def cached_keys(model) -> tuple[int, int, int]:
    """(layers, heads, width of a head) of the keys that a model caches, measured on one token.

    PEFT reads them from the configuration, where Falcon has the heads of its queries and MPT another name.
    """
    with torch.no_grad():
        cache = model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True).past_key_values
    return len(cache.layers), cache.layers[0].keys.shape[1], cache.layers[0].keys.shape[3]
