"""kto: the identities of the first step, the reference point of a whole batch, rows of both kinds, and its judges."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_base import killed_at
from tiny import first_gradient, kto, make, prepare

from posttrain.config.sections import Compare, Evaluate, Reference, Source
from posttrain.data import preferences
from posttrain.ground.errors import UserError
from posttrain.ground.files import manifest_of, read_json, read_jsonl, write_json, write_jsonl
from posttrain.models import policy

WEIGHTS = "model/adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(read_by):
    return read_by["kto"]


@pytest.fixture(scope="module")
def trained(inputs):
    return make("kto", kto(), Path("results/tiny/kto/manifest.json"), **inputs)


def singles(data: Path, keep=lambda row: True) -> list[dict]:
    """Both answers of each pair that is trained on, as rows for KTO."""
    pairs = read_jsonl(data.parent / "data/preference/train.jsonl")
    rows = [
        {"id": f"{pair['id']}-{answer}", "prompt": pair["prompt"], "completion": pair[answer]}
        | {"label": answer == "chosen"}
        for pair in pairs
        for answer in ("chosen", "rejected")
    ]
    return [row for row in rows if keep(row)]


def unpaired(rows: list[dict], name: str, inputs: dict) -> dict:
    """The inputs of kto with these rows to train on: the same world, and its own reference."""
    file = Path(f"results/{name}.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = prepare().model_copy(update={"kto": [Source(path=str(file), use="train")]})
    data = make("prepare", section, Path(f"results/{name}/prepare/manifest.json"))
    read = inputs | {"data": data}
    parts = {role: read[role] for role in ("data", "base", "sft")}
    reference = make("reference", Reference(), Path(f"results/{name}/reference/manifest.json"), **parts)
    return read | {"reference": reference}


def made(section, name: str, inputs: dict) -> Path:
    return make("kto", section, Path(f"results/{name}/kto/manifest.json"), **inputs)


def test_a_reference_of_other_tokens_is_refused(inputs, data, base, tuned_policy, referenced, tmp_path):
    """As of a template that writes the date, in a part of the rows' tokens. Control: in bfloat16 it is near enough."""
    parts = {"data": data, "base": base, "sft": tuned_policy}
    rounded = make("reference", Reference(precision="bfloat16"), Path("results/half/reference/manifest.json"), **parts)
    made(kto(steps=1), "half", inputs | {"reference": rounded})
    shutil.copytree(referenced.parent, tmp_path / "reference")
    file = tmp_path / "reference/data/train.jsonl"
    write_jsonl(file, [row | {"ref_rejected_logps": row["ref_rejected_logps"] + 0.5} for row in read_jsonl(file)])
    write_json(tmp_path / "reference/manifest.json", manifest_of(tmp_path / "reference", ["data"]))
    with pytest.raises(UserError, match=r"reference/manifest\.json: is not the policy .* does the chat template write"):
        made(kto(), "dated", inputs | {"reference": tmp_path / "reference/manifest.json"})


def test_the_first_loss_is_half_the_mean_weight_and_the_first_reward_0(inputs):
    """At step 0 policy and reference are equal, and z0 is 0 (arXiv 2402.01306, eq. 7); half of the rows are wanted."""
    section = kto(desirable_weight=3.0, undesirable_weight=1.0)
    summary = read_json(made(section, "weighted", inputs).parent / "metrics.json")["summary"]
    assert summary["loss before"] == pytest.approx(0.5 * 2.0, abs=1e-6)
    assert summary["rewards/margins before"] == pytest.approx(0, abs=1e-5) == summary["kl before"]
    assert summary["loss after"] < summary["loss before"] - 1e-4, "control: training moves it"


def test_swapped_labels_turn_the_gradient(inputs):
    one, other = (first_gradient("kto", kto(labels=labels), **inputs) for labels in ("chosen", "swapped"))
    assert one.norm() > 0
    assert torch.allclose(one, -other, atol=1e-5 * one.norm().item())


@pytest.fixture(scope="module")
def later(inputs):
    """Settings and gradient of the second step, when the policy is no longer the reference."""
    settings = {"learning_rate": 1e-3, "warmup_steps": 0, "beta": 2.0}
    return settings, first_gradient("kto", kto(**settings), step=2, **inputs)


@pytest.mark.parametrize("micro", [1, 2])
def test_the_micro_batch_changes_no_gradient(inputs, later, micro):
    settings, whole = later
    split = first_gradient("kto", kto(micro_batch_size=micro, **settings), step=2, **inputs)
    assert (whole - split).abs().max() <= 1e-5 * max(1.0, whole.abs().max().item())


def test_the_reference_point_counts(inputs, later, monkeypatch):
    """Control: without it the same step has another gradient."""
    from posttrain.training.unpaired import UnpairedTrainer

    monkeypatch.setattr(UnpairedTrainer, "_measure", lambda self, batches: None)
    settings, whole = later
    assert (whole - first_gradient("kto", kto(**settings), step=2, **inputs)).abs().max() > 1e-4


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_resumes_to_the_same_bytes(inputs, step, monkeypatch):
    """NF4, dropout on, accumulation, evaluation."""
    section = kto(dropout=0.1, micro_batch_size=2, eval_steps=2)
    whole = made(section, "whole", inputs)
    patch = killed_at(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        made(section, f"killed-{step}", inputs)
    patch.undo()
    assert read_json(made(section, f"killed-{step}", inputs))["files"] == read_json(whole)["files"]


def test_rows_with_labels_train_what_pairs_of_the_same_answers_do(inputs, trained, data):
    rows = unpaired(singles(data), "singles", inputs)
    other = made(kto(rows="kto"), "singles", rows)
    assert read_json(other)["files"][WEIGHTS] == read_json(trained)["files"][WEIGHTS]
    swapped = made(kto(rows="kto", labels="swapped"), "swapped", rows)
    assert read_json(swapped)["files"][WEIGHTS] != read_json(trained)["files"][WEIGHTS], "control"


def test_rows_of_one_label_are_warned_of_and_can_be_trained_on(inputs, data, capsys):
    rows = unpaired(singles(data, keep=lambda row: row["label"]), "wanted", inputs)
    assert "have label true: nothing to contrast" in capsys.readouterr().err
    summary = read_json(made(kto(rows="kto"), "wanted", rows).parent / "metrics.json")["summary"]
    assert summary.keys() == {"trainable_parameters", "beta"}, "no rows were held out"
    unpaired(singles(data), "both", inputs)
    assert "nothing to contrast" not in capsys.readouterr().err, "control"


def test_a_loss_without_a_reference_point(inputs, trained):
    other = made(kto(loss="apo_zero_unpaired", micro_batch_size=1), "apo", inputs)
    history = read_json(other.parent / "metrics.json")["history"]
    assert {point["kl"] for point in history if "kl" in point} == {0.0}
    assert read_json(other)["files"][WEIGHTS] != read_json(trained)["files"][WEIGHTS]


def test_labels_of_controls():
    rows = [{"label": number % 2 == 0} for number in range(100)]
    assert preferences.relabelled(rows, "chosen", 0) == rows
    assert [row["label"] for row in preferences.relabelled(rows, "swapped", 0)] == [not row["label"] for row in rows]
    shuffled = preferences.relabelled(rows, "shuffled", 0)
    assert 20 < sum(one != other for one, other in zip(rows, shuffled, strict=True)) < 80


def test_the_policy_is_one_adapter_that_is_judged(inputs, trained, data, base, tuned_policy):
    assert not (trained.parent / "model/ref").exists(), "the trainer's copy of the reference is no part of it"
    ids = torch.arange(20, 40)[None]
    one, two = (policy.load_policy(manifest, base)[0](ids).logits for manifest in (trained, tuned_policy))
    assert (one - two).abs().max() > 1e-4
    judged = {"data": data, "base": base, "policy": trained}
    manifest = make("evaluate", Evaluate(limit=4), Path("results/tiny/evaluate/kto/manifest.json"), **judged)
    assert read_json(manifest.parent / "metrics.json")["policy"] == "kto"
    section, compared = Compare(prompts=4, max_new_tokens=4, best_of=1), judged | {"sft": tuned_policy}
    manifest = make("compare", section, Path("results/tiny/compare/kto/manifest.json"), **compared)
    frontier = read_json(manifest.parent / "metrics.json")["frontier"]
    assert [point["series"] for point in frontier] == ["kto"] and frontier[0]["kl"] != 0
