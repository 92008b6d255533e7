"""The hub through the workflow: a pinned model and a data set, fetched once and then used without a network."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import fake_hub, files_of, repo

pytestmark = pytest.mark.slow
MODEL, DATA = (hashlib.sha1(name).hexdigest() for name in (b"model", b"data"))


@pytest.fixture(scope="module")
def hub(shared):
    lines = [{"prompt": f"Once there were {n} cats.", "completion": f" Then came {n * 7} dogs."} for n in range(60)]
    data = {"train.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}
    model = repo("models", "org/tiny", {MODEL: files_of(shared / "data/models/stories260K")})
    with fake_hub([model, repo("datasets", "org/cats", {DATA: data})]) as served:
        yield served


def snakemake(root: Path, folder: Path, hub, *arguments: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    online = {"PATH": path, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache"), "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    command = ["snakemake", "-s", str(root / "workflow/Snakefile"), "--cores", "2", *arguments]
    return subprocess.run(command, cwd=folder, env=clean | online, capture_output=True, text=True)


def test_a_pinned_model_and_data_set(root, tmp_path, hub):
    (tmp_path / "config/experiments").mkdir(parents=True)
    (tmp_path / "config/config.yaml").write_text("experiments: [hubbed]\n")
    text = f"prepare:\n  sft: [{{dataset: org/cats, revision: {DATA}}}]\n"
    text += f"base: {{hub: {{id: org/tiny, revision: {MODEL}}}}}\n"
    (tmp_path / "config/experiments/hubbed.yaml").write_text(text)
    target = "results/hubbed/base/manifest.json"
    done = snakemake(root, tmp_path, hub, target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {item.name for item in (tmp_path / "results/fetch").iterdir()} == {
        f"models--org--tiny@{MODEL}",
        f"datasets--org--cats@{DATA}",
    }
    asked = len(hub.log)
    again = snakemake(root, tmp_path, hub, target)
    assert "Nothing to be done" in again.stdout + again.stderr and len(hub.log) == asked

    # The bytes are gone, the manifests are there: no reason to rerun; who needs the bytes says what brings them back.
    (tmp_path / "cache").rename(tmp_path / "cache.gone")
    assert "Nothing to be done" in snakemake(root, tmp_path, hub, target, "-n").stdout
    kept = snakemake(root, tmp_path, hub, target, "--forcerun", "base")
    assert kept.returncode == 0 and "reusing an earlier artifact" in kept.stdout + kept.stderr, "it was made before"
    lost = snakemake(root, tmp_path, hub, target, "--forcerun", "base", "--config", "keep_gb=0")
    assert lost.returncode != 0 and len(hub.log) == asked, "stages open no connection"
    command = f"posttrain fetch --config results/fetch/models--org--tiny@{MODEL}/config.yaml"
    assert command in lost.stdout + lost.stderr


def test_a_floating_revision_is_refused_before_any_job(root, tmp_path, hub):
    (tmp_path / "config/experiments").mkdir(parents=True)
    (tmp_path / "config/config.yaml").write_text("experiments: [hubbed]\n")
    text = "prepare:\n  sft: [{dataset: org/cats, revision: main}]\nbase: {hub: {id: org/tiny, revision: main}}\n"
    (tmp_path / "config/experiments/hubbed.yaml").write_text(text)
    asked = len(hub.log)
    done = snakemake(root, tmp_path, hub)
    assert done.returncode == 2 and done.stderr.count("'main' can move") == 2 and len(hub.log) == asked
