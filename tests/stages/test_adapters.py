"""Adapters, merges, export and quantisation of models that are not built like Llama: GPT-2, Falcon, Mixtral."""

import math
from pathlib import Path

import pytest
import torch
from tiny import dpo, make, sft

from posttrain.config.sections import Base, Reference
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json
from posttrain.models import policy, quantization
from posttrain.tools.export import export

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
MODELS = {
    "gpt2": ("gpt2", dict(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=512)),
    "falcon": ("falcon", SIZES | dict(bias=False)),
    "mixtral": ("mixtral", SIZES | dict(intermediate_size=128, num_key_value_heads=2, num_local_experts=4,
                                        router_jitter_noise=0.3)),
    "llama": ("llama", SIZES | dict(intermediate_size=128, num_key_value_heads=2)),
}  # fmt: skip
EXPERTS = 2 * 4 * (3 * 128 * 64 + 64)  # layers x experts x (three matrices and a row of the router)
NF4 = {"type": "nf4", "double_quantization": True, "compute": "float32"}
IDS = torch.arange(10, 42).unsqueeze(0)


@pytest.fixture(scope="module")
def given(data):
    """The artifact of a random model of a kind, with random norms and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def base(kind: str) -> Path:
        folder, output = Path("given") / kind, Path(f"results/{kind}/base/manifest.json")
        if not output.exists():
            torch.manual_seed(0)
            family, settings = MODELS[kind]
            ends = dict(bos_token_id=None, eos_token_id=1, pad_token_id=None)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings | ends))
            for weight in model.parameters():
                weight.data += torch.randn_like(weight) * 0.05
            model.save_pretrained(folder)
            make("base", Base(path=str(folder)), output, data=data)
        return output

    return base


def tuned(kind: str, data: Path, base: Path, **settings) -> Path:
    """A policy on a given base."""
    name = "-".join(map(str, [kind, *settings.values()])).replace("[", "").replace("]", "").replace("'", "")
    return make("sft", sft(**settings), Path(f"results/{name}/sft/manifest.json"), data=data, base=base)


def logits(model) -> torch.Tensor:
    """A model's logits on fixed tokens."""
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def as_trained(trained: Path, base: Path) -> torch.Tensor:
    """The logits of a policy with its adapter beside the weights that it was trained on."""
    from peft import PeftModel

    under = policy.load_verified(base, policy.read_contract(trained)["quantization"])
    return logits(PeftModel.from_pretrained(under, trained.parent / "model").eval())


def test_an_adapter_on_shared_embeddings_is_refused_before_it_trains(given, data, base):
    """Merged into one of two layers that share their weights it would change both. Control: apart from the output
    embedding, an input embedding can be adapted."""
    wanted = dict(method="lora", target_modules=["q_proj", "embed_tokens"], steps=2)
    refused = r"sft\.target_modules: %s can get no adapter: .*tie_word_embeddings.*linear layers: down_proj"
    with pytest.raises(UserError, match=refused % "embed_tokens"):
        tuned("tied", data, base, **wanted)
    with pytest.raises(UserError, match=refused % "lm_head"):
        tuned("llama", data, given("llama"), method="lora", target_modules=["q_proj", "lm_head"])
    apart = tuned("llama", data, given("llama"), **wanted)
    model, _ = policy.load_policy(apart, given("llama"))
    assert torch.allclose(logits(model), as_trained(apart, given("llama")), atol=1e-4)


def test_a_policy_that_cannot_be_merged_is_used_by_nothing(data, base, monkeypatch, tmp_path):
    """As an adapter on shared embeddings, which an earlier version trained."""
    from posttrain.models import targets

    monkeypatch.setattr(targets, "layers", lambda model, wanted, *_, **__: wanted)
    made = tuned("shared", data, base, method="lora", target_modules=["q_proj", "embed_tokens"])
    for use in (lambda: policy.load_policy(made, base), lambda: export(made, tmp_path / "out")):
        with pytest.raises(UserError, match=r"shared.*differs from the adapter on its weights.*tie_word_embeddings"):
            use()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "method"), [("gpt2", "lora"), ("gpt2", "qlora"), ("falcon", "qlora")])
def test_transformers_alone_reads_the_exported_policy(given, data, kind, method, tmp_path):
    from transformers import AutoModelForCausalLM

    made = tuned(kind, data, given(kind), method=method)
    export(made, tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = as_trained(made, given(kind))
    assert (logits(read) - expected).abs().max() < 1e-4 * expected.abs().max()
    untouched = logits(policy.load_verified(given(kind)).eval())
    assert (untouched - expected).abs().max() > 1e-2 * expected.abs().max(), "control: the policy is not the base"


def test_a_folder_that_is_read_otherwise_is_not_exported(given, data, tmp_path, monkeypatch):
    """Controls: GPT-2's weights as transformers dequantises them, transposed; and a weight that is not written."""
    made = tuned("gpt2", data, given("gpt2"), method="qlora")
    monkeypatch.setattr(quantization, "dequantized", lambda model: model.dequantize())
    with pytest.raises(UserError, match="export: transformers reads another model"):
        export(made, tmp_path / "out")
    monkeypatch.undo()

    def without_a_weight(self, folder):
        kept = {key: weight for key, weight in self.state_dict().items() if "ln_f" not in key}
        saved(self, folder, state_dict=kept)

    from transformers import GPT2LMHeadModel

    saved = GPT2LMHeadModel.save_pretrained
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", without_a_weight)
    with pytest.raises(UserError, match=r"export: transformers reads another model.*logits differ"):
        export(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_linear_layers_of_a_class_of_their_own_are_quantised(given):
    """Falcon's. The quantised model computes what its dequantised weights do, which are not the base's."""
    model = policy.load_verified(given("falcon"), NF4).eval()
    held = quantization.count(model)
    assert held.quantized == 2 * (96 * 64 + 64 * 64 + 2 * 256 * 64) and not held.others and not held.warning()
    quantised = logits(model)
    whole = logits(quantization.dequantized(model).eval())
    assert torch.allclose(quantised, whole, atol=1e-4)
    assert (whole - logits(policy.load_verified(given("falcon")).eval())).abs().max() > 1e-2


def test_a_layer_that_only_inherits_from_a_linear_one_is_left_alone():
    """As Phi-MoE's router, which returns two tensors, and a layer that scales. Falcon's is linear (control)."""
    from transformers.models.falcon.modeling_falcon import FalconLinear

    class Router(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input).topk(2)

    class Scaled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    linear = [quantization.computes_a_product(layer(8, 4)) for layer in (Router, Scaled, FalconLinear, torch.nn.Linear)]
    assert linear == [False, False, True, True]
    assert not quantization.computes_a_product(torch.nn.Embedding(8, 4))


def test_a_model_without_a_weight_to_quantise_is_refused(given, monkeypatch):
    monkeypatch.setattr(quantization, "computes_a_product", lambda _: False)
    with pytest.raises(UserError, match=r"no linear weight of FalconForCausalLM can be quantised to 4 bits"):
        policy.load_verified(given("falcon"), NF4)


def test_what_stays_out_of_nf4_is_told(given, data, capsys):
    """Experts that are one tensor: in the log, the metrics and the contract. A Llama has none (control)."""
    made = tuned("mixtral", data, given("mixtral"), method="qlora")
    warning = read_json(made.parent / "metrics.json")["warnings"][0]
    assert warning in capsys.readouterr().err
    assert "of the linear weights are in 4 bits" in warning and "mlp.experts.gate_up_proj" in warning
    assert f"take {4 * EXPERTS / 1e9:.3g} GB" in warning
    assert policy.read_contract(made)["quantization"] == NF4 | {"unquantized_parameters": EXPERTS}
    llama = tuned("llama", data, given("llama"), method="qlora")
    assert policy.read_contract(llama)["quantization"] == NF4
    assert "warnings" not in read_json(llama.parent / "metrics.json")


def test_a_mixture_is_aligned_on_the_adapter_of_attention(given, data, home):
    """With `all-linear`. DPO starts at log 2: without the router's own loss, which TRL would add."""
    base = given("mixtral")
    policies = {"data": data, "base": base, "sft": tuned("mixtral", data, base, method="qlora")}
    adapted = read_json(policies["sft"].parent / "model/adapter_config.json")
    assert adapted["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"] and not adapted["target_parameters"]
    reference = make("reference", Reference(), Path("results/mixtral/reference/manifest.json"), **policies)
    made = make("dpo", dpo(), Path("results/mixtral/dpo/manifest.json"), reference=reference, **policies)
    assert read_json(made.parent / "metrics.json")["summary"]["loss before"] == pytest.approx(math.log(2), abs=1e-5)
    merged, _ = policy.load_policy(made, base)
    assert torch.allclose(logits(merged), as_trained(made, base), atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_nothing_random_but_the_adapters_dropout(given, data, kind, monkeypatch):
    """A model computes the same in training and in evaluation, and micro-batches change nothing. Control: the model's
    own settings, GPT-2's dropout of 0.1 and the noise and the loss of the mixture's router."""
    base = given(kind)
    model = policy.load_verified(base)
    assert torch.equal(logits(model.train()), logits(model.eval()))
    curves = []
    for micro in (None, 1):
        made = tuned(kind, data, base, method="lora", micro_batch_size=micro)
        curves.append([point["loss"] for point in read_json(made.parent / "metrics.json")["history"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    monkeypatch.setattr(policy, "without_chance", lambda config: config)
    model = policy.load_verified(base)
    assert not torch.allclose(logits(model.train()), logits(model.eval()), atol=1e-3)
