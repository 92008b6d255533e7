"""dpo and its reference: the identities of the first step, one reference for all, and the same bytes after a kill."""

import math
from pathlib import Path

import pytest
import torch
from test_base import killed_at
from tiny import dpo, first_gradient, make

from posttrain.data import preferences
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, read_jsonl, write_jsonl
from posttrain.models import adapters, policy, referenced, tokens
from posttrain.training import parallel, trainers

WEIGHTS = "model/adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(read_by):
    return read_by["dpo"]


@pytest.fixture(scope="module")
def trained(inputs):
    return make("dpo", dpo(), Path("results/tiny/dpo/manifest.json"), **inputs)


def test_the_first_loss_is_log_2_and_the_first_margin_0(trained):
    """At step 0 policy and reference are the same (arXiv 2305.18290, eq. 7)."""
    summary = read_json(trained.parent / "metrics.json")["summary"]
    assert summary["loss before"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["rewards/margins before"] == pytest.approx(0, abs=1e-5)
    losses = [point["loss"] for point in read_json(trained.parent / "metrics.json")["history"] if "loss" in point]
    assert losses[-1] < math.log(2), "control: training moves it"


def test_swapped_labels_turn_the_gradient(inputs):
    """The first step's gradient, by TRL's trainer: chosen and rejected swapped, it is the same with the other sign."""
    one, other = (first_gradient("dpo", dpo(labels=labels), **inputs) for labels in ("chosen", "swapped"))
    assert one.norm() > 0
    assert torch.allclose(one, -other, atol=1e-5 * one.norm().item())


@pytest.mark.parametrize("micro", [1, 2])
def test_the_micro_batch_changes_no_gradient(inputs, micro):
    whole, split = (first_gradient("dpo", dpo(micro_batch_size=size), **inputs) for size in (4, micro))
    assert (whole - split).abs().max() <= 1e-5 * max(1.0, whole.abs().max().item())
    assert (whole - first_gradient("dpo", dpo(batch_size=2), **inputs)).abs().max() > 1e-4, "control: another batch"


def test_the_reference_is_the_sft_policy_by_hand(inputs, data, base, tuned_policy, referenced):
    """log pi(answer | prompt) of the merged policy, one row at a time, without padding."""
    model, tokenizer = policy.load_policy(tuned_policy, base)
    rows = read_jsonl(data.parent / "data/preference/test.jsonl")[:4]
    known = read_jsonl(referenced.parent / "data/test.jsonl")
    for row, expected in zip(rows, known, strict=False):
        pair = tokens.alone(tokenizer, tokens.answers(tokenizer, row))
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            with torch.no_grad():
                logp = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
            own = logp.gather(1, ids[0, 1:, None])[len(pair["prompt_ids"]) - 1 :].sum().item()
            assert own == pytest.approx(expected[f"ref_{side}_logps"], abs=1e-3)
            assert pair[f"{side}_ids"][-1] == tokenizer.eos_token_id


def test_the_artifact_and_trls_own_reference_train_the_same(inputs, monkeypatch, trained):
    """With the reference from the artifact, and with TRL computing it in each step: equal weights within rounding."""
    from safetensors.torch import load_file
    from trl import DPOTrainer

    monkeypatch.setattr(
        DPOTrainer, "precompute_ref_logps", property(lambda self: False, lambda self, value: None), raising=False
    )
    computed = make("dpo", dpo(), Path("results/in-step/dpo/manifest.json"), **inputs)
    one, other = (load_file(manifest.parent / WEIGHTS) for manifest in (trained, computed))
    assert max((one[key] - other[key]).abs().max() for key in one) < 1e-4


def test_another_reference_is_refused_and_would_train_another_policy(
    inputs, trained, referenced, tmp_path, monkeypatch
):
    """A reference that is not the policy's start, as one of another template or day. Control: it is really read."""
    import shutil

    from posttrain.ground.files import manifest_of, write_json

    shutil.copytree(referenced.parent, tmp_path / "reference")
    file = tmp_path / "reference/data/train.jsonl"
    write_jsonl(file, [row | {"ref_chosen_logps": row["ref_chosen_logps"] - 20} for row in read_jsonl(file)])
    write_json(tmp_path / "reference/manifest.json", manifest_of(tmp_path / "reference", ["data"]))
    other = inputs | {"reference": tmp_path / "reference/manifest.json"}
    output = Path("results/other-reference/dpo/manifest.json")
    with pytest.raises(UserError, match=r"is not the policy that training starts from: .* nats a token"):
        make("dpo", dpo(), output, **other)
    monkeypatch.setattr("posttrain.models.referenced.prove_reference", lambda *_: None)
    made = make("dpo", dpo(), output, **other)
    assert read_json(made)["files"][WEIGHTS] != read_json(trained)["files"][WEIGHTS]


def test_computing_the_reference_first_disturbs_nothing(inputs, trained):
    """With dropout: right after a reference was computed in this process, and from the artifact alone."""
    from posttrain.config.sections import Reference

    section = dpo(dropout=0.2)
    alone = make("dpo", section, Path("results/alone/dpo/manifest.json"), **inputs)
    parts = {key: inputs[key] for key in ("data", "base", "sft")}
    make("reference", Reference(batch_size=3), Path("results/again/reference/manifest.json"), **parts)
    after = make("dpo", section, Path("results/after/dpo/manifest.json"), **inputs)
    assert read_json(alone)["files"] == read_json(after)["files"]
    assert read_json(alone)["files"][WEIGHTS] != read_json(trained)["files"][WEIGHTS], "control: dropout was on"


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_resumes_to_the_same_bytes(inputs, step, monkeypatch):
    """NF4, dropout on, accumulation, evaluation."""
    section = dpo(dropout=0.1, micro_batch_size=2, eval_steps=2)
    whole = make("dpo", section, Path("results/whole/dpo/manifest.json"), **inputs)
    output = Path(f"results/killed-{step}/dpo/manifest.json")
    patch = killed_at(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make("dpo", section, output, **inputs)
    patch.undo()
    make("dpo", section, output, **inputs)
    assert read_json(output)["files"] == read_json(whole)["files"]


@pytest.mark.parametrize("loss", [["hinge"], ["ipo"], ["apo_zero"], ["sigmoid", "sft"]])
def test_losses_by_trls_names(inputs, loss):
    make(
        "dpo", dpo(steps=1, loss=loss), Path(f"results/{'-'.join(loss)}/dpo/manifest.json".replace("_", "-")), **inputs
    )


def test_the_artifact_is_one_adapter_that_loads(trained, base, tuned_policy):
    assert {file.name for file in (trained.parent / "model").iterdir()} >= {"adapter_config.json", "policy.json"}
    assert not (trained.parent / "model/ref").exists(), "the trainer's copy of the reference is no part of it"
    one, two = (
        policy.load_policy(manifest, base)[0](torch.arange(20, 40)[None]).logits for manifest in (trained, tuned_policy)
    )
    assert (one - two).abs().max() > 1e-4


def test_a_reference_of_other_pairs_is_refused(inputs, data, base, tmp_path):
    known = read_jsonl(inputs["reference"].parent / "data/train.jsonl")
    assert len(known) == len(read_jsonl(data.parent / "data/preference/train.jsonl"))
    write_jsonl(tmp_path / "data/train.jsonl", known[1:])
    with pytest.raises(UserError, match="was computed on other rows"):
        preferences.with_reference(policy.load_tokenizer(base), data, tmp_path / "manifest.json", "train", dpo())


def test_falling_chosen_answers_are_named():
    before, after = {"eval_logps/chosen": -5.0}, {"eval_logps/chosen": -7.5}
    assert "likelihood displacement" in referenced.displacement(before, after)[0]
    assert referenced.displacement(before, {"eval_logps/chosen": -5.5}) == []


def test_frozen_weights_stay_as_they_are(trained, base, tuned_policy):
    from posttrain.ground.files import verify

    verify(base)
    verify(tuned_policy)
    assert adapters.foundation_of(base, tuned_policy).weights == base


def test_a_loss_over_the_whole_batch_is_refused_for_a_part_of_it(inputs, monkeypatch):
    """After an attempt that ran out of memory, fewer rows go through the model at once."""
    monkeypatch.setattr(parallel, "fits", 2)
    with pytest.raises(
        UserError, match=r"dpo.loss: TRL computes sft over a whole batch \(4\), of which 2 fit into memory"
    ):
        make("dpo", dpo(loss=["sft"]), Path("results/part/dpo/manifest.json"), **inputs)
    trainers.refuse_parts("dpo.loss", set(), dpo())  # control: other losses add up


def test_a_row_over_max_length_is_refused(inputs, data, base):
    """TRL would cut its answers, and drop the row where its prompt fills max_length."""
    tokenizer, section = policy.load_tokenizer(base), dpo(max_length=16)
    with pytest.raises(UserError, match=r"row .*: over max_length \(16 tokens\)"):
        preferences.with_reference(tokenizer, data, inputs["reference"], "train", section)


def test_the_trainer_learns_from_the_tokens_of_the_contract(inputs, monkeypatch):
    """Not from those that TRL would make of the same rows, which may end otherwise."""
    kept = {}

    def keep(trainer, section, *rest):
        kept["rows"] = list(trainer.train_dataset.dataset)
        kept["batch"] = trainer.data_collator(kept["rows"][:2])
        return {}

    monkeypatch.setattr(referenced, "run_measured", keep)
    make("dpo", dpo(), Path("results/rows/dpo/manifest.json"), **inputs)
    tokenizer = policy.load_tokenizer(inputs["base"])
    expected = preferences.with_reference(tokenizer, inputs["data"], inputs["reference"], "train", dpo())
    assert kept["rows"] == expected
    first, batch = expected[0], kept["batch"]
    length = len(first["prompt_ids"] + first["chosen_ids"])
    assert batch["input_ids"][0, :length].tolist() == first["prompt_ids"] + first["chosen_ids"]
    assert batch["ref_chosen_logps"][0].item() == pytest.approx(first["ref_chosen_logps"])
