"""Claims in the config: mistakes are told before any job, what they need is planned, and an edit reruns nothing."""

import json

import pytest

from posttrain.dag import campaign, claims
from posttrain.dag.artifacts import at
from posttrain.dag.frozen import freeze, summary, thaw
from posttrain.ground.errors import UserError

CHAIN = "prepare: {world: {}}\nbase: {scratch: {}}\nsft: {}\nreward: {}\nppo: {}\ndpo: {}\n"
EXPECTED = "expected: {at_least: 0.5, date: 2026-11-30}, tolerance: {basis: algebra}"


def claimed(measured: str, control: str = "{of: evaluate/base}", expected: str = EXPECTED, key: str = "it") -> str:
    """The text of an experiment with one claim."""
    words = f"sentence: It is so., paper: a paper, {expected}"
    return f"claims:\n  {key}: {{measured: {measured}, control: {control}, {words}}}\n"


GOOD = "{of: evaluate/sft, value: world exact_match}"


def load(folder, experiments="[one]", more="", **files):
    (folder / "experiments").mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(f"experiments: {experiments}\n{more}")
    for name, text in files.items():
        (folder / "experiments" / f"{name}.yaml").write_text(text)
    return campaign.load(folder / "config.yaml")


@pytest.mark.parametrize(
    "measured, said",
    [
        ("{of: two/evaluate/sft, value: world exact_match}", "measured.of: experiment 'two': there is no"),
        (
            "{of: evaluate/kto, value: world exact_match}",
            "measured.of: one makes no evaluate/kto; it makes prepare, base",
        ),
        ("{of: one/evalute/sft, value: a b}", "measured.of: there is no stage evalute; known: prepare"),
        ("{value: world exact_match}", "measured.of: is missing: name an artifact, or a file"),
        ("{of: sft}", "measured.value: is missing: the number's name"),
        ("{of: evaluate/sft, value: world}", "measured.value: found 'world'; of evaluate it should be TASK METRIC"),
        (
            "{of: compare/ppo, value: world exact_match}",
            "measured.value: found the task world; that of compare is answers",
        ),
        ("{of: sft, depends_on: rewards}", "measured.depends_on: there is no stage rewards"),
        ("{of: sft, value: a, slope: dpo.beta}", "measured.slope: dpo.beta is no axis of two numbers"),
        ("{of: sft, value: a, minus: {of: kto}}", "measured.minus.of: one makes no kto"),
        ("{of: sft, values: a}", "measured.values: unknown key (did you mean 'value'?)"),
    ],
)
def test_a_claim_about_what_the_plan_lacks_is_refused(tmp_path, measured, said):
    with pytest.raises(UserError) as refused:
        load(tmp_path, one=CHAIN + claimed(measured))
    assert f"one.yaml:8: claims.it.{said}" in str(refused.value)
    assert load(tmp_path, one=CHAIN + claimed(GOOD)).claimed  # control


def test_contradictions_within_a_claim_and_a_name_given_twice_are_refused(tmp_path):
    both = "expected: {at_least: 0.5, about: 0.5, date: 2026-11-30}, tolerance: {basis: algebra}"
    with pytest.raises(UserError) as refused:
        load(tmp_path, "[one, two]", one=CHAIN + claimed(GOOD, "{}", both), two="extends: one\n" + claimed(GOOD))
    text = str(refused.value)
    assert (
        "claims.it.expected: exactly one of exactly, about, at_least, at_most must be set, found about and at_least"
        in text
    )
    assert "claims.it.control: is empty" in text
    assert "two.yaml:3: claims.it: one has a claim of this name too" in text


def test_a_tolerance_without_its_basis_and_a_claim_without_control_are_refused(tmp_path):
    with pytest.raises(UserError) as refused:
        load(
            tmp_path,
            one=CHAIN + "claims:\n  it: {measured: {of: sft, value: a}, sentence: a, paper: b, tolerance: {}}\n",
        )
    for key in ("control: missing", "expected: missing", "tolerance.basis: missing"):
        assert f"claims.it.{key}" in str(refused.value)


def test_what_the_claims_need_is_planned_and_nothing_else(tmp_path):
    control = "{of: two/evaluate/dpo}"
    plan = load(tmp_path, one=CHAIN + claimed(GOOD, control), two="extends: one\ndpo: {labels: swapped}\n")
    assert [artifact.name for artifact in plan.claimed] == ["one/evaluate/sft", "two/evaluate/dpo"]
    assert "two" not in plan.names and "results/two/dpo" in plan.folders()
    ordinary = plan.inputs("", "report")["evaluations"]
    assert "results/two/evaluate/dpo/manifest.json" not in ordinary
    again = load(tmp_path)
    again.verifying = True
    needed = ["results/one/evaluate/sft/manifest.json", "results/two/evaluate/dpo/manifest.json"]
    assert again.inputs("", "report")["evaluations"] == needed
    assert again.lineage("", "report") == plan.lineage("", "report")
    assert not json.loads(freeze(plan))["experiments"]["one"].get("claims") and thaw(freeze(plan)).names == ["one"]


def test_claims_of_experiments_under_verify_are_ruled_on_without_running_them(tmp_path):
    two = "extends: one\n" + claimed("{of: evaluate/ppo, value: world exact_match}", key="other")
    plan = load(tmp_path, "[one]", "verify: [two]\n", one=CHAIN + claimed(GOOD), two=two)
    assert [claim["id"] for claim in summary(plan)["claims"]] == ["it", "other"] and plan.names == ["one"]
    with pytest.raises(UserError, match=r"verify: names an experiment twice"):
        load(tmp_path, "[one]", "verify: [one]\n")


def test_a_claim_is_not_inherited_and_changes_no_stage(tmp_path):
    plan = load(tmp_path, "[one, two]", one=CHAIN + claimed(GOOD), two="extends: one\ndpo: {beta: 0.5}\n")
    assert not plan.experiments["two"].claims
    bare = load(tmp_path, "[one, two]", one=CHAIN)
    artifacts = [artifact for artifact in plan.artifacts() if artifact.policy or artifact.experiment]
    assert [plan.arguments(*artifact) for artifact in artifacts] == [
        bare.arguments(*artifact) for artifact in artifacts
    ]
    assert summary(plan) != summary(bare)


def test_a_claim_that_needs_a_larger_scale_needs_no_artifact(tmp_path):
    text = CHAIN + claimed(GOOD, expected=EXPECTED + ", scale: paper")
    assert load(tmp_path, one=text).claimed
    plan = load(tmp_path, more="scale: toy\n", one=text)
    assert not plan.claimed and not summary(plan)["claims"][0]["tested"]


def test_seeds_and_slopes_become_weighted_sums(tmp_path):
    grid = "grid: {seed: [0, 1], dpo.beta: [0.1, 0.3]}\n"
    measured = "{of: compare/dpo, value: answers kl_to_sft, slope: dpo.beta}"
    plan = load(tmp_path, one=CHAIN + grid + claimed(measured, "{of: compare/sft}"))
    runs = summary(plan)["claims"][0]["measured"]["runs"]
    assert [run["seed"] for run in runs] == [0, 1]
    assert [term["weight"] for term in runs[0]["terms"]] == pytest.approx([-5.0, 5.0])
    assert runs[1]["terms"][1]["folder"] == "results/one@beta=0.3@seed=1/compare/dpo"
    with pytest.raises(UserError, match=r"one has a grid of dpo\.beta: name a cell, or a slope"):
        load(tmp_path, one=CHAIN + grid + claimed("{of: compare/dpo, value: answers kl_to_sft}"))
    one = load(
        tmp_path, one=CHAIN + grid + claimed("{of: one@beta=0.1@seed=1/dpo, value: a}", "{of: one@beta=0.1@seed=1/ppo}")
    )
    assert [artifact.name for artifact in one.claimed] == ["one@beta=0.1@seed=1/dpo", "one@seed=1/ppo"]


def test_a_difference_and_a_ratio_are_sums_of_both_numbers(tmp_path):
    measured = "{of: evaluate/ppo, value: world exact_match, minus: {of: evaluate/sft}, over: {of: evaluate/dpo}}"
    run = summary(load(tmp_path, one=CHAIN + claimed(measured)))["claims"][0]["measured"]["runs"][0]
    assert [(term["folder"].rpartition("/")[2], term["weight"]) for term in run["terms"]] == [
        ("ppo", 1.0),
        ("sft", -1.0),
    ]
    assert [term["folder"] for term in run["over"]] == ["results/one/evaluate/dpo"]


def test_an_axis_that_does_not_change_an_artifact_needs_no_cell(tmp_path):
    plan = load(
        tmp_path,
        one=CHAIN + "grid: {seed: [0, 1], dpo.beta: [0.1, 0.3]}\n" + claimed("{of: sft, value: a}", "{of: base}"),
    )
    runs = summary(plan)["claims"][0]["measured"]["runs"]
    assert [[term["folder"] for term in run["terms"]] for run in runs] == [
        ["results/one@seed=0/sft"],
        ["results/one@seed=1/sft"],
    ]


def test_seeds_of_both_sides_of_a_difference_must_be_the_same(tmp_path):
    two = "extends: one\ngrid: {seed: [0, 2]}\n"
    measured = "{of: evaluate/sft, value: world exact_match, minus: {of: two/evaluate/sft}}"
    with pytest.raises(UserError, match=r"measured\.minus\.of: has the seeds 0, 2, and what is measured 0, 1"):
        load(tmp_path, one=CHAIN + "grid: {seed: [0, 1]}\n" + claimed(measured), two=two)


def test_the_plan_itself_can_be_measured(root):
    plan = campaign.load(root / "config/config.yaml")
    named = {key: claim for _, key, claim in claims.claims(plan)}
    claim = named["dpo-needs-no-reward-model"]
    values = [claims.runs(plan, "tiny", part)[0]["terms"] for part in (claim.measured, claims.controlled(claim))]
    assert values == [[{"constant": 0.0, "weight": 1.0}], [{"constant": 1.0, "weight": 1.0}]]
    assert len(named) >= 24


def test_the_record_of_the_default_is_of_its_present_settings(root):
    """Where a setting was changed on purpose, `snakemake verify` and `posttrain verdict --record` record anew."""
    plan = campaign.load(root / "config/config.yaml")
    recorded = json.loads((root / "config/recorded/config.json").read_text())
    needed = {folder: at(folder) for artifact in plan.claimed for folder in plan.above(artifact)}
    assert recorded.keys() == needed.keys()
    for folder, artifact in needed.items():
        assert recorded[folder]["settings"] == json.loads(plan.section(artifact.experiment, artifact.stage)), folder
