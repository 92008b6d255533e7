"""`posttrain fetch --shapes`: of a model on the hub, what planning needs and no more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from fake_hub import fake_hub, files_of, repo
from safetensors.numpy import save_file

MODEL = "7" * 40
CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
          "vocab_size": 6000, "intermediate_size": 128, "max_position_embeddings": 256}  # fmt: skip
SHAPES = {"model.embed_tokens.weight": [6000, 64], "model.layers.0.self_attn.q_proj.weight": [64, 64]}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({name: numpy.zeros(shape, "float32") for name, shape in SHAPES.items()}, folder / "model.safetensors")
    bare = repo("models", "org/pickled", {MODEL: {"config.json": b"{}", "pytorch_model.bin": b"x"}})
    with fake_hub([repo("models", "org/tiny", {MODEL: files_of(folder)}), bare]) as served:
        yield served


def posttrain(hub, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    own = {"HF_HOME": str(folder / "cache"), "HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    command = [sys.executable, "-m", "posttrain", *arguments]
    return subprocess.run(command, env=clean | own, cwd=folder, capture_output=True, text=True)


def campaign(folder: Path, id: str, max_tokens: int = 128) -> None:
    """A campaign of one experiment on a model on the hub."""
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (folder / "config/experiments").mkdir(parents=True, exist_ok=True)
    (folder / "config/config.yaml").write_text("experiments: [one]\n")
    prepare = {"sft": [{"path": "rows.jsonl"}], "max_tokens": max_tokens}
    one = {"prepare": prepare, "base": {"hub": {"id": id, "revision": MODEL}}, "sft": {"method": "lora"}}
    (folder / "config/experiments/one.yaml").write_text(json.dumps(one))


def test_plan_and_check_speak_before_the_weights_are_here(hub, tmp_path):
    campaign(tmp_path, "org/tiny")
    before = posttrain(hub, tmp_path, "plan", "--all")
    assert "unknown until fetched" in before.stdout, "the control"
    sent = hub.sent
    done = posttrain(hub, tmp_path, "fetch", "--shapes")
    assert done.returncode == 0, done.stderr
    assert hub.sent - sent < 110_000 < 6000 * 64 * 4, "the headers come, the weights do not"
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    kept = json.loads((tmp_path / f"results/fetch/models--org--tiny@{MODEL}/shapes.json").read_text())
    assert kept == {"revision": MODEL, "config": CONFIG, "weights": SHAPES}
    asked = len(hub.log)
    assert "unknown until fetched" not in posttrain(hub, tmp_path, "plan", "--all").stdout
    tight = posttrain(hub, tmp_path, "plan", "--all", "--gpu-memory-gb", "0.1")
    assert tight.returncode == 2 and "one/sft: needs" in tight.stderr
    campaign(tmp_path, "org/tiny", max_tokens=300)
    said = posttrain(hub, tmp_path, "check")
    assert said.returncode == 2 and "300 is longer than the base's context (256)" in said.stderr
    assert len(hub.log) == asked, "neither opens a connection"


def test_what_cannot_be_planned_is_told_in_words(hub, tmp_path):
    campaign(tmp_path, "org/pickled")
    said = posttrain(hub, tmp_path, "fetch", "--shapes")
    assert said.returncode == 2 and "is not a safetensors repo" in said.stderr and "Traceback" not in said.stderr
    campaign(tmp_path, "org/nobody")
    said = posttrain(hub, tmp_path, "fetch", "--shapes", "config/config.yaml")
    assert said.returncode == 2 and "no such model" in said.stderr
    said = posttrain(hub, tmp_path, "fetch")
    assert said.returncode == 2 and "give --config and --output, or --shapes" in said.stderr
