"""The command line: exit codes, and words instead of tracebacks."""

import argparse
import inspect
import io
import json
import os
import pkgutil
import subprocess
import sys

import pytest

from posttrain import __main__
from posttrain.config.stages import STAGES
from posttrain.ground import progress
from posttrain.ground.errors import UserError
from posttrain.ground.files import verify

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


def test_threads_wait_briefly_unless_the_environment_says_otherwise(monkeypatch):
    for given, kept in ((None, "3000"), ("0", "0")):
        monkeypatch.setattr(os, "environ", {} if given is None else {"GOMP_SPINCOUNT": given})
        __main__.quiet_libraries("base")
        assert os.environ["GOMP_SPINCOUNT"] == kept


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command with its arguments."""
    (listed,) = (action for action in __main__.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return listed.choices


@pytest.mark.parametrize("name", commands())
def test_every_command_names_a_function_that_takes_its_options(name):
    """It is looked up when the command is called."""
    added = commands()[name]
    signature = inspect.signature(pkgutil.resolve_name(f"posttrain.{added.get_default('run')}"))
    options = {action.dest for action in added._actions} - {"help"}
    if name in STAGES:
        assert list(signature.parameters) == ["arguments"]
        return
    signature.bind(**dict.fromkeys(options))
    with pytest.raises(TypeError):
        signature.bind(**dict.fromkeys({*options, "nosuch"}))


def test_a_stage_that_needs_no_torch_does_not_import_it(root):
    modules = "posttrain.__main__, posttrain.dag.campaign, posttrain.stages.report, posttrain.tools.status"
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


def test_a_wrong_section_and_a_wrong_manifest_are_told_in_words(tmp_path):
    (tmp_path / "section.yaml").write_text("stesp: 3\n")
    (tmp_path / "manifest.json").write_text("{}\n")
    inputs = ("--data", "manifest.json", "--base", "manifest.json", "--output", "out/sft/manifest.json")
    done = posttrain("sft", "--config", "section.yaml", *inputs, cwd=tmp_path)
    assert done.returncode == 2 and "section.yaml:1: stesp: unknown key (did you mean 'steps'?)" in done.stderr
    (tmp_path / "section.yaml").write_text("steps: 3\nseed: 0\nmax_length: 64\n")
    done = posttrain("sft", "--config", "section.yaml", *inputs, cwd=tmp_path)
    assert done.returncode == 2 and "manifest.json: is not a manifest of an artifact" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {}}', '{"files": {"a": {}}}', '{"files": {"a": 3}}'])
def test_what_lists_no_bytes_is_no_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="is not a manifest of an artifact"):
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
    assert done.returncode == 2 and "data is no artifact and would be replaced" in done.stderr
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


def test_a_terminal_of_another_encoding_ends_no_run(monkeypatch):
    """As with `PYTHONIOENCODING=ascii`: the table at a run's end has a plus-minus sign."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(UnicodeEncodeError):
        print("control: 0.4 ± 0.1")
    progress.print_any_text()
    print("0.4 ± 0.1", flush=True)
    assert stream.buffer.getvalue().endswith(b"0.4 ? 0.1\n")
