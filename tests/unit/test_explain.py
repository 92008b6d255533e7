"""explain and diff: a number leads to its bytes, and two runs part where they differ and nowhere else."""

import json
import shutil

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
        "12 s, on node7, job 1234",
        "commit    abc",
        "again     snakemake --cores 2 --force results/one/sft/manifest.json",
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
        ({"metrics": losses(2.0, 1.6, 1.0)}, "parts by step 20 (recorded every 10 steps): loss 1.5 -> 1.6"),
        ({"metrics": losses(2.0, 1.5)}, "3 -> 2 recorded steps"),
    ],
)
def test_what_differs_is_named_with_its_stage_and_nothing_else(results, more, said):
    lines = changed(results, **more).splitlines()
    assert lines[1] == "one/sft" and said in "\n".join(lines[2:-1])
    assert lines[-1] == "alike: 2 artifacts"


def test_experiments_and_artifacts_can_be_compared(results):
    shutil.copytree(results / "one", results / "two")
    shutil.rmtree(results / "two/evaluate")
    assert diff("one", "two").splitlines() == ["one -> two", "evaluate/sft: only in one", "alike: 2 artifacts"]
    assert diff("one/sft", "two/sft").endswith("alike: 1 artifacts")
    with pytest.raises(UserError, match="three: neither an experiment"):
        diff("one", "three")
