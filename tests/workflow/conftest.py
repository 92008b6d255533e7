"""What the tests of decisions share: a campaign of every stage that looks done, and a package that may be edited."""

import os
import shutil
from pathlib import Path

import pytest
from fabricated import fabricate, forget

from posttrain.dag import campaign
from posttrain.ground import code

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    """The campaign of every stage, done, in a folder of its own with the project's rules."""
    folder = tmp_path_factory.mktemp("rerun")
    for name in ("workflow/Snakefile", "workflow/rules", "workflow/report", "workflow/profiles", "envs"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(root / name)
    shutil.copytree(HERE / "whole", folder / "config")
    for name in ("a.jsonl", "b.jsonl", "a.jinja"):
        (folder / name).write_text(name)
    (folder / "reward.py").write_text(
        "def short(prompt, reply, answer): ...\n\n\ndef long(prompt, reply, answer): ...\n"
    )
    task = "task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: a.jsonl}}\ntest_split: test\n"
    for name, text in {"own": "a", "other": "b", "called": "!function reward.short"}.items():
        (folder / f"{name}.yaml").write_text(f"{task}doc_to_text: {text}\ndoc_to_target: b\n")
    with open(folder / "called.yaml", "a") as file:
        file.write("process_results: !function reward.long\n")
    for name in ("model", "model-b"):
        (folder / name).mkdir()
        for part in ("config.json", "tokenizer.json", "model.safetensors"):
            (folder / name / part).write_text("{}")
    previous = Path.cwd()
    os.chdir(folder)
    fabricate(campaign.load("config/config.yaml"))
    yield folder
    os.chdir(previous)


@pytest.fixture
def package(done, root, tmp_path, monkeypatch):
    """A copy of the package that may be edited, whose code counts; and the campaign as at first."""
    shutil.copy(HERE / "whole/experiments/whole.yaml", "config/experiments/whole.yaml")
    shutil.copytree(root / "workflow/posttrain", tmp_path / "posttrain", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", tmp_path / "posttrain")
    forget()
    fabricate(campaign.load("config/config.yaml"))
    yield tmp_path / "posttrain"
    monkeypatch.undo()
    forget()
