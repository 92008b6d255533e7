"""1, 2 and 4 processes (gloo) learn the same: every trainer's losses, gradient norms and weights."""

import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import killing
import processes
import pytest
from tiny import ROOT, command, dpo, kto, make, reward, scratch, sft

from posttrain.config.sections import Base, Long, Longctx, Prepare, Tokenizer, World
from posttrain.ground.errors import INTERRUPTED, UserError
from posttrain.ground.files import read_json
from posttrain.jobs import launch

pytestmark = pytest.mark.slow
SHORT = dict(batch_size=8, micro_batch_size=4, steps=4, log_steps=1, eval_steps=2)
SHAPES = {1: (4, 2), 2: (4, 1), 4: (2, 1)}  # processes -> (micro-batch, accumulation)
RUNS = ("base", "lora", "qlora", "full", "packed", "reward", "dpo", "kto", "longctx")
WRONG = {  # how the batch is gone through -> run -> what differs
    "accumulation": {"lora": "loss"},  # each process goes through a global batch of its own
    "average": {"lora": "loss"},  # a mean of the processes' means
    # transformers' evaluation: rows count twice; and after one before training (lora) gradients are not added up
    "evaluation": {"base": "eval_loss", "lora": "grad_norm"},
}
SRUN = """#!/bin/bash
[ "$1 $2" = "--nodes=2 --ntasks=2" ] || exit 9
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID=$$ SLURM_STEP_ID=0 SLURM_LAUNCH_NODE_IPADDR=127.0.0.1
"$@" & first=$!
"$@" & wait $! && wait $first
"""


@pytest.fixture(scope="module")
def runs(data, base, tuned_policy, referenced) -> dict:
    """Name -> stage, section and inputs; data sets end within the run, and held-out rows fill no batch."""
    long = make(
        "prepare",
        Prepare(world=World(documents=60, questions=60, test_questions=14, pairs=16,
                            long=Long(context=64, documents=28, questions=5)),
                tokenizer=Tokenizer(vocab_size=512), max_tokens=64),
        Path("results/processes-long/prepare/manifest.json"),
    )  # fmt: skip
    near = make("base", Base(scratch=scratch(context=64)), Path("results/processes-long/base/manifest.json"), data=long)
    on = {"data": data, "base": base, "sft": tuned_policy}
    context = Longctx(seed=0, tuning="qlora", learning_rate=1e-3, **SHORT)
    return {
        "base": ("base", Base(scratch=scratch(**SHORT | {"steps": 24})), {"data": data}),
        "lora": ("sft", sft(method="lora", **SHORT), {"data": data, "base": base}),
        "qlora": ("sft", sft(method="qlora", gradient_checkpointing=True, **SHORT), {"data": data, "base": base}),
        "full": ("sft", sft(method="full", **SHORT), {"data": data, "base": base}),
        "packed": ("sft", sft(method="qlora", packing=True, **SHORT), {"data": data, "base": base}),
        "reward": ("reward", reward(**SHORT), on),
        "dpo": ("dpo", dpo(**SHORT), on | {"reference": referenced}),
        "kto": ("kto", kto(**SHORT | {"beta": 5.0}), on | {"reference": referenced}),
        "longctx": ("longctx", context, {"data": long, "base": near, "policy": near}),
    }


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'workflow'}:{ROOT / 'tests'}"}


def together(runs: dict, count: int, folder: Path, sharded: bool = False) -> Path:
    """Make the runs' artifacts in `count` processes under a folder, which is returned.

    The processes are forked from one that has only imported the libraries (`killing`): that takes each of them seconds.
    """
    killing.prepare()
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        given = (count, free.getsockname()[1], runs, folder, sharded)
    started = [killing.PROCESSES.Process(target=processes.one, args=(rank, *given)) for rank in range(count)]
    for process in started:
        process.start()
    running = {process.sentinel: process for process in started}
    while running and (ended := wait(running, timeout=600)):
        if any(running.pop(sentinel).exitcode for sentinel in ended):
            break  # the others would wait for it
    for process in started:
        process.kill()
        process.join()
    said = "".join((folder / f"said-{rank}").read_text()[-1500:] for rank in range(count))
    assert all(process.exitcode == 0 for process in started), said
    return folder


@pytest.fixture(scope="module")
def made(runs) -> dict[int, Path]:
    """Number of processes -> the folder of all runs; with two, also of those that are made in some other way."""
    alone, right = Path("results/processes-1"), {name: (*run, "") for name, run in runs.items()}
    for name, (stage, section, inputs) in runs.items():
        make(stage, section, alone / name / "manifest.json", **inputs)
    stage, section, inputs = runs["dpo"]
    make(stage, section, Path("results/kept-before/dpo/manifest.json"), **inputs, keep_gb=1.0)
    other = {f"{how}-{name}": (*runs[name], how) for how, seen in WRONG.items() for name in seen}
    other |= {"unseen-dpo": (*runs["dpo"], "unseen"), "untold": (*long(runs), "")}
    two, four = Path("results/processes-2"), Path("results/processes-4")
    return {1: alone, 2: together(right | other, 2, two), 4: together(right, 4, four)}


def long(runs: dict) -> tuple:
    """A run that is not over before it is told to stop."""
    stage, section, inputs = runs["lora"]
    return stage, section.model_copy(update={"steps": 60, "eval_steps": None}), inputs


def furthest(one: Path, other: Path, keys=("loss", "grad_norm", "eval_loss")) -> dict[str, float]:
    """Largest relative difference of two runs' curves, for each key."""
    curves = [read_json(folder / "metrics.json")["history"] for folder in (one, other)]
    found = dict.fromkeys(keys, 0.0)
    for a, b in zip(*curves, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        found |= {key: max(found[key], abs(a[key] - b[key]) / abs(a[key])) for key in keys if key in a}
    return found


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_processes_change_nothing_that_is_learned(made, name, count):
    from safetensors.torch import load_file

    one, other = made[1] / name, made[count] / name
    history = read_json(one / "metrics.json")["history"]
    assert len(history) >= 4 and all({"loss", "grad_norm"} <= entry.keys() for entry in history)
    assert sum("eval_loss" in entry for entry in history) >= 2
    assert max(furthest(one, other).values()) < 1e-5
    file = next((one / "model").glob("*.safetensors")).relative_to(one)
    weights, others = load_file(one / file), load_file(other / file)
    assert max((weights[key] - others[key]).abs().max() for key in weights) < 1e-5
    assert read_json(one / "manifest.json")["files"].keys() == read_json(other / "manifest.json")["files"].keys()


@pytest.mark.parametrize("count", SHAPES)
def test_the_record_says_how_the_batch_was_shared(made, count):
    for name in RUNS:
        shape = read_json(made[count] / name / "provenance.json")["shape"]
        assert (shape["micro_batch"], shape["accumulation"]) == SHAPES[count]
        assert (shape["processes"], shape["threads"], shape["device"]) == (count, 1, "cpu")


def test_only_the_first_process_leaves_something(made):
    for folder in (made[2], made[4]):
        for name in RUNS:
            assert not list((folder / name).glob("checkpoints/*")) and not list((folder / name).glob(".*"))


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_split_is_seen(made, wrong):
    """Control."""
    for name, key in WRONG[wrong].items():
        assert furthest(made[1] / name, made[2] / f"{wrong}-{name}")[key] > 1e-5


def rounded(runs: dict) -> tuple:
    """Full tuning on a bfloat16 base, to whose type the trained weights are rounded after the last evaluation."""
    stage, section, inputs = runs["longctx"]
    model = Base(path=str(inputs["base"].parent / "model"), dtype="bfloat16")
    half = make("base", model, Path("results/processes-half/base/manifest.json"), data=inputs["data"])
    return stage, section.model_copy(update={"tuning": "full"}), inputs | {"base": half, "policy": half}


@pytest.fixture(scope="module")
def sharded(made, runs) -> Path:
    """FSDP on CPUs: each process holds half of every weight, 4-bit ones too; a run that is stopped continues."""
    stage, section, inputs = rounded(runs)
    make(stage, section, made[1] / "rounded" / "manifest.json", **inputs)
    shared = {name: (*runs[name], "") for name in ("qlora", "full", "reward", "dpo", "kto", "longctx")}
    shared |= {"stopped": (*runs["qlora"], "stopped"), "rounded": (stage, section, inputs, "")}
    return together(shared, 2, Path("results/sharded"), sharded=True)


@pytest.mark.parametrize("name", ["qlora", "full", "reward", "dpo", "kto", "longctx", "rounded", "stopped"])
def test_shared_out_weights_learn_the_same(made, sharded, name):
    from safetensors.torch import load_file

    one, other = made[1] / name.replace("stopped", "qlora"), sharded / name
    assert max(furthest(one, other).values()) < 1e-5
    file = next((one / "model").glob("*.safetensors")).relative_to(one)
    weights, others = load_file(one / file), load_file(other / file)
    assert weights.keys() == others.keys()
    assert max((weights[key] - others[key]).abs().max() for key in weights) < 1e-5


def test_the_command_that_launch_builds_for_two_nodes(made, runs, tmp_path, monkeypatch):
    """Each node is an agent of torchrun on this machine, started by what stands for srun."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    stage, section, inputs = runs["dpo"]
    output = Path("results/launched/dpo/manifest.json")
    started = [*launch.command(stage, 1, 2), *command(stage, section, output, inputs)]
    done = subprocess.run(started, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert max(furthest(made[1] / "dpo", output.parent).values()) < 1e-5
    assert read_json(output.parent / "provenance.json")["shape"]["processes"] == 2


def test_the_first_process_says_whether_to_run(made):
    """What it takes from an earlier artifact, the others do not wait for: one that looks for itself may miss it."""
    assert (made[2] / "unseen-dpo/manifest.json").samefile("results/kept-before/dpo/manifest.json")


def attempted(section, output: Path, inputs: dict, *more: str) -> subprocess.Popen:
    """`posttrain attempt` where two GPUs are said to be visible: two processes of torchrun, here on the CPU."""
    whole = [sys.executable, "-m", "posttrain", "attempt", *command("sft", section, output, inputs), *more]
    visible = environment() | {"CUDA_VISIBLE_DEVICES": "0,1"}
    return subprocess.Popen(whole, stderr=subprocess.PIPE, text=True, env=visible)


def test_several_processes_told_to_stop_save_and_continue(made, runs):
    """Those of torchrun save, and what continues makes the bytes of two processes that were not told."""
    _, section, inputs = long(runs)
    folder = Path("results/told-together")
    output = folder / "sft/manifest.json"
    process = attempted(section, output, inputs)
    while not list(output.parent.glob("checkpoints/*/progress.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == INTERRUPTED and not output.exists(), said
    assert "what ended it: told to stop (SIGTERM): saved at step" in said.splitlines()[-1], "below torchrun's own"
    together({"sft": (*long(runs), "")}, 2, folder)
    assert "continuing from a checkpoint of step" in (folder / "said-0").read_text()
    assert read_json(output)["files"] == read_json(made[2] / "untold/manifest.json")["files"]


def test_the_last_line_says_what_ended_several_processes(runs):
    _, section, inputs = runs["lora"]
    process = attempted(section, Path("results/edited/sft/manifest.json"), inputs, "--code", "of another plan")
    said = process.communicate()[1]
    assert process.returncode == 2
    assert "what ended it: error: sft: its code was edited after this run was planned" in said.splitlines()[-1]


def test_a_batch_that_cannot_be_shared_evenly_is_refused(runs, monkeypatch):
    stage, section, inputs = runs["lora"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="batch_size 7 cannot be shared evenly by 2 processes"):
        make(stage, section.model_copy(update={"batch_size": 7}), Path("results/odd/sft/manifest.json"), **inputs)


def test_a_loss_over_the_whole_batch_is_refused(runs, monkeypatch):
    stage, section, inputs = runs["dpo"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="TRL computes sft over a whole batch: start one process"):
        make(stage, section.model_copy(update={"loss": ["sft"]}), Path("results/whole/dpo/manifest.json"), **inputs)
