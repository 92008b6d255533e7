"""Reward model, DPO, KTO and PPO on all weights of a whole SFT policy."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import dpo, kto, make, ppo, reward, sft

from posttrain.config.sections import Compare, Reference
from posttrain.ground.errors import Interrupted, UserError
from posttrain.ground.files import read_json, sha256
from posttrain.models import adapters, policy, reward_head
from posttrain.rl import networks
from posttrain.training import interruption
from posttrain.training.interruption import GO_ON, SAVE, TERMINATED

WEIGHTS = "model/model.safetensors"
COMPARING = Compare(prompts=6, max_new_tokens=8, best_of=2, method="full")


def made_of(stage: str, section, folder: str = "whole", **inputs: Path) -> Path:
    name = {"qlora": f"{stage}-qlora"}.get(getattr(section, "method", None), stage)
    return make(stage, section, Path(f"results/{folder}/{name}/manifest.json"), **inputs)


def sections() -> dict:
    """A section of each stage that trains all weights; steps and learning rates that move them."""
    small = dict(method="full", learning_rate=1e-4, target_modules=None)
    return {
        "reward": reward(**small, normalize="demonstrations"),
        "dpo": dpo(**small),
        "kto": kto(**small),
        "ppo": ppo(**small | {"value_from": "reward", "micro_batch_size": 3, "sft_coefficient": 0.1}),
    }


@pytest.fixture(scope="module")
def read(data, base, home) -> dict[str, dict[str, Path]]:
    """Stage -> its inputs."""
    tuned = made_of("sft", sft(method="full"), data=data, base=base)
    inputs = {"data": data, "base": tuned, "sft": tuned}
    referenced = inputs | {"reference": made_of("reference", Reference(method="full"), **inputs)}
    rewarded = inputs | {"reward": made_of("reward", sections()["reward"], **inputs)}
    return {"reward": inputs, "dpo": referenced, "kto": referenced, "ppo": rewarded}


@pytest.fixture(scope="module")
def trained(read) -> dict[str, Path]:
    manifests = {name: made_of(name, section, **read[name]) for name, section in sections().items() if name != "reward"}
    return manifests | {"reward": read["ppo"]["reward"]}


def test_all_weights_are_trained_and_published_whole(trained, read):
    before = load_file(read["dpo"]["sft"].parent / WEIGHTS)
    for name, manifest in trained.items():
        contract = policy.read_contract(manifest)
        assert contract["method"] == ("reward" if name == "reward" else "weights") and contract["base"] is None
        after = load_file(manifest.parent / WEIGHTS)
        kept = [key for key in before if key in after and torch.equal(before[key], after[key])]
        assert not kept and len(before.keys() & after.keys()) > 5, name
        card = (manifest.parent / "model/README.md").read_text()
        assert "library_name: transformers" in card, name


def test_training_starts_from_the_sft_policy(trained, read):
    """Log 2 for DPO, 1/2 for KTO; a KL of 0 and a ratio of 1 for PPO. Control: the reference of weights in NF4."""
    summary = read_json(trained["dpo"].parent / "metrics.json")["summary"]
    assert summary["loss before"] == pytest.approx(math.log(2), abs=1e-5)
    assert read_json(trained["kto"].parent / "metrics.json")["summary"]["loss before"] == pytest.approx(0.5, abs=1e-5)
    history = read_json(trained["ppo"].parent / "metrics.json")["history"]
    assert history[0]["kl"] == 0 and all(point["first_ratio_error"] == 0 for point in history)
    assert history[-1]["kl"] != 0
    inputs = {role: manifest for role, manifest in read["dpo"].items() if role != "reference"}
    other = make("reference", Reference(), Path("results/nf4/reference/manifest.json"), **inputs)
    with pytest.raises(UserError, match="is not the policy that training starts from"):
        made_of("dpo", sections()["dpo"], "nf4", **inputs, reference=other)


def test_the_value_function_starts_as_the_reward_model(trained, read):
    """Whole, and as an adapter; by default its head is 0."""
    foundation = adapters.foundation_of(read["ppo"]["base"], read["ppo"]["sft"], "full")
    models = networks.load_models(sections()["ppo"], foundation, trained["reward"])
    judge = reward_head.load(trained["reward"], foundation)
    mean = policy.read_contract(trained["reward"])["mean_reward"]
    assert mean and judge.head.bias.item() == pytest.approx(-mean)
    known = {name.removeprefix("model."): weight for name, weight in judge.network.model.named_parameters()}
    assert all(torch.equal(weight, known[name]) for name, weight in models.value.trained())
    assert torch.equal(models.value_head.weight, judge.head.weight)
    assert torch.equal(models.value_head.bias, judge.head.bias)
    assert models.value_head.weight.requires_grad and not judge.head.weight.requires_grad
    plain = networks.load_models(ppo(method="full"), foundation, trained["reward"])
    assert not plain.value_head.weight.any(), "control"


def test_a_value_adapter_starts_as_the_reward_models(base, tuned_policy, rewarded):
    foundation = adapters.foundation_of(base, tuned_policy)
    models = networks.load_models(ppo(value_from="reward"), foundation, rewarded)
    saved = load_file(rewarded.parent / "model/adapter_model.safetensors")
    for key, weight in models.value.trained():
        assert torch.equal(weight, saved[key.replace(".value.", ".")])
    assert torch.equal(models.value_head.weight, saved[reward_head.HEAD])


@pytest.mark.parametrize("stage", ["reward", "dpo", "ppo"])
def test_stopped_and_continued_gives_the_same_bytes(stage, trained, read, monkeypatch):
    found = iter((GO_ON, GO_ON, SAVE, TERMINATED))
    monkeypatch.setattr(interruption, "due", lambda step, saving: next(found, GO_ON))
    with pytest.raises(Interrupted):
        made_of(stage, sections()[stage], "stopped", **read[stage])
    again = made_of(stage, sections()[stage], "stopped", **read[stage])
    assert read_json(again)["files"] == read_json(trained[stage])["files"]


def test_they_are_compared_with_the_whole_sft_policy(trained, read):
    """By a whole reward model; PPO at its snapshots too, and beside them an adapter that was trained on NF4."""
    parts = read["ppo"]
    inputs = {role: parts[role] for role in ("data", "base", "sft", "reward")}
    beside = make("compare", COMPARING, Path("results/whole/compare/sft/manifest.json"), policy=parts["sft"], **inputs)
    rows = {row["metric"]: row["value"] for row in read_json(beside.parent / "metrics.json")["rows"]}
    assert rows["kl_to_sft"] == 0
    for name in ("ppo", "dpo"):
        output = Path(f"results/whole/compare/{name}/manifest.json")
        made = make("compare", COMPARING, output, policy=trained[name], beside=beside, **inputs)
        metrics = read_json(made.parent / "metrics.json")
        assert {row["metric"]: row["value"] for row in metrics["rows"]}["kl_to_sft"] != 0
        labels = [point["label"] for point in metrics["frontier"]]
        assert labels == (["ppo", "step 2"] if name == "ppo" else ["dpo"])
    nf4 = {role: manifest for role, manifest in read["dpo"].items() if role != "reference"}
    reference = make("reference", Reference(), Path("results/mixed/reference/manifest.json"), **nf4)
    adapted = made_of("kto", kto(method="qlora"), "mixed", **nf4, reference=reference)
    foundation = adapters.foundation_of(parts["base"], parts["sft"], "full")
    assert policy.read_contract(adapted)["quantization"] and foundation.quantization is None
    output = Path("results/mixed/compare/kto/manifest.json")
    make("compare", COMPARING, output, policy=adapted, beside=beside, **inputs)
    assert sha256(output)
