"""explain and diff: a number leads to its bytes, and two runs part where they differ and nowhere else."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from posttrain.ground.errors import UserError
from posttrain.ground.files import manifest_of, sha256, write_json, write_jsonl
from posttrain.tools.diff import diff
from posttrain.tools.explain import explain

VERSIONS = {"torch": "2.13.0", "trl": "1.16.0"}


def publish(folder, stage, metrics, inputs=(), settings=None, **more):
    """An artifact with its provenance and manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", metrics)
    digests = {role: {str(file): sha256(file)} for role, file in inputs}
    record = {"stage": stage, "params": [json.dumps(settings or {}), "c0de", "f00d"], "inputs": digests}
    record |= {"started": "2026-11-30T10:00:00", "seconds": 12.0, "host": "node7", "job": "1234", "git_commit": "abc"}
    record |= {"shape": {"versions": VERSIONS, "instructions": "AVX512"}, "code": {"stages.sft:sft": "1"}}
    write_json(folder / "provenance.json", record | more)
    parts = [name for name in ("data", "model", "metrics.json") if (folder / name).exists()]
    write_json(folder / "manifest.json", manifest_of(folder, parts))
    return folder / "manifest.json"


def losses(*values):
    return {"history": [{"step": 10 * (n + 1), "loss": value} for n, value in enumerate(values)]}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Data, a policy and its judgement."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path.relative_to(tmp_path) / "results/one"
    write_jsonl(folder / "prepare/data/sft/train.jsonl", [{"row": 1}])
    data = publish(folder / "prepare", "prepare", {"splits": {"sft": {"train": 1}}}, settings={"seed": 0})
    (folder / "sft/model").mkdir(parents=True)
    (folder / "sft/model/adapter.safetensors").write_bytes(b"weights")
    policy = publish(folder / "sft", "sft", losses(2.0, 1.5, 1.0), [("data", data)], {"rank": 16})
    write_jsonl(folder / "evaluate/sft/data/samples/task.jsonl", [{"doc_id": 0}, {"doc_id": 1}])
    row = {"task": "task", "metric": "right", "value": 0.5, "stderr": 0.1, "n": 2}
    publish(folder / "evaluate/sft", "evaluate", {"rows": [row]}, [("policy", policy), ("data", data)])
    return tmp_path / "results"


def test_a_number_leads_to_its_questions_weights_data_settings_and_job(results):
    text = explain("one/evaluate/sft", "task right")
    assert text.startswith("one/evaluate/sft: task right 0.500 ± 0.100, 2 questions\n")
    questions = "results/one/evaluate/sft/data/samples/task.jsonl"
    assert f"from {questions}: 2 questions, sha256 {sha256(results.parent / questions)[:16]}" in text
    order = [text.index(f"\nresults/one/{name}\n") for name in ("evaluate/sft", "sft", "prepare")]
    assert order == sorted(order), "the nearest first"
    weights = sha256(results / "one/sft/model/adapter.safetensors")[:16]
    for part in (
        f"model/adapter.safetensors sha256 {weights}, 7 bytes\n",
        'settings  {"rank": 16}',
        "12.0 s, on node7, job 1234",
        "commit    abc",
        "again     no campaign here has this artifact",
        "versions    torch 2.13.0, trl 1.16.0",
    ):
        assert part in text
    assert "another one now" not in text


def test_bytes_that_changed_since_are_told(results):
    (results / "one/sft/model/adapter.safetensors").write_bytes(b"altered")
    assert explain("one/sft").count("it is another one now") == 1
    shutil.rmtree(results / "one/prepare")
    text = explain("one/sft")
    assert "prepare/manifest.json" in text and "(it is not here)" in text
    assert "its provenance.json is gone" in text


def test_an_artifact_and_a_number_that_are_not_there_are_named(results):
    with pytest.raises(
        UserError, match=r"did you mean 'one/evaluate/sft'.*; there are one/evaluate/sft, one/prepare, one/sft"
    ):
        explain("one/evaluat/sft")
    with pytest.raises(UserError, match=r"has no 'task wrong'; it has task right"):
        explain("one/evaluate/sft", "task wrong")


def test_the_command_that_remakes_an_artifact_is_that_of_a_campaign_that_has_it(results):
    """Of the one that ran last; a folder without such a run asks the campaigns in config/."""
    lacking = "again     no campaign here has this artifact"
    assert explain("one/sft").count(lacking) == 2, "control"
    ran = results.parent / ".snakemake/campaigns"
    ran.mkdir(parents=True)
    claims = [{"measured": {"above": {"results/one/evaluate/sft": []}}, "control": {"above": {}}}]
    stages = {"sft": "results/one/sft", "prepare": "results/one/prepare"}
    summary = {"owners": {}, "configfile": "my campaigns/a.yaml", "claims": claims, "experiments": [{"stages": stages}]}
    write_json(ran / "1.json", summary)
    write_json(ran / "2.json", {"campaign": {}, "experiments": {}})  # the plan itself, which is frozen for its jobs
    assert lacking in explain("one/sft"), "control: its file is gone"
    for file in ("my campaigns/a.yaml", "config/config.yaml"):
        (results.parent / file).parent.mkdir()
        (results.parent / file).touch()
    command = "again     snakemake --cores 2 --force results/one/sft/manifest.json --config keep_gb=0"
    assert f"{command} --configfile 'my campaigns/a.yaml'" in explain("one/sft")
    assert lacking not in explain("one/evaluate/sft"), "one that a claim needs"
    write_json(ran / "3.json", {**summary, "configfile": "", "claims": []})
    os.utime(ran / "1.json", (1, 1))
    assert f"{command}\n" in explain("one/sft"), "the default one"


def test_the_attempts_at_an_artifact_are_told(results):
    for number, outcome in enumerate(("interrupted", "done")):
        account = {"stage": "sft", "outcome": outcome, "seconds": 1800}
        folder = results / "compute/one/sft"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{number}.json", account)
    assert "attempts  2 attempts, 1 interrupted, 1.000 h in all" in explain("one/sft")
    assert "attempts" not in explain("one/prepare"), "control"


def test_what_lies_outside_of_the_results_is_explained_too(results):
    base = publish(results.parent / "elsewhere/base", "base", {})
    publish(Path("results/one/sft"), "sft", losses(1.0), [("base", base)])
    assert f"\n{base.parent}\n  made      2026-11-30T10:00:00, 12.0 s, on node7" in explain("one/sft")


@pytest.mark.parametrize("place", ["one/sft", "results/one/sft/", "./results/one/sft", "results/one/sft/manifest.json"])
def test_an_artifact_may_be_named_by_its_folder(results, place):
    assert explain(place) == explain("one/sft")


@pytest.mark.parametrize("place", ["..", "/etc", "results/../..", "", "results"])
def test_what_is_no_artifact_is_told(results, place):
    with pytest.raises(UserError, match=r"is not in results|there is no such artifact"):
        explain(place)


@pytest.mark.parametrize(
    "file, text, told",
    [
        ("metrics.json", None, "no metrics.json; posttrain verify"),
        ("metrics.json", '{"rows": [', "metrics.json cannot be read.*; posttrain verify"),
        ("metrics.json", '{"rows": [{"task": 1}]}', "its records cannot be read"),
        ("metrics.json", "[]", "metrics.json cannot be read"),
        ("lm_eval.json", '{"groups"', "lm_eval.json cannot be read"),
    ],
)
def test_records_that_cannot_be_read_are_told(results, file, text, told):
    folder = results / "one/evaluate/sft"
    (folder / file).unlink(missing_ok=True) if text is None else (folder / file).write_text(text)
    with pytest.raises(UserError, match=told):
        explain("one/evaluate/sft", "task right")
    assert file == "lm_eval.json" or "its records cannot be read" in diff("one", "one")
    assert explain("one/sft"), "the others are shown"


RECORDS = [
    {}, {"stage": "sft"}, {"stage": "sft", "params": ["[]", "", ""], "inputs": {}, "shape": 3, "seconds": "long"},
    {"stage": "sft", "params": ["{}", "", ""], "inputs": {"base": {"elsewhere/manifest.json": "d1"}}, "code": []},
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_of_another_program_ends_in_no_traceback(results, record):
    write_json(results / "one/sft/provenance.json", record)
    try:
        assert explain("one/sft")
    except UserError as error:
        assert "its records cannot be read" in str(error)
    shutil.copytree(results, results.with_name("other"))
    write_json(results.with_name("other") / "one/sft/provenance.json", {**record, "shape": {}, "code": {}})
    assert diff("results", "other")


def test_control_characters_are_made_visible(results):
    name = "o\x1b[31mne"
    (results / "one").rename(results / name)
    text = explain(f"{name}/evaluate/sft") + diff(name, name)
    with pytest.raises(UserError) as error:
        explain(f"{name}/nothing")
    assert "\x1b" not in text + str(error.value) and "⟨U+001B⟩" in text


def changed(results, **more):
    """A copy of the results whose policy is published anew: metrics, settings, or keys of its provenance."""
    other = results.with_name("other")
    shutil.copytree(results, other)
    folder = other / "one/sft"
    record = json.loads((folder / "provenance.json").read_text())
    write_json(folder / "provenance.json", record | {key: value for key, value in more.items() if key != "metrics"})
    write_json(folder / "metrics.json", more.get("metrics", json.loads((folder / "metrics.json").read_text())))
    return diff("results", "other")


def test_equal_results_are_alike(results):
    assert changed(results) == "results -> other\nalike: 3 artifacts"


@pytest.mark.parametrize(
    "more, said",
    [
        ({"params": ['{"rank": 32}', "c0de", "f00d"]}, "settings.rank: 16 -> 32"),
        (
            {"shape": {"versions": VERSIONS | {"trl": "1.17.0"}, "instructions": "AVX512"}},
            'versions.trl: "1.16.0" -> "1.17.0"',
        ),
        (
            {"shape": {"versions": VERSIONS, "instructions": "AVX2"}},
            'environment.shape.instructions: "AVX512" -> "AVX2"',
        ),
        ({"params": ['{"rank": 16}', "beef", "f00d"], "code": {"stages.sft:sft": "2"}}, "code: stages.sft: sft"),
        (
            {"metrics": losses(2.0, 1.6, 1.0)},
            "parts after step 10 and by step 20, the next on record: loss 1.500 -> 1.600",
        ),
        ({"metrics": losses(2.0, 1.5)}, "3 -> 2 recorded steps"),
        ({"metrics": losses(2.0, 1.5000001, 1.0)}, "the next on record: loss 1.5 -> 1.5000001"),
        (
            {"metrics": losses(1.9, 1.5, 1.0)},
            "parts by step 10, the first on record: loss 2.000 -> 1.900",
        ),
        ({"metrics": losses(2.0, math.nan, 1.0)}, "by step 20, the next on record: loss 1.500 -> nan"),
        ({"metrics": {"history": [{"step": 11, "loss": 3.0}, *losses(2.0, 1.5, 1.0)["history"]]}}, "3 -> 4 recorded"),
        ({"inputs": {"data": {"results/one/prepare/manifest.json": "other"}}}, "follows from another data"),
    ],
)
def test_what_differs_is_named_with_its_stage_and_nothing_else(results, more, said):
    lines = changed(results, **more).splitlines()
    assert lines[1] == "one/sft" and said in "\n".join(lines[2:-1])
    assert lines[-1] == "alike: 2 artifacts"


def test_a_loss_that_is_recorded_at_every_step_gives_the_step_itself(results):
    write_json(results / "one/sft/metrics.json", {"history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}]})
    other = {"history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}
    assert "  parts at step 2: loss nan -> 1.000\n" in changed(results, metrics=other)
    shutil.rmtree(results.with_name("other"))
    assert changed(results).endswith("alike: 3 artifacts"), "control: nan at the same step"


@pytest.mark.parametrize(
    "file, key", [("trainer_state.json", "log_history"), ("state.json", "history")], ids=["trainers", "ppo"]
)
def test_the_states_that_a_training_kept_give_the_step_itself(results, file, key):
    """They hold every step before them; a curve that is equal up to there begins where they end."""
    state = results / "one/sft/spotchecks/000012"
    state.mkdir(parents=True)
    (results / "one/sft/spotchecks/000003").mkdir()
    steps = [{"step": step, "loss": 2.0} for step in range(1, 13)]
    write_json(state / file, {key: steps})
    later = losses(2.0, 1.6, 1.0)
    assert "  parts after step 12 and by step 20, the next on record: loss 1.500 -> 1.600\n" in changed(
        results, metrics=later
    )
    steps[6]["loss"] = 2.5
    write_json(results.with_name("other") / "one/sft/spotchecks/000012" / file, {key: steps})
    assert "  parts at step 7: loss 2.000 -> 2.500\n" in diff("results", "other")
    (results.with_name("other") / "one/sft/spotchecks/000012" / file).write_text("{")
    assert "its records cannot be read" in diff("results", "other")


def test_bytes_that_no_number_shows_are_told(results):
    """Weights by their digests; rows by the first that differs, with what is around it."""
    other = results.with_name("other")
    shutil.copytree(results, other)
    (other / "one/sft/model/adapter.safetensors").write_bytes(b"altered")
    write_json(other / "one/sft/manifest.json", manifest_of(other / "one/sft", ["model", "metrics.json"]))
    write_jsonl(other / "one/prepare/data/sft/train.jsonl", [{"row": 1}, {"row": 7}])
    write_json(other / "one/prepare/manifest.json", manifest_of(other / "one/prepare", ["data", "metrics.json"]))
    write_jsonl(results / "one/prepare/data/sft/train.jsonl", [{"row": 1}, {"row": 2}])
    lines = diff("results", "other").splitlines()
    assert lines[1:3] == ["one/prepare", "  rows: data/sft/train.jsonl: row 2: '{\"row\": 2}\\n' -> '{\"row\": 7}\\n'"]
    assert lines[3:5] == ["one/sft", "  bytes: model/adapter.safetensors"]


def test_the_stage_where_two_runs_part_is_named_before_those_that_follow_from_it(results):
    """Also where an experiment that uses it comes first by its name."""
    (results / "a").mkdir()
    shutil.copytree(results / "one/evaluate", results / "a/evaluate")
    other = results.with_name("other")
    shutil.copytree(results, other)
    for name in ("a/evaluate/sft", "one/prepare", "one/sft"):
        record = json.loads((other / name / "provenance.json").read_text())
        write_json(other / name / "provenance.json", record | {"python": "3.12"})
    named = [line for line in diff("results", "other").splitlines() if line[0] != " "]
    assert named[1:-1] == ["one/prepare", "one/sft", "a/evaluate/sft"]


def test_an_experiment_has_the_artifacts_that_it_uses_of_others(results):
    """Two that share data differ in what they do with them, not in having any."""
    inputs = [("data", Path("results/one/prepare/manifest.json"))]
    publish(Path("results/two/sft"), "sft", losses(2.0, 1.5, 1.0), inputs, {"rank": 32})
    lines = diff("one", "two").splitlines()
    assert "  settings.rank: 16 -> 32" in lines and lines[-1] == "alike: 1 artifacts"
    assert [line for line in lines if "only in" in line] == ["evaluate/sft: only in one"]


def test_experiments_and_artifacts_can_be_compared(results):
    shutil.copytree(results / "one", results / "two")
    shutil.rmtree(results / "two/evaluate")
    assert diff("one", "two").splitlines() == ["one -> two", "evaluate/sft: only in one", "alike: 2 artifacts"]
    assert diff("one/sft", "two/sft").endswith("alike: 1 artifacts")
    with pytest.raises(UserError, match="three: neither an experiment"):
        diff("one", "three")
