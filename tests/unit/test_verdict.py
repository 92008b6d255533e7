"""The verdict: each word from known numbers, every control that must fail, and every difference that must be named."""

import json
import math
import subprocess
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from posttrain.ground.errors import UserError
from posttrain.ground.files import manifest_of, write_json, write_jsonl
from posttrain.ground.identity import of_params
from posttrain.jobs import registered as registration
from posttrain.maths.significance import against, clustered, holm, smallest_effect
from posttrain.reporting.departure import snapshot
from posttrain.reporting.verdict import table, verdict
from posttrain.tools import verdict as tool

HALF = [1.0, 0.0] * 100
PROTOCOL = {"version": "1.0", "shots": 0, "dtype": "torch.float32"}


def publish(folder: Path, metrics: dict, settings: dict | None = None) -> None:
    """An artifact with its provenance and manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", metrics)
    params = [json.dumps(settings or {}), "code", "lineage"]
    write_json(folder / "provenance.json", {"stage": "evaluate", "params": params, "inputs": {}})
    parts = [name for name in ("metrics.json", "lm_eval.json", "data") if (folder / name).exists()]
    write_json(folder / "manifest.json", manifest_of(folder, parts))


def evaluation(folder: Path, scores: list[float], settings: dict | None = None, **other) -> None:
    """A judgement of questions of one task. other: keys of PROTOCOL, and `limit`, `template`, `asked`, `value`."""
    of = PROTOCOL | other
    rows = [
        {
            "doc_id": n,
            "doc": {"answer": n // 4},
            "doc_hash": f"{of.get('asked', '')}{n}",
            "target_hash": "",
            "right": score,
        }
        for n, score in enumerate(scores)
    ]
    write_jsonl(folder / "data" / "samples" / "task.jsonl", rows)
    result = {"versions": {"task": of["version"]}, "n-shot": {"task": of["shots"]}}
    write_json(folder / "lm_eval.json", result | {"config": {"model_dtype": of["dtype"]}})
    mean, stderr, _ = clustered(scores, range(len(scores)))
    row = {"task": "task", "metric": "right", "value": of.get("value", mean), "stderr": stderr, "n": len(scores)}
    publish(folder, {"rows": [row], "limit": of.get("limit"), "chat_template": of.get("template")}, settings)


def measured(
    *terms: tuple, over: tuple = (), cluster: str | None = None, batch: int | None = None, seeds: int = 1
) -> dict:
    """A measurement: (weight, folder[, value]) for each number."""

    def shown(term, seed):
        name, value = f"results/{term[1]}".format(seed=seed), (*term, "task right")[2]
        return {"weight": term[0], "folder": name, "value": value}

    runs = [
        {"seed": n, "terms": [shown(term, n) for term in terms]}
        | ({"over": [shown(term, n) for term in over]} if over else {})
        for n in range(seeds)
    ]
    folders = dict.fromkeys(term["folder"] for run in runs for term in [*run["terms"], *run.get("over", [])])
    planned = of_params(["{}", "code", "lineage"])
    above = {folder: [folder] for folder in folders}
    return {
        "runs": runs,
        "cluster": cluster,
        "batch": batch,
        "planned": dict.fromkeys(folders, planned),
        "above": above,
    }


def claim(of: dict, expected: dict, tolerance: float = 0.0, control: dict | None = None, **keys) -> dict:
    """A claim as the plan hands it to the report."""
    words = {
        "id": "it",
        "experiment": "one",
        "question": "?",
        "sentence": "It is so.",
        "paper": "a paper",
        "table": None,
    }
    kind = {"scope": "training", "scale": "toy", "family": "a paper", "noise_floor": False, "tested": True}
    rule = {"measured": of, "control": control or measured((1.0, "nothing")), "expected": expected}
    return words | kind | rule | {"tolerance": {"value": tolerance, "basis": "algebra"}} | keys


@pytest.fixture
def results(tmp_path):
    """Judgements: `good` answers 90 %, `half` every second question, `nothing` none."""
    folder = tmp_path / "results"
    evaluation(folder / "good", [1.0] * 180 + [0.0] * 20)
    evaluation(folder / "half", HALF)
    evaluation(folder / "nothing", [0.0] * 200)
    return folder


def ruling(results: Path, *claims: dict, **known) -> dict:
    """The ruling on the first of some claims."""
    return verdict(list(claims), results, **known)["rulings"][0]


def test_errors_over_clusters_are_those_of_their_sums():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    _, alone, _ = clustered(values, range(6))
    assert alone == pytest.approx(ttest_1samp(values, 0).statistic ** -1 * 0.5)
    _, doubled, count = clustered([x for x in values for _ in (0, 1)], [n for n in range(6) for _ in (0, 1)])
    assert (doubled, count) == (pytest.approx(alone), 6), "each value twice in a cluster says nothing new"
    assert clustered([x for x in values for _ in (0, 1)], range(12))[1] < alone  # control: as if they were new
    assert clustered([1.0, 0.0], ["same", "same"])[1] is None


def test_a_value_inside_outside_and_on_the_border_of_a_region():
    inside, outside = against(0.5, 0.05, 100, 0.3, math.inf)
    assert inside < 0.001 and outside > 0.99
    inside, outside = against(0.1, 0.05, 100, 0.3, math.inf)
    assert inside > 0.99 and outside < 0.001
    assert against(0.3, 0.05, 100, 0.3, math.inf)[0] == pytest.approx(0.5)
    assert against(0.0, 0.05, 100, -0.3, 0.3)[0] < 0.001 < 0.9 < against(0.29, 0.05, 100, -0.3, 0.3)[1]
    assert against(2, 0.0, 1, 2, 2) == (0.0, 1.0) and against(3, 0.0, 1, 2, 2) == (1.0, 0.0)


def test_holm_multiplies_the_smallest_p_by_the_number_of_claims():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert smallest_effect(1.0, 10**6) == pytest.approx(1.960 + 0.842, abs=1e-3)


def test_each_verdict_from_known_numbers(results):
    words = {
        "reproduced": claim(measured((1.0, "good")), {"at_least": 0.8}),
        "consistent-within-noise": claim(measured((1.0, "good")), {"at_least": 0.9}),
        "not-reproduced": claim(measured((1.0, "half")), {"at_least": 0.8}),
        "not-run": claim(measured((1.0, "absent")), {"at_least": 0.8}),
        "not-testable-at-this-scale": claim(measured((1.0, "good")), {"at_least": 0.8}, tested=False),
    }
    assert {word: ruling(results, one)["verdict"] for word, one in words.items()} == {word: word for word in words}
    holding = {word: verdict([one], results)["holds"] for word, one in words.items()}
    assert [word for word, holds in holding.items() if not holds] == ["not-reproduced"]


def test_a_control_that_holds_fails_the_verdict(results):
    blind = claim(measured((1.0, "good")), {"at_least": 0.3}, control=measured((1.0, "half")))
    ruled = verdict([blind], results)
    assert not ruled["holds"] and "its control holds too" in ruled["rulings"][0]["reason"]
    near = claim(measured((1.0, "good")), {"at_least": 0.5}, control=measured((1.0, "half")))
    assert ruling(results, near)["verdict"] == "consistent-within-noise", "its control cannot be told from it"
    assert ruling(results, claim(measured((1.0, "good")), {"at_least": 0.5}))["verdict"] == "reproduced"


def test_many_claims_of_a_family_need_more_evidence_each(results):
    one = claim(measured((1.0, "good")), {"at_least": 0.86})
    assert ruling(results, one)["verdict"] == "reproduced"
    others = [one | {"id": str(n)} for n in range(40)]
    assert ruling(results, one, *others)["verdict"] == "consistent-within-noise"
    apart = [other | {"family": other["id"]} for other in others]
    assert ruling(results, one, *apart)["verdict"] == "reproduced"


def test_a_difference_is_paired_over_questions(results):
    evaluation(results / "better", [1.0 if n < 20 else score for n, score in enumerate(HALF)])
    paired = ruling(results, claim(measured((1.0, "better"), (-1.0, "half")), {"at_least": 0.0}))
    assert paired["got"] == pytest.approx(0.05) and paired["over"] == "200 questions"
    assert paired["stderr"] == pytest.approx(0.0154, abs=1e-3) and paired["verdict"] == "reproduced"
    assert paired["smallest_effect"] == pytest.approx(2.82 * paired["stderr"], rel=0.01)
    grouped = ruling(results, claim(measured((1.0, "better"), (-1.0, "half"), cluster="answer"), {"at_least": 0.0}))
    assert grouped["over"] == "200 questions in 50 clusters" and grouped["stderr"] > paired["stderr"]
    ratio = ruling(results, claim(measured((1.0, "better"), over=((1.0, "half"),)), {"at_least": 1.0}))
    assert ratio["got"] == pytest.approx(1.1)


def test_several_seeds_give_the_error_over_seeds(results):
    for seed, right in enumerate((150, 160, 170)):
        evaluation(results / f"seed{seed}", [1.0] * right + [0.0] * (200 - right))
    over = ruling(results, claim(measured((1.0, "seed{seed}"), seeds=3), {"at_least": 0.5}))
    assert over["over"] == "3 seeds" and over["got"] == pytest.approx(0.8)
    assert over["stderr"] == pytest.approx(0.05 / math.sqrt(3))


@pytest.mark.parametrize(
    "key, value", [("version", "2.0"), ("shots", 5), ("dtype", "torch.bfloat16"), ("template", "abc")]
)
def test_numbers_of_other_protocols_are_not_compared(results, key, value):
    difference = claim(measured((1.0, "good"), (-1.0, "half")), {"at_least": 0.1})
    assert ruling(results, difference)["verdict"] == "reproduced"
    evaluation(results / "half", HALF, **{key: value})
    ruled = verdict([difference], results)
    assert not ruled["holds"] and ruled["rulings"][0]["verdict"] == "not-run"
    assert f"{key} differs: " in ruled["rulings"][0]["reason"] and str(value) in ruled["rulings"][0]["reason"]
    recorded = {"at_least": 0.1, "protocol": {key: value}}
    assert f"{key} differs" in ruling(results, claim(measured((1.0, "good")), recorded))["reason"]


def test_what_else_cannot_be_compared_is_refused_with_the_difference(results):
    few = claim(measured((1.0, "good"), (-1.0, "few")), {"at_least": 0.1})
    evaluation(results / "few", HALF[:170])
    assert "items differs: 200 and 170" in ruling(results, few)["reason"]
    evaluation(results / "few", HALF, asked="otherwise ")
    assert "question 0 of task differs between the two sides" in ruling(results, few)["reason"]
    evaluation(results / "few", HALF, value=0.6)
    reason = ruling(results, few)["reason"]
    assert reason == "results/few: task right is 0.6 in its table, and 0.5 by its recorded questions"
    batches = {"at_least": 0.1, "batches": {"32": [0.8, 0.9], "64": [0.8, 0.9]}}
    other = claim(measured((1.0, "good"), batch=16), batches)
    assert ruling(results, other)["reason"] == "the global batch size is 16 here; expected values are for 32, 64"
    assert ruling(results, claim(measured((1.0, "good"), batch=32), batches))["verdict"] == "reproduced"
    publish(results / "lost", {"summary": {"loss": math.nan}})
    lost = claim(measured((1.0, "lost", "summary.loss")), {"at_least": 0.1})
    assert ruling(results, lost)["reason"] == "results/lost: summary.loss is nan"
    unknown = claim(measured((1.0, "good", "task wrong")), {"at_least": 0.1})
    assert ruling(results, unknown)["reason"] == "results/good: has no task wrong; its table has task right"


def test_scores_of_nine_tenths_of_the_questions_are_needed(results):
    rows = [json.loads(line) for line in (results / "half/data/samples/task.jsonl").read_text().splitlines()]
    write_jsonl(results / "half/data/samples/task.jsonl", rows[:170])
    publish(results / "half", json.loads((results / "half/metrics.json").read_text()))
    few = claim(measured((1.0, "good"), (-1.0, "half")), {"at_least": 0.1})
    assert "only 170 of 200 questions are scored on both sides" in ruling(results, few)["reason"]


def test_artifacts_of_other_settings_count_as_not_made(results):
    stale = claim(measured((1.0, "good")), {"at_least": 0.8})
    stale["measured"]["planned"] = {"results/good": of_params(["{}", "other", "lineage"])}
    assert ruling(results, stale)["reason"] == "results/good: it was made with other settings or other code"


def test_a_result_that_is_too_good_and_one_of_few_questions_are_marked(results):
    recorded = claim(measured((1.0, "good")), {"at_least": 0.5, "seeds": [0.60, 0.61, 0.59]})
    assert ruling(results, recorded)["too_good"].startswith("better than the recorded 0.600 ± 0.010")
    usual = claim(measured((1.0, "good")), {"at_least": 0.5, "seeds": [0.85, 0.9, 0.92]})
    assert not ruling(results, usual)["too_good"]
    spread = claim(measured((1.0, "good")), {"at_least": 0.5, "spread": 0.01})
    assert ruling(results, spread)["too_good"]
    evaluation(results / "good", [1.0] * 200, limit=200)
    assert ruling(results, usual)["unpublishable"]


def test_the_first_stage_that_departs_from_the_record_is_named(results):
    weak = claim(measured((1.0, "half")), {"at_least": 0.8})
    weak["measured"]["above"] = {"results/half": ["results/base", "results/half"]}
    publish(results / "base", {"summary": {"eval_loss": 1.0}}, {"steps": 500})
    recorded = {f"results/{name}": snapshot(results / name) for name in ("base", "half")}
    assert ruling(results, weak, recorded=recorded)["departs"] == ""
    publish(results / "base", {"summary": {"eval_loss": 1.5}}, {"steps": 500})
    departs = ruling(results, weak, recorded=recorded)["departs"]
    assert departs == "results/base: eval_loss 1.000 recorded, 1.500 here"
    publish(results / "base", {"summary": {"eval_loss": 1.0001}}, {"steps": 500})
    rounding = ruling(results, weak, recorded=recorded)["departs"]
    assert rounding == "results/base: eval_loss 1.000 recorded, 1.000 here"
    weaker = recorded | {"results/half": recorded["results/half"] | {"numbers": {"task right": 0.9}}}
    departs = ruling(results, weak, recorded=weaker)["departs"]
    assert departs == "results/half: task right 0.900 recorded, 0.500 here", (
        "rounding of another processor comes second"
    )
    publish(results / "base", {"summary": {"eval_loss": 1.0}}, {"steps": 400})
    other = verdict([weak], results, recorded=recorded)
    assert other["rulings"][0]["reason"].startswith("results/base: steps is 400, and 500 in the record")
    assert not other["holds"]


@pytest.mark.parametrize(
    "other, said",
    [
        ({"version": "2.0"}, "tasks.task is version 2.0, 0 examples, 200 questions, and version 1.0"),
        ({"template": "abc"}, "template is abc, and None"),
        ({"dtype": "torch.bfloat16"}, "dtype is torch.bfloat16, and torch.float32"),
        ({"limit": 100}, "limit is 100, and None"),
    ],
)
def test_a_benchmark_that_was_recorded_otherwise_is_not_compared(results, other, said):
    one = claim(measured((1.0, "good")), {"at_least": 0.8})
    recorded = {"results/good": snapshot(results / "good")}
    assert ruling(results, one, recorded=recorded)["verdict"] == "reproduced"
    evaluation(results / "good", [1.0] * 180 + [0.0] * 20, **other)
    ruled = ruling(results, one, recorded=recorded)
    assert ruled["verdict"] == "not-run" and f"results/good: {said}" in ruled["reason"]


def test_other_data_are_not_compared(results):
    one = claim(measured((1.0, "good")), {"at_least": 0.8})
    one["measured"]["above"] = {"results/good": ["results/one/prepare", "results/good"]}
    rows = results / "one/prepare/data/sft/train.jsonl"
    write_jsonl(rows, [{"row": 1}])
    publish(results / "one/prepare", {"splits": {"sft": {"train": 1}}})
    recorded = {"results/one/prepare": snapshot(results / "one/prepare")}
    assert ruling(results, one, recorded=recorded)["verdict"] == "reproduced"
    write_jsonl(rows, [{"row": 2}])
    publish(results / "one/prepare", {"splits": {"sft": {"train": 1}}})
    reason = ruling(results, one, recorded=recorded)["reason"]
    assert reason.startswith("results/one/prepare: its data are not the recorded ones")


def test_the_command_fails_where_the_verdict_does_and_where_a_bit_changed(results, monkeypatch, capsys):
    monkeypatch.chdir(results.parent)
    file = results / "verdict.json"
    good, weak = (claim(measured((1.0, name)), {"at_least": 0.8}) for name in ("good", "half"))
    write_json(file, verdict([good], results))
    assert tool.verdict(file) == 0
    assert capsys.readouterr().out.endswith("1 claims: 1 reproduced\n")
    write_json(file, verdict([weak], results))
    assert tool.verdict(file, record=results / "recorded.json") == 1
    assert "results/half" in json.loads((results / "recorded.json").read_text())
    samples = results / "half/data/samples/task.jsonl"
    samples.write_bytes(samples.read_bytes().replace(b"1.0", b"0.0", 1))
    with pytest.raises(UserError, match="results/half"):
        tool.verdict(file)


def test_the_table_fits_a_terminal_and_says_what_is_needed(results):
    claims = [
        claim(measured((1.0, "good")), {"at_least": 0.8}),
        claim(measured((1.0, "absent")), {"at_least": 0.8}, id="no"),
    ]
    text = table(verdict(claims, results, registered={"it": "its present text is in no commit"}))
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "got 0.900 ± 0.021 over 200 questions",
        "control 0.000",
        "not preregistered",
        "2 claims: 1 reproduced, 1 not-run",
    ):
        assert part in text


def test_git_decides_whether_a_claim_was_stated_before_its_results(tmp_path, monkeypatch):
    def git(*words):
        out = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        return out.stdout.strip()

    def commit(text):
        (tmp_path / "one.yaml").write_text(text)
        git("add", ".")
        git("commit", "-qm", "x")
        return git("rev-parse", "HEAD")

    monkeypatch.setattr(registration, "PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    early = commit("claims:\n  it: {expected: {at_least: 0.8}}\n")
    late = commit("claims:\n  it: {expected: {at_least: 0.8}}\n  other: {expected: {at_least: 0.1}}\n")
    publish(tmp_path / "results/good", {})

    def made_at(commit):
        record = json.loads((tmp_path / "results/good/provenance.json").read_text())
        write_json(tmp_path / "results/good/provenance.json", record | {"git_commit": commit})

    claims = [claim(measured((1.0, "good")), {}, id=key) for key in ("it", "other", "new")]
    made_at(f"{early}+changes")
    reasons = registration.registered(claims, tmp_path)
    assert reasons["it"] == "" and reasons["new"] == "its present text is in no commit"
    assert reasons["other"].startswith(f"its commit {late[:9]} is not among those of results/good")
    made_at(late)
    assert registration.registered(claims, tmp_path)["other"] == ""
    commit("claims:\n  it: {expected: {at_least: 0.5}}\n")
    assert registration.registered(claims, tmp_path)["it"], "its bound was lowered after the result"
    made_at("unknown")
    assert registration.registered(claims, tmp_path)["it"] == "results/good has no commit on record"
