"""Frozen weights in bfloat16: every stage on them, what it holds in memory, how far its numbers are from float32's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_base import killed_at
from tiny import dpo, first_gradient, longctx, make, ppo, reward, sft
from transformers.models.falcon.modeling_falcon import FalconLinear

from posttrain.config.sections import Base, Compare, Evaluate, Lengths, Reference, Task
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json
from posttrain.models import adapters, policy, quantization
from posttrain.stages import ppo as ppo_stage
from posttrain.tools.export import export
from posttrain.training import trainers


def counted(model) -> dict[str, int]:
    """Bytes of a model's weights by their type."""
    sizes: dict[str, int] = {}
    for weight in model.parameters():
        kind = str(weight.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + weight.nbytes
    return sizes


def stored(manifest: Path) -> set[str]:
    """The types of the numbers in an artifact's weights."""
    file = next((manifest.parent / "model").glob("*model.safetensors"))
    with safe_open(file, "pt") as opened:
        return {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  # it is no mapping


def summary(manifest: Path) -> dict:
    return read_json(manifest.parent / "metrics.json")["summary"]


def given(source: Path, name: str, data: Path, dtype: str | None = "bfloat16") -> Path:
    """A base of the tests as a model that was made elsewhere."""
    section = Base(path=str(source), dtype=dtype)
    return make("base", section, Path(f"results/{name}/base/manifest.json"), data=data)


@pytest.fixture(scope="module")
def half(data, base) -> Path:
    """The tiny base, whose frozen weights are to be bfloat16."""
    return given(base.parent / "model", "half", data)


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, int]]:
    """What each training held in memory, by the experiment's name: bytes of the weights by their type."""
    return {}


@pytest.fixture(scope="module", autouse=True)
def seen_in_training(trained):
    """Counts the model of each trainer when it begins."""
    patch, run = pytest.MonkeyPatch(), trainers.run

    def counting(trainer, section, checkpoints):
        trained[checkpoints.parts[1]] = counted(trainer.model)
        run(trainer, section, checkpoints)

    patch.setattr(trainers, "run", counting)
    yield
    patch.undo()


def on(base: Path, data: Path, method: str, **changes) -> Path:
    section = sft(method=method, steps=3, **changes)
    return make("sft", section, Path(f"results/half-{method}/sft/manifest.json"), data=data, base=base)


@pytest.fixture(scope="module")
def tuned(data, half, seen_in_training) -> dict[str, Path]:
    """A policy of each kind on it."""
    return {method: on(half, data, method) for method in ("lora", "qlora", "full", "prefix")}


@pytest.fixture(scope="module")
def whole(base) -> int:
    """Parameters of the tiny base."""
    return policy.load_verified(base).num_parameters()


def test_the_type_is_that_of_the_models_own_configuration(data, base, half, tmp_path):
    """Controls: float32 by the key, and where the configuration names it; there the contract is as before the key."""
    shutil.copytree(base.parent / "model", tmp_path / "own")
    config = read_json(tmp_path / "own/config.json")
    for named, wanted, expected in (
        ("float16", None, "bfloat16"),
        ("bfloat16", "float32", None),
        ("float32", None, None),
    ):
        (tmp_path / "own/config.json").write_text(json.dumps(config | {"dtype": named}))
        made = given(tmp_path / "own", f"named-{named}", data, wanted)
        assert policy.read_contract(made).get("dtype") == expected, (named, wanted)
    assert policy.read_contract(half)["dtype"] == "bfloat16" and "dtype" not in policy.read_contract(base)


def test_frozen_weights_are_held_in_their_type(half, base, tuned, trained, whole):
    """In training and when a policy is judged, and what is trained in float32. Controls: a base in float32; full
    fine-tuning, which trains all in float32 and is written in the type."""
    assert counted(policy.load_policy(half)[0]) == {"bfloat16": 2 * whole}
    assert counted(policy.load_policy(base)[0]) == {"float32": 4 * whole}
    linear = 3 * 64 * 64 + 64 * 64 + 3 * 64 * 64
    rank = 4 * summary(tuned["lora"])["trainable_parameters"]
    held = {"lora": {"bfloat16": 2 * whole, "float32": rank},
            "qlora": {"bfloat16": 2 * (whole - linear), "uint8": linear // 2, "float32": rank}}  # fmt: skip
    for method, sizes in held.items():
        assert trained[f"half-{method}"] == counted(policy.load_policy(tuned[method], half)[0]) == sizes
    assert trained["half-full"] == {"float32": 4 * whole} and stored(tuned["full"]) == {"BF16"}
    assert counted(policy.load_policy(tuned["full"])[0]) == {"bfloat16": 2 * whole}
    assert stored(tuned["lora"]) == stored(tuned["prefix"]) == {"F32"}


def test_what_full_fine_tuning_measured_is_what_it_wrote(data, half, tuned):
    """Weights are rounded before the last held-out loss; a second run from them begins at it. In between arithmetic
    in float32 and bfloat16 differ, so that it begins in float32."""
    again = make("sft", sft(method="full", steps=1), Path("results/half-again/sft/manifest.json"),
                 data=data, base=tuned["full"])  # fmt: skip
    assert summary(again)["eval_loss_before"] == pytest.approx(summary(tuned["full"])["eval_loss"], abs=1e-6)


def after(method: str, data: Path, half: Path, tuned: dict):
    """Makes a stage after a policy of the given kind; returns its manifest."""
    parts = {"data": data, "base": tuned["full"] if method == "full" else half, "sft": tuned[method]}

    def stage(name: str, section, policy: Path | None = None, **inputs: Path) -> Path:
        inside = f"{name}/{policy.parent.name}" if policy else name
        judged = {"policy": policy} if policy else {}
        return make(name, section, Path(f"results/after-{method}/{inside}/manifest.json"), **parts, **inputs, **judged)

    return stage


def test_alignment_by_a_reward_model(data, half, tuned, trained):
    """On NF4, with heads in float32. PPO begins at a ratio of 1 and without KL, and so do the answers of `compare`."""
    stage = after("qlora", data, half, tuned)
    scored = stage("reward", reward(steps=2))
    assert trained["after-qlora"].keys() == {"bfloat16", "float32", "uint8"}
    assert trained["after-qlora"]["float32"] == 4 * summary(scored)["trainable_parameters"]
    optimised = stage("ppo", ppo(steps=2, snapshot_steps=5), reward=scored)
    first, second = read_json(optimised.parent / "metrics.json")["history"]
    assert first["first_ratio_error"] == second["first_ratio_error"] == 0.0 and abs(first["kl"]) < 0.05
    assert policy.dtype_of(scored) == policy.dtype_of(optimised) == "bfloat16"
    for judged, most in ((tuned["qlora"], 0.1), (optimised, 1.0)):
        made = stage("compare", Compare(prompts=4, max_new_tokens=8, best_of=1), judged, reward=scored)
        values = {row["metric"]: row["value"] for row in read_json(made.parent / "metrics.json")["rows"]}
        assert abs(values["kl_to_sft"]) < most


@pytest.mark.parametrize("method", ["lora", "full"])
def test_dpo_begins_at_log_2(method, data, half, tuned, trained):
    """After full fine-tuning on the policy in NF4."""
    stage = after(method, data, half, tuned)
    made = stage("dpo", dpo(steps=1, log_steps=1), reference=stage("reference", Reference()))
    assert read_json(made.parent / "metrics.json")["history"][0]["loss"] == pytest.approx(0.693, abs=0.02)
    assert policy.dtype_of(made) == "bfloat16" and ("uint8" in trained[f"after-{method}"]) == (method == "full")


def test_a_killed_run_resumes_to_the_same_bytes(data, half, tuned, monkeypatch):
    section, output = sft(method="qlora", steps=3), Path("results/half-killed/sft/manifest.json")
    patch = killed_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make("sft", section, output, data=data, base=half)
    patch.undo()
    make("sft", section, output, data=data, base=half)
    assert read_json(output)["files"] == read_json(tuned["qlora"])["files"]


def test_micro_batches_change_rounding_only(data, half):
    """By 1 % of the gradient."""
    one, parts = (
        first_gradient("sft", sft(method="lora", micro_batch_size=size), data=data, base=half) for size in (None, 1)
    )
    assert 0 < ((one - parts).norm() / one.norm()).item() < 2e-2


def test_padding_changes_rounding_only(half, base):
    """In bfloat16 by 1 % of the largest logit. Control: in float32 by a thousandth of that."""
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), torch.arange(40, 60)[None]], dim=1)
    mask = (torch.arange(29) >= 9).long()[None]
    for model, allowed in ((half, 1e-2), (base, 1e-5)):
        network = policy.load_policy(model)[0]
        with torch.no_grad():
            alone = network(padded[:, 9:]).logits.float()
            after = network(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 9:]
        assert policy.largest_difference(alone, after.float()) < allowed


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_merge_is_certified_in_float32_and_rounded_once(method, half, tuned, tmp_path, monkeypatch, capsys):
    """An export has the type of the frozen weights, or float32 where that is asked for: then it is the policy exactly.
    Control: arithmetic in bfloat16 would hide what the certificate allows in a hundredfold."""
    judged = policy.load_policy(tuned[method], half)[0]
    with_rounding = policy.load_policy(tuned[method], half, merge=True)[0]
    assert set(counted(with_rounding)) == {"bfloat16"} and "rounded to bfloat16" in capsys.readouterr().err
    sizes = {}
    for dtype, kept in ((None, "BF16"), ("float32", "F32")):
        export(tuned[method], tmp_path / kept, dtype)
        with safe_open(tmp_path / kept / "model.safetensors", "pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {kept}  # noqa: SIM118
        sizes[kept] = (tmp_path / kept / "model.safetensors").stat().st_size
    assert sizes["F32"] > 1.9 * sizes["BF16"]
    expected = policy.probed(quantization.in_float32(judged))
    exact, rounded = (policy.probed(policy.load_model(tmp_path / kept)) for kept in ("F32", "BF16"))
    assert policy.largest_difference(expected, exact) < 1e-5
    assert 1e-4 < policy.largest_difference(expected, rounded) < 1e-2
    if method == "lora":
        monkeypatch.setattr(quantization, "in_float32", lambda model: model)
        with pytest.raises(UserError, match="the merged model differs from the adapter on its weights"):
            policy.merged_policy(tuned[method], half)


def test_a_policy_is_judged_on_the_weights_that_it_was_trained_on(data, base, tuned_policy, whole):
    """QLoRA on a base in float32: the numbers are those of the merged model, in less memory; a whole model in NF4 is
    another model, which is told. Control: without the keys nothing is in NF4, and nothing is told."""
    merged = policy.load_policy(tuned_policy, base)[0]
    under = policy.load_policy(tuned_policy, base, merge=False)[0]
    assert policy.largest_difference(policy.probed(merged), policy.probed(under)) < 1e-5
    assert set(counted(merged)) == {"float32"} and counted(under)["uint8"] == 7 * 64 * 64 // 2
    assert sum(counted(under).values()) < 4 * whole

    assert counted(policy.load_policy(base, quantize="nf4")[0])["uint8"] == 7 * 64 * 64 // 2
    section = Evaluate(limit=2, tasks=[Task(task="heldout_text")], quantize=True)
    output = Path("results/quantized/evaluate/base/manifest.json")
    told = read_json(make("evaluate", section, output, data=data, base=base, policy=base).parent / "metrics.json")
    assert "judged in NF4" in told["warnings"][0]
    assert not policy.quantize_warnings(section, tuned_policy) and not policy.quantize_warnings(Evaluate(), base)


def test_a_quantised_base_answers_as_the_measuring_model(data, base, tuned_policy, monkeypatch):
    """It needs no second model. Control: in its own weights it is loaded beside it."""
    loaded, load = [], policy.load_verified
    monkeypatch.setattr(
        policy, "load_verified", lambda *given, **options: loaded.append(given) or load(*given, **options)
    )
    for quantize, models in ((True, 1), (None, 2)):
        loaded.clear()
        few = Compare(prompts=3, max_new_tokens=4, best_of=1, quantize=quantize)
        output = Path(f"results/quantize-{quantize}/compare/base/manifest.json".lower())
        make("compare", few, output, data=data, base=base, sft=tuned_policy, policy=base)
        assert len(loaded) == models


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_longer_context(tuning, long_data, long_base, trained):
    """Trained copies of embeddings and norms are float32 between frozen layers; the whole model is written in 2 bytes
    a number, and what rounding it changed is measured."""
    half = given(long_base.parent / "model", f"near-{tuning}", long_data)
    parts = {"data": long_data, "base": half}
    made = make("longctx", longctx(steps=2, tuning=tuning), Path(f"results/far-{tuning}/longctx/manifest.json"),
                policy=half, **parts)  # fmt: skip
    assert stored(made) == {"BF16"} and policy.dtype_of(made) == "bfloat16"
    types = {"full": {"float32"}, "lora": {"bfloat16", "float32"}, "qlora": {"bfloat16", "float32", "uint8"}}
    assert set(trained[f"far-{tuning}"]) == types[tuning]
    if tuning != "full":
        assert summary(made)["merge_difference"] < 1e-5 < summary(made)["rounding_difference"] < 1e-2
    windows = Lengths(tokens=[64], documents=2, packing=True)
    output = Path(f"results/far-{tuning}/lengths/longctx/manifest.json")
    judged = read_json(make("lengths", windows, output, policy=made, **parts).parent / "metrics.json")
    assert judged["rows"][0]["value"] > 1


def test_other_values_than_in_float32(base, half):
    """The same model, asked in both types: close, and not equal."""
    one, other = (policy.probed(policy.load_policy(model)[0]) for model in (base, half))
    assert 1e-4 < policy.largest_difference(one, other) < 2e-2


def test_a_linear_layer_with_a_bias_of_its_own_class_is_known_in_bfloat16():
    """Falcon's adds the bias after rounding. Control: another multiple is another layer."""

    class Scaled(FalconLinear):
        def forward(self, input):
            return 1.1 * super().forward(input)

    known = [quantization.computes_a_product(layer(64, 256).bfloat16()) for layer in (FalconLinear, Scaled)]
    assert known == [True, False]


def test_adapters_start_as_they_were_trained(half, tuned):
    """PEFT makes an adapter in the type of the layer under it; the numbers of the SFT policy must not be rounded to
    that, in none of the adapters of PPO and `compare`."""
    foundation = adapters.foundation_of(half, tuned["lora"])
    models = ppo_stage.load_models(ppo(), foundation)
    models.policy.model.load_adapter(tuned["lora"].parent / "model", "judged")
    with safe_open(tuned["lora"].parent / "model/adapter_model.safetensors", "pt") as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values()), "control"
    for name, weight in weights.items():
        for adapter in ("policy", "value", "reference", "judged"):
            key = name.replace(".weight", f".{adapter}.weight")
            assert torch.equal(models.policy.model.get_parameter(key), weight), key
