"""Settings of adapters and their frozen weights: every later stage starts as the SFT policy, and merging is exact."""

import peft
import pytest
import torch

from posttrain.config.sections import Adapter, Sft
from posttrain.ground.files import write_json
from posttrain.identities import small
from posttrain.models import adapters, methods, policy
from posttrain.stages import sft as stage

KINDS = [
    pytest.param(dict(method="qlora", quantization="fp4"), id="fp4"),
    pytest.param(dict(method="lora", dora=True), id="dora"),
    pytest.param(dict(method="qlora", dora=True, rank_stabilized=True, layers=[0]), id="dora on 4 bits"),
    pytest.param(dict(method="lora", rank_stabilized=True), id="rank-stabilised"),
    pytest.param(dict(method="lora", layers=[1], initialization="gaussian"), id="one layer"),
    pytest.param(dict(method="lora", initialization="orthogonal", target_modules=["q_proj"]), id="orthogonal"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The manifest of a random Llama."""
    home = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = small.llama()
    model.save_pretrained(home / "model")
    small.tokenizer().save_pretrained(home / "model")
    policy.write_contract(home / "model", "weights", small.tokenizer(), model.config)
    return manifest(home)


def manifest(home):
    """A manifest of the files of a model."""
    write_json(home / "manifest.json", {"files": {}, "model": str(home)})
    return home / "manifest.json"


def trained(base, home, **settings):
    """The manifest of an adapter on the base, whose matrices are random as after training."""
    section = Sft(**{"rank": 4, "alpha": 24.0} | settings)
    quantization = stage.quantization_of(section, "float32")
    torch.manual_seed(1)
    model = policy.load_verified(base, quantization)
    model = peft.get_peft_model(model, methods.adapter(section, model))
    small.draw_b(model)
    for name, weight in model.named_parameters():
        if "magnitude" in name:
            weight.data *= 1 + 0.3 * torch.rand_like(weight)
    stage.publish(model, small.tokenizer(), section, base, quantization, "chat", home / "model")
    return manifest(home)


def as_trained(sft, base):
    """The logits of an adapter on the weights that it was trained on."""
    under = policy.load_verified(base, policy.read_contract(sft)["quantization"])
    return policy.probed(peft.PeftModel.from_pretrained(under, sft.parent / "model"))


@pytest.mark.parametrize("settings", KINDS)
def test_every_later_stage_starts_as_the_policy(base, tmp_path, settings):
    """A wider adapter with another alpha, and an export. Control: the base is another function."""
    sft = trained(base, tmp_path, **settings)
    expected = as_trained(sft, base)
    assert policy.largest_difference(expected, policy.probed(policy.load_verified(base))) > 0.1
    foundation = adapters.foundation_of(base, sft)
    for section in (None, Adapter(rank=6, alpha=5.0)):
        torch.manual_seed(2)
        assert policy.largest_difference(expected, policy.probed(adapters.load_as_sft(foundation, section))) < 1e-5
    merged, _ = policy.merged_policy(sft, base)
    assert policy.largest_difference(expected, policy.probed(merged)) < 1e-5


def test_fp4_is_not_nf4(base, tmp_path):
    """The same adapter on the same weights in NF4 is another policy. The contract names the type."""
    fp4 = trained(base, tmp_path / "fp4", method="qlora", quantization="fp4")
    contract = policy.read_contract(fp4)["quantization"]
    assert contract["type"] == "fp4"
    nf4 = policy.load_verified(base, contract | {"type": "nf4"})
    other = policy.probed(peft.PeftModel.from_pretrained(nf4, fp4.parent / "model"))
    assert policy.largest_difference(as_trained(fp4, base), other) > 0.01
    whole, _ = policy.load_policy(base, quantize="fp4")
    levels = whole.model.layers[0].self_attn.q_proj.weight.quant_state
    assert levels.quant_type == "fp4"


def test_a_rank_stabilised_update_is_scaled_by_the_root_of_the_rank(base, tmp_path):
    """W merged - W = alpha / sqrt(r) B A (arXiv 2312.03732, section 3), and a later stage has this scale at another
    rank. Control: alpha / r."""
    sft = trained(base, tmp_path, method="lora", rank_stabilized=True)
    state = peft.load_peft_weights(sft.parent / "model", device="cpu")
    (key, a), *_ = [item for item in state.items() if item[0].endswith("q_proj.lora_A.weight")]
    place = key.removeprefix("base_model.model.").replace("lora_A.", "")
    merged, own = (dict(model.named_parameters())[place] for model in
                   (policy.merged_policy(sft, base)[0], policy.load_verified(base)))  # fmt: skip
    product = state[key.replace("lora_A", "lora_B")] @ a
    assert torch.allclose(merged - own, 24 / 4**0.5 * product, atol=1e-5)
    assert not torch.allclose(merged - own, 24 / 4 * product, atol=1e-2)
    config = adapters.lora_config(Adapter(rank=16), adapters.foundation_of(base, sft))
    assert config.use_rslora and config.lora_alpha / 16**0.5 == 24 / 4**0.5


@pytest.mark.parametrize("initialization", ["gaussian", "orthogonal", None])
def test_an_adapter_starts_at_zero(base, initialization):
    """A is drawn by another rule, and the adapted model is the base. Control: with another B it is not."""
    section = Sft(method="lora", rank=4, alpha=24.0, initialization=initialization)
    torch.manual_seed(0)
    model = policy.load_verified(base)
    expected = policy.probed(model)
    model = peft.get_peft_model(model, methods.adapter(section, model))
    assert policy.largest_difference(expected, policy.probed(model)) < 1e-5
    a = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").lora_A["default"].weight
    assert (a.abs().max() <= 48**-0.5) == (initialization is None)  # the bound of Kaiming's uniform rule, a = sqrt(5)
    small.draw_b(model)
    assert policy.largest_difference(expected, policy.probed(model)) > 0.1


def test_only_the_layers_named_get_an_adapter(base, tmp_path):
    sft = trained(base, tmp_path, method="lora", layers=[1])
    for names in (peft.load_peft_weights(sft.parent / "model", device="cpu"), later(base, sft)):
        assert {name.partition(".layers.")[2][0] for name in names} == {"1"}
        assert {name.split(".")[-3] for name in names} >= {"q_proj", "down_proj"}


def later(base, sft) -> list[str]:
    """The names of a later stage's adapter weights."""
    model = adapters.load_as_sft(adapters.foundation_of(base, sft), Adapter(rank=8, target_modules="all-linear"))
    return [name.replace(".default", "") for name, weight in model.named_parameters() if weight.requires_grad]
