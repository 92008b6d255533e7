"""The command line: exit codes, and words instead of tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import attempt, status
from posttrain.errors import UserError
from posttrain.identity import verify

COMMIT = "a" * 40


def posttrain(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "posttrain", *arguments], cwd=cwd, capture_output=True, text=True)


def test_check_lists_the_stages(root):
    done = posttrain("check", cwd=root)
    assert done.returncode == 0 and "results/tiny/sft" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("status", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("export", "nowhere/manifest.json", "out"), "nowhere"),
        (("prepare", "--config", "nowhere.yaml", "--output", "x/y/manifest.json"), "nowhere.yaml"),
        (("summary", "nowhere"), "nowhere"),
        (("schema", "--folder", "nowhere"), "nowhere/.schema.json.new: No such file or directory"),
        (("base", "--config", "x", "--data", "x", "--output", "x", "--threads", "0"), "found '0', it should"),
        (("wandb-sync",), "no offline runs"),
    ],
)
def test_a_mistake_is_told_in_words(tmp_path, arguments, words):
    done = posttrain(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_stage_that_needs_no_torch_does_not_import_it(root):
    modules = "posttrain.__main__, posttrain.campaign, posttrain.stages.report, posttrain.status"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_a_section_may_be_given_as_json(tmp_path):
    """As the workflow does; a mistake in it has no file and line, and is told all the same."""
    made = posttrain(
        "prepare", "--config", '{"seed": "x"}', "--output", "results/a/prepare/manifest.json", cwd=tmp_path
    )
    assert made.returncode == 2 and "--config: seed: found 'x'" in made.stderr and "Traceback" not in made.stderr
    wrong = posttrain("prepare", "--config", "{", "--output", "results/a/prepare/manifest.json", cwd=tmp_path)
    assert wrong.returncode == 2 and "--config: is neither a file nor JSON" in wrong.stderr


def test_status_says_what_waits(root, tmp_path):
    done = posttrain("status", str(root / "config/config.yaml"), cwd=tmp_path)
    assert done.returncode == 0 and "tiny/base" in done.stdout and "waiting" in done.stdout


@pytest.mark.parametrize("code", [0, 1])
def test_status_says_where_slurm_does_not_answer(root, tmp_path, monkeypatch, code):
    """What it knows of SLURM's queue is not there then, and a job in it looks like one that stopped."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = posttrain("status", str(root / "config/config.yaml"), cwd=tmp_path)
    assert done.returncode == 0 and ("SLURM does not answer" in done.stdout) == bool(code), done.stdout


def test_status_tells_what_goes_on_from_what_failed(here):
    """After an attempt without enough GPU memory a stage goes on in the same job, and in the same log."""
    folder, log = Path("results/one/sft"), Path("results/logs/one/sft.log")
    (folder / "checkpoints/0123").mkdir(parents=True)
    beat = {"step": 5, "steps": 9, "loss": "loss 1.0", "left": 60}
    (folder / "checkpoints/0123/progress.json").write_text(json.dumps(beat))
    log.parent.mkdir(parents=True)
    log.write_text("error: out of GPU memory: 2 GB\n")
    assert status.where(folder, {}) == f"failed (see {log})", "control"
    log.write_text(log.read_text() + f"[one/sft] {attempt.SMALLER} 4 at the same global batch\n")
    assert status.where(folder, {}) == "running, step 5/9, loss 1.0, 1:00 left"
    assert status.where(folder, {"rule_sft_wildcards_one": "PD, Priority"}) == "in SLURM's queue (Priority)"
    (folder / "checkpoints/earlier").mkdir()
    known = {"reason": "the loss is nan\nmore", "final": True}
    (folder / "checkpoints/earlier/failed.json").write_text(json.dumps(known))
    assert status.where(folder, {}).startswith("running"), "with other settings it failed; with these it has not"
    log.write_text(log.read_text() + "[one/sft] error: the loss is nan\n")
    assert status.where(folder, {}) == "failed: the loss is nan"
    log.write_text("[one/sft] error: the disk is full\n")
    assert status.where(folder, {}) == f"failed (see {log})"


def test_a_wrong_section_and_a_wrong_manifest_are_told_in_words(tmp_path):
    (tmp_path / "section.yaml").write_text("stesp: 3\n")
    (tmp_path / "manifest.json").write_text("{}\n")
    inputs = ("--data", "manifest.json", "--base", "manifest.json", "--output", "out/sft/manifest.json")
    done = posttrain("sft", "--config", "section.yaml", *inputs, cwd=tmp_path)
    assert done.returncode == 2 and "section.yaml:1: stesp: unknown key (did you mean 'steps'?)" in done.stderr
    (tmp_path / "section.yaml").write_text("steps: 3\nseed: 0\nmax_length: 64\n")
    done = posttrain("sft", "--config", "section.yaml", *inputs, cwd=tmp_path)
    assert done.returncode == 2 and "manifest.json: is no manifest of an artifact" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {}}', '{"files": {"a": {}}}', '{"files": {"a": 3}}'])
def test_what_lists_no_bytes_is_no_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="is no manifest of an artifact"):
        verify(tmp_path / "manifest.json")


def test_what_no_stage_made_is_not_replaced(tmp_path):
    """`--output manifest.json` in a folder of one's own, which holds a data/ of one's own."""
    section = {"text": [{"path": "a.txt"}], "tokenizer": {"vocab_size": 300}, "max_tokens": 64}
    (tmp_path / "section.yaml").write_text(json.dumps(section))
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine").write_text("years of work")
    command = ("prepare", "--config", "section.yaml", "--output")
    done = posttrain(*command, "manifest.json", cwd=tmp_path)
    assert done.returncode == 2 and "data is no artifact's and would be replaced" in done.stderr
    assert (tmp_path / "data/mine").read_text() == "years of work"
    done = posttrain(*command, "out/prepare", cwd=tmp_path)
    assert done.returncode == 2 and "must be called manifest.json" in done.stderr
    for _ in range(2):
        done = posttrain(*command, "out/prepare/manifest.json", cwd=tmp_path)
        assert done.returncode == 0, "control: an artifact replaces its like"


@pytest.mark.parametrize(
    ("stage", "section", "words"),
    [
        ("prepare", '{"world": {}}', ["prepare.tokenizer: missing", "prepare.max_tokens: missing; the workflow"]),
        ("base", "{}", ["base: exactly one of path, hub, scratch"]),
        ("base", '{"scratch": {}}', ["base.scratch.seed: missing"]),
        ("sft", '{"steps": 3}', ["sft.seed: missing", "sft.max_length: missing"]),
    ],
)
def test_a_section_by_hand_lacks_what_the_workflow_fills_in(tmp_path, stage, section, words):
    (tmp_path / "section.yaml").write_text(section)
    inputs = {"base": ["--data", "x"], "sft": ["--data", "x", "--base", "x"]}.get(stage, [])
    done = posttrain(stage, "--config", "section.yaml", *inputs, "--output", f"a/{stage}/manifest.json", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for said in words:
        assert f"section.yaml: {said}" in done.stderr
