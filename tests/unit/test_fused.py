"""An adapter on a part of the matrix that holds queries, keys and values: which rows, and that the others stay."""

import functools

import peft
import pytest
import torch
import zoo
from test_adapter_settings import manifest
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.config.sections import Adapter, Sft
from posttrain.ground.errors import UserError
from posttrain.identities import small
from posttrain.maths import fused
from posttrain.models import adapters, methods, policy, targets
from posttrain.stages import sft as stage

BIGCODE = dict(n_embd=64, n_layer=1, n_head=4, n_positions=64, vocab_size=320)
MODELS = {
    "gpt-2": functools.partial(zoo.configuration, "gpt-2"),
    "mpt": functools.partial(zoo.configuration, "mpt"),
    "bloom": functools.partial(zoo.configuration, "bloom"),
    "gpt-neox": functools.partial(zoo.configuration, "gpt-neox"),
    "phi-3": functools.partial(zoo.configuration, "phi-3"),
    "falcon, one key": functools.partial(zoo.configuration, "falcon", multi_query=True),
    "falcon, a key for each head": functools.partial(zoo.configuration, "falcon", multi_query=False),
    "falcon, groups": functools.partial(zoo.configuration, "falcon", new_decoder_architecture=True, num_kv_heads=2),
    "starcoder, one key": functools.partial(AutoConfig.for_model, "gpt_bigcode", multi_query=True, **BIGCODE),
    "starcoder": functools.partial(AutoConfig.for_model, "gpt_bigcode", multi_query=False, **BIGCODE),
}


def adapted(config, parts: list[str] | None):
    """A random model with a LoRA on its fused matrices, held to some parts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    section = Sft(method="lora", rank=4, target_modules=[fused.MATRICES[config.model_type]], fused_parts=parts)
    model = peft.get_peft_model(model, methods.adapter(section, model))
    targets.hold(model, section.fused_parts)
    return model


def read(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of the first layer, and the logits."""
    with torch.no_grad():
        found = model.eval()(torch.arange(4, 12)[None], use_cache=True)
    return found.past_key_values.layers[0].keys, found.past_key_values.layers[0].values, found.logits


def trained(model, steps: int = 2):
    """The model after steps with a weight decay, by which all of B would move."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    ids = torch.arange(4, 12)[None]
    for _ in range(steps):
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_that_are_named_change_and_no_others(name):
    config = MODELS[name]()
    own = read(adapted(config, None))
    for parts in (["query", "value"], ["key"], None):
        found = read(trained(adapted(config, parts)))
        same = [torch.equal(before, after) for before, after in zip(own, found, strict=True)]
        assert same == [bool(parts) and "key" not in parts, bool(parts) and "value" not in parts, False], parts


def test_only_a_family_whose_rows_are_known():
    model = small.llama()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(
        UserError, match=r"sft.fused_parts: llama has no adapter on a matrix of queries, keys and values"
    ):
        targets.hold(model, ["query"])


def test_every_later_stage_keeps_to_the_parts(tmp_path):
    """A wider adapter too, one that is added frozen and trained later, and the next stage after it."""
    zoo.write_model("gpt-2", tmp_path / "base/model")
    base, tokenizer = manifest(tmp_path / "base"), zoo.tokenizer()
    policy.write_contract(tmp_path / "base/model", "weights", tokenizer, zoo.configuration("gpt-2"))
    section = Sft(method="lora", rank=4, target_modules=["c_attn", "c_proj"], fused_parts=["query", "value"])
    model = policy.load_verified(base)
    model = peft.get_peft_model(model, methods.adapter(section, model))
    targets.hold(model, section.fused_parts)
    stage.publish(trained(model), tokenizer, section, base, None, "chat", tmp_path / "sft/model")
    sft = manifest(tmp_path / "sft")
    foundation = adapters.foundation_of(base, sft)
    wider = adapters.load_as_sft(foundation, Adapter(rank=6))
    wider.add_adapter("value", wider.peft_config["default"])
    adapters.start_as_sft(wider, foundation, "value")
    for name in ("default", "value"):
        wider.set_adapter(name)
        trained(wider)
    wider.set_adapter("default")
    adapters.publish(wider, tokenizer, foundation, tmp_path / "dpo/model")
    assert policy.read_contract(manifest(tmp_path / "dpo"))["fused_parts"] == ["query", "value"]
    held = {name: weight for name, weight in wider.named_parameters() if "c_attn.lora_B" in name}
    assert len(held) == 4 and all(weight.requires_grad for name, weight in held.items() if "default" in name)
    for weight in held.values():
        query, key, value = weight.chunk(3)
        assert query.any(dim=1).all() and value.any(dim=1).all() and not key.any()
    expected = policy.probed(wider)
    merged, _ = policy.merged_policy(manifest(tmp_path / "dpo"), base)
    assert policy.largest_difference(expected, policy.probed(merged)) < 1e-5
    changed = (
        merged.state_dict()["transformer.h.0.attn.c_attn.weight"]
        != policy.load_verified(base).state_dict()["transformer.h.0.attn.c_attn.weight"]
    )
    assert [bool(part.any()) for part in changed.chunk(3, dim=1)] == [True, False, True]
