"""Every attempt at a stage is counted, whatever its end, with what it took; and the sums say what gave no result."""

import json
import math
import os
import shutil
import signal
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.ground.errors import Interrupted, UserError
from posttrain.ground.files import read_json, write_json
from posttrain.jobs import cards, compute, provenance, slurm
from posttrain.reporting import compute as reported
from posttrain.tools.clean import clean

SAVED = "told to stop (SIGTERM): saved at step 3 of 9; the next run continues"
SAY = "import json, os, sys; json.dump({'code': %d, 'message': %r}, open(os.environ['POSTTRAIN_OUTCOME'], 'w')); "
NOTE = "import json, os; json.dump(%r, open(os.environ['POSTTRAIN_NOTES'], 'w')); "
FAIL = "import os; os.makedirs('results/x/sft/checkpoints/a1', exist_ok=True); "
FAIL += "json.dump({'reason': 'NaN at step 3'}, open('results/x/sft/checkpoints/a1/failed.json', 'w')); exit(1)"
ENDS = {
    "": ("done", ""),
    NOTE % {"reused": True, "identity": "a1"}: ("reused", ""),
    SAY % (2, "error: the data is empty\nerror: so is the rest") + "exit(2)": ("failed", "the data is empty"),
    NOTE % {"identity": "a1"} + FAIL: ("failed", "NaN at step 3"),
    "exit(3)": ("failed", "exit code 3"),
    "exit(77)": ("failed", "exit code 77"),
    SAY % (75, SAVED) + "exit(75)": ("interrupted", SAVED),
    "import os, signal, time; os.kill(os.getppid(), 15); time.sleep(99)": ("interrupted", "SIGTERM"),
    "import os; os.kill(os.getpid(), 15)": ("interrupted", "SIGTERM"),
    "exit(130)": ("interrupted", "Ctrl-C"),
    "import os; os.kill(os.getpid(), 9)": ("killed", "SIGKILL"),
    "exit(137)": ("killed", "SIGKILL"),
}  # fmt: skip


def recorded(artifact: str = "x/sft") -> list[dict]:
    """The accounts of an artifact as they are on disk."""
    return [read_json(file) for file in sorted(Path("results/compute", artifact).glob("*.json"))]


@pytest.mark.parametrize(("script", "end"), ENDS.items())
def test_every_end_of_a_stage_is_on_record(stage, script, end):
    try:
        stage(script, {"batch_size": 1})
    except UserError:  # one sequence did not fit
        assert "77" in script
    (account,) = recorded()
    assert (account["outcome"], account["reason"]) == end
    assert account["stage"] == "sft" and account["gpus"] == 0 and account["processes"] == 1


def test_what_an_attempt_took_is_measured(stage):
    """CPU seconds and memory of the stage and of the processes that it started, and no others."""
    script = (
        "import os, time\nif child := os.fork():\n os.waitpid(child, 0)\nelse:\n while time.process_time() < 0.3: pass"
    )
    stage(script + "\nheld = b'x' * 10**8")
    (first,) = recorded()
    assert first["cpu_seconds"] >= 0.3 and first["peak_memory_mb"] > 95
    assert first["seconds"] >= 0.3 and first["host"] and first["started"].endswith("+00:00")
    shutil.rmtree("results/compute")
    stage("")
    assert recorded()[0]["cpu_seconds"] < first["cpu_seconds"], "each attempt has its own"


def test_a_micro_batch_that_did_not_fit_is_an_attempt_of_its_own(stage):
    script = "import sys; sys.exit(77 if '--micro-batch-size' not in sys.argv else 0)"
    assert stage(script) == 0
    assert sorted(one["outcome"] for one in recorded()) == ["done", "failed"]


def test_a_stage_out_of_memory_in_its_job_is_told_from_one_that_was_killed(stage, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(slurm.SITE, "{}")
    asked = {"field": lambda job, key: "", "refusal": lambda *_, **__: "no node", "requeue": lambda *_, **__: None}
    kill = "import os; os.kill(os.getpid(), 9)"
    stage(kill, **asked, oom_kills=lambda: 0)
    assert [(one["reason"], one["job"]) for one in recorded()] == [("SIGKILL", "7")], "control"
    shutil.rmtree("results/compute")
    stage(kill, **asked, oom_kills=lambda: 1)
    assert [(one["outcome"], one["reason"]) for one in recorded()] == [("killed", "out of memory")]


def forked(function) -> int:
    """Run a function in a process of its own."""
    if process := os.fork():
        return process
    try:
        function()
    finally:
        os._exit(0)


def waited(for_what) -> None:
    """Wait until something is so, two minutes at most."""
    end = time.monotonic() + 120
    while not for_what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_attempt_that_was_killed_with_its_parent_is_counted_from_below(stage, monkeypatch):
    monkeypatch.setattr(compute, "BEAT", 0.05)
    script = NOTE % {"identity": "a1"} + "import time; open('stage', 'w').write(str(os.getpid()))\nwhile True: pass"
    parent = forked(lambda: stage(script))
    waited(lambda: recorded() and recorded()[0].get("cpu_seconds", 0) > 0.1 and recorded()[0]["identity"])
    waited(lambda: Path("stage").is_file() and Path("stage").read_text())
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    os.kill(int(Path("stage").read_text()), signal.SIGKILL)
    (left,) = recorded()
    assert left["outcome"] is None and left["seconds"] > 0.1
    account("x/sft", "done", identity="b2")
    assert killed()["outcome"] == "" and not killed()["result"], "other settings gave another result"
    assert reported.in_words([killed()]).startswith("1 attempt, 1 without a recorded end, at least ")
    write_json(Path("results/x/sft/provenance.json"), PROVENANCE | {"identity": "a1"})
    assert killed()["result"], "a stage that outlived its parent has made the artifact"


def killed() -> dict:
    """The attempt without an end, as the report reads it."""
    return next(one for one in reported.attempts(Path("results")) if one["identity"] == "a1")


def test_a_stage_that_is_run_by_hand_accounts_for_itself(here):
    output = Path("results/x/sft/manifest.json")
    ends = {
        None: ("done", ""), Interrupted("saved"): ("interrupted", "saved"), UserError("a", "b"): ("failed", "a"),
        SystemExit(75): ("interrupted", "75"), KeyboardInterrupt(): ("interrupted", "KeyboardInterrupt"),
        ZeroDivisionError("by zero"): ("failed", "by zero"),
    }  # fmt: skip
    for error, end in ends.items():
        try:
            with compute.by_hand(output, "sft"):
                compute.note(identity="a1")
                if error:
                    raise error
        except BaseException as raised:
            assert raised is error
        (account,) = recorded()
        assert (account["outcome"], account["reason"], account["identity"]) == (*end, "a1")
        shutil.rmtree("results")
    with compute.by_hand(output, "sft"):
        compute.note(reused=True)
    assert recorded()[0]["outcome"] == "reused"
    with compute.by_hand(here / "elsewhere/manifest.json", "sft"):
        pass
    assert len(list(here.rglob("*.json"))) == 1, "of no project's results"


def test_an_attempt_and_its_stage_make_one_account(here, monkeypatch):
    monkeypatch.setenv(compute.NOTES, str(here / "notes.json"))
    with compute.by_hand(Path("results/x/sft/manifest.json"), "sft"):
        compute.note(identity="a1")
    assert read_json(here / "notes.json") == {"identity": "a1"} and not Path("results").exists()
    monkeypatch.setenv("RANK", "1")
    compute.note(identity="b2")
    assert read_json(here / "notes.json") == {"identity": "a1"}, "the first process speaks for all"


def test_many_attempts_that_end_at_the_same_time_lose_nothing(here):
    def several(number: int) -> None:
        for _ in range(20):
            account = compute.Account(Path("results/x/sft/manifest.json"), "sft")
            account.end("failed", f"of {number}")

    for process in [forked(lambda number=number: several(number)) for number in range(6)]:
        os.waitpid(process, 0)
    assert sorted(one["reason"] for one in recorded()) == sorted(
        f"of {number}" for number in range(6) for _ in range(20)
    )
    assert {one["outcome"] for one in recorded()} == {"failed"}
    assert not list(Path("results/compute").rglob(".*")), "no part of a file is left"


def test_another_user_of_the_group_may_account_beside(here):
    """In the same folder; each file has one writer."""
    before = os.umask(0o002)
    try:
        compute.Account(Path("results/x/sft/manifest.json"), "sft")
    finally:
        os.umask(before)
    for path in Path("results").rglob("*"):
        assert path.stat().st_mode & stat.S_IWGRP, path


def test_a_disk_without_room_fails_no_stage(stage):
    Path("results").mkdir()
    Path("results/compute").write_text("a file in the place of the folder")
    assert stage("") == 0
    shutil.rmtree("results")
    assert stage("") == 0 and recorded(), "control"


def test_accounts_outlive_the_artifact_and_clean(stage):
    stage("exit(1)")
    shutil.rmtree("results/x")
    plan = SimpleNamespace(folders=lambda: [])
    clean([plan], delete=True)
    assert len(recorded()) == 1
    Path("results/x/sft").mkdir(parents=True)
    write_json(Path("results/x/sft/manifest.json"), {})
    write_json(Path("results/x/sft/provenance.json"), {})
    assert "deleted" in clean([plan], delete=True) and not Path("results/x/sft").exists(), "control"
    assert len(recorded()) == 1


def test_the_gpus_of_an_attempt(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\n[ "$2" = 1 ] && echo NVIDIA H200\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert cards.given({"CUDA_VISIBLE_DEVICES": "1,3"}) == {"gpus": 2, "gpu": "NVIDIA H200"}
    assert cards.given({"CUDA_VISIBLE_DEVICES": "3"}) == {"gpus": 1, "gpu": None}, "which nvidia-smi does not know"
    assert cards.given({"SLURM_GPUS_ON_NODE": "4"}) == {"gpus": 4, "gpu": None}
    for none in ({}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}):
        assert cards.given(none) == {"gpus": 0, "gpu": None}
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 99\n")
    monkeypatch.setattr(cards, "PATIENCE", 0.2)
    assert cards.given({"CUDA_VISIBLE_DEVICES": "1"}) == {"gpus": 1, "gpu": None}, "a hung driver holds up no stage"


def test_gpus_that_were_reserved_count_also_where_fewer_were_used(stage, monkeypatch):
    monkeypatch.setattr(cards, "given", lambda environment: {"gpus": 4, "gpu": None})
    stage(NOTE % {"gpus": 1, "gpu": "NVIDIA L4"})
    assert (recorded()[0]["gpus"], recorded()[0]["gpu"]) == (4, "NVIDIA L4")
    monkeypatch.setattr(cards, "given", lambda environment: {"gpus": 0, "gpu": None})
    shutil.rmtree("results/compute")
    stage(NOTE % {"gpus": 2})
    assert recorded()[0]["gpus"] == 2, "control: it sees them without a reservation"


def test_an_error_that_left_cuda_unusable_is_not_hidden_by_another(monkeypatch):
    """The stage's processes are asked for their GPUs at its end, whatever that was."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert provenance.of_gpu() == {"gpus": 2, "gpu": "NVIDIA L4", "peak_gpu_memory_mb": 3}

    def unusable():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", unusable)
    assert provenance.of_gpu() == {}


PROVENANCE = {"stage": "sft", "params": ["{}", "", ""], "inputs": {}}
HOUR = {"stage": "sft", "seconds": 3600, "cpu_seconds": 7200, "gpus": 0, "peak_memory_mb": 900}


def account(artifact: str, outcome: str | None, number: int = 0, **fields) -> None:
    """An account on disk."""
    file = Path("results/compute", artifact, f"20261130T10000{number}-0000000{number}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, HOUR | {"outcome": outcome, "identity": "a1", "reason": "", "started": "2026-11-30"} | fields)


def campaign(*artifacts: str) -> dict:
    """A campaign of one experiment's artifacts."""
    stages = {name.partition("/")[2]: f"results/{name}" for name in artifacts}
    return {"experiments": [{"name": "x", "seed": 0, "stages": stages}]}


def test_the_sums_are_those_of_the_attempts(here):
    account("x/sft", "interrupted")
    account("x/sft", "done", 1, gpus=2, gpu="NVIDIA H100 80GB HBM3", peak_gpu_memory_mb=5000)
    account("x/sft", "failed", 2, identity="b2", reason="NaN")
    account("x/sft", None, 3, identity=None, seconds=1800, cpu_seconds=None)
    account("other/sft", "done", 4)
    sums = reported.compute(campaign("x/sft"), [], here / "results")
    whole = sums["total"]
    assert whole == sums["stages"]["sft"]
    assert [whole[key] for key in ("attempts", "done", "interrupted", "failed", "unended")] == [4, 1, 1, 1, 1]
    assert (whole["hours"], whole["gpu_hours"], whole["cpu_hours"]) == (3.5, 2.0, 6.0)
    assert (whole["peak_memory_mb"], whole["peak_gpu_memory_mb"]) == (900, 5000)
    assert whole["kwh"] == pytest.approx(6 * 0.012 + 2 * 0.7)
    assert whole["hours_without_result"] == 1.5, "the interrupted one was continued to its end"
    assert whole["share_without_result"] == pytest.approx(1.5 / 3.5)
    assert [one["reason"] for one in sums["without_result"]] == ["NaN", ""]
    assert sums["other"]["hours"] == 1.0, "of another experiment"
    assert sums["by_provenance"] == 0 and sums["unknown_gpus"] == []


def test_a_gpu_of_unknown_power_is_named_and_not_counted(here):
    account("x/sft", "done", gpus=1, gpu="NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    sums = reported.compute(campaign("x/sft"), [], here / "results")
    assert sums["unknown_gpus"] == ["NVIDIA A100-SXM4-40GB MIG 1g.5gb"]
    assert sums["total"]["kwh"] == pytest.approx(0.024)


def test_an_artifact_without_accounts_counts_by_its_provenance(here):
    made = {"seconds": 1800, "cpu_seconds": 3600, "shape": {"device": "NVIDIA L4", "processes": 2}}
    artifact = {"name": "results/x/sft", "stage": "sft", "provenance": made}
    sums = reported.compute(campaign("x/sft"), [artifact], here / "results")
    assert (sums["by_provenance"], sums["total"]["gpu_hours"]) == (1, 1.0)
    assert sums["total"]["kwh"] == pytest.approx(0.012 + 0.072)
    account("x/sft", "done")
    assert reported.compute(campaign("x/sft"), [artifact], here / "results")["by_provenance"] == 0, "control"


WRONG = {"seconds": "long", "gpus": -1, "cpu_seconds": math.inf, "peak_memory_mb": 10**400, "identity": [1]}


@pytest.mark.parametrize("text", ["", "[1]", json.dumps(WRONG | {"outcome": "fine"}), "{"])
def test_a_malformed_account_counts_as_an_attempt_of_unknown_cost(here, text):
    account("x/sft", "done")
    (file,) = Path("results/compute").rglob("*.json")
    file.write_text(text)
    sums = reported.compute(campaign("x/sft"), [], here / "results")["total"]
    assert (sums["attempts"], sums["unended"], sums["hours"]) == (1, 1, 0)
    json.dumps(sums, allow_nan=False)
