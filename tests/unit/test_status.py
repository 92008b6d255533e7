"""What `posttrain status` and the end of a failed run say of each stage."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.dag.artifacts import Artifact
from posttrain.jobs import attempt
from posttrain.tools import status
from posttrain.training import interruption

CANCELLED = """[Sat Nov 28 03:28:12 2026]
Error in rule sft:
    message: SLURM-job '3' failed, SLURM status is: 'CANCELLED'. Detailed failure reason unavailable
    jobid: 8
    input: results/one/prepare/manifest.json
    output: results/one/sft/manifest.json, results/one/sft/metrics.json
    log: results/logs/one/sft.log, {job} (check log file(s) for error details)
    shell:
        posttrain attempt --gpus 1 sft
"""
REFUSED = """Error in rule base:
    message: SLURM sbatch failed. The error message was 'sbatch: error: invalid partition specified: nowhere
sbatch: error: Batch job submission failed: Invalid partition name specified'.
    sbatch call:
        sbatch --parsable
    jobid: 1
    output: results/two/base/manifest.json
    log: results/logs/two/base.log (check log file(s) for error details)
"""
LOCAL = """Error in rule evaluate:
    message: None
    jobid: 30
    output: results/one/evaluate/sft/manifest.json, results/one/evaluate/sft/metrics.json
    log: results/logs/one/evaluate/sft.log (check log file(s) for error details)
"""
SFT = Artifact("one", "sft")
STOPPED = "told to stop (SIGTERM): saved at step 5 of 9; the next run continues"


def posttrain(*arguments, cwd=None):
    """`posttrain status`."""
    command = [sys.executable, "-m", "posttrain", "status", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_status_says_what_waits(root, tmp_path):
    done = posttrain(str(root / "config/config.yaml"), cwd=tmp_path)
    assert done.returncode == 0 and "tiny/base" in done.stdout and "waiting" in done.stdout


@pytest.mark.parametrize("code", [0, 1])
def test_status_says_where_slurm_does_not_answer(root, tmp_path, monkeypatch, code):
    """What it knows of SLURM's queue is not there then, and a job in it looks like one that stopped."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = posttrain(str(root / "config/config.yaml"), cwd=tmp_path)
    assert done.returncode == 0 and ("SLURM does not answer" in done.stdout) == bool(code), done.stdout


def test_status_tells_what_goes_on_from_what_failed(here):
    """After an attempt without enough GPU memory a stage goes on in the same job, and in the same log."""
    folder, log = Path(SFT.folder), SFT.log
    (folder / "checkpoints/0123").mkdir(parents=True)
    beat = {"step": 5, "steps": 9, "loss": "loss 1.0", "left": 60}
    (folder / "checkpoints/0123/progress.json").write_text(json.dumps(beat))
    log.parent.mkdir(parents=True)
    log.write_text("error: out of GPU memory: 2 GB\n")
    assert status.state(SFT, {}) == f"failed: out of GPU memory: 2 GB (see {log})", "control"
    log.write_text(log.read_text() + f"[one/sft] {attempt.SMALLER} 4 at the same global batch\n")
    assert status.state(SFT, {}) == "running, step 5/9, loss 1.0, 1:00 left"
    assert status.state(SFT, {"rule_sft_wildcards_one": "PD, Priority"}) == "in SLURM's queue (Priority)"
    (folder / "checkpoints/earlier").mkdir()
    known = {"reason": "the loss is nan\nmore", "final": True}
    (folder / "checkpoints/earlier/failed.json").write_text(json.dumps(known))
    assert status.state(SFT, {}).startswith("running"), "with other settings it failed; with these it has not"
    log.write_text(log.read_text() + "[one/sft] error: the loss is nan\n")
    assert status.state(SFT, {}) == "failed: the loss is nan"
    log.write_text("[one/sft] error: the disk is full\n")
    assert status.state(SFT, {}) == f"failed: the disk is full (see {log})"


@pytest.fixture
def running(here) -> tuple[Path, Path]:
    """The folder and the log of a stage that said something just now."""
    folder, log = Path(SFT.folder), SFT.log
    (folder / "checkpoints/0123").mkdir(parents=True)
    log.parent.mkdir(parents=True)
    log.write_text("[one/sft] step 5/9\n")
    return folder, log


def test_a_stage_that_said_that_it_stops_is_not_running(running):
    _, log = running
    assert status.state(SFT, {}) == "running", "control"
    log.write_text(log.read_text() + f"[one/sft] {STOPPED}\n")
    assert status.state(SFT, {}) == "stopped; the next run continues"
    assert status.state(SFT, {"rule_sft_wildcards_one": "R"}) == "running", "SLURM runs it again"


def test_a_stage_that_was_killed_is_not_running(running):
    folder, log = running
    held = interruption.locked(folder / ".lock-0123")
    (folder / ".lock-earlier").touch()  # of one with other settings, that was killed too
    assert status.state(SFT, {}) == "running"
    os.close(held)
    assert status.state(SFT, {}) == "stopped; the next run continues"
    (folder / ".lock-unreadable").mkdir()
    assert status.state(SFT, {}) == "running", "which cannot be told"
    (folder / ".lock-unreadable").rmdir()
    log.write_text("")
    assert status.state(SFT, {}) == "running", "it is run again, and has not come to its lock"


def test_without_locks_a_stage_counts_as_running_for_a_while(running, monkeypatch):
    folder, log = running
    (folder / ".lock-0123").touch()
    monkeypatch.setattr(status, "lock", lambda file: None)
    assert status.state(SFT, {}) == "running"
    before = time.time() - status.ALIVE - 1
    os.utime(log, (0, before))
    beat = folder / "checkpoints/0123/progress.json"
    beat.write_text(json.dumps({"step": 5, "steps": 9, "loss": "loss 1.0", "left": 60}))
    os.utime(beat, (0, before))
    assert status.state(SFT, {}) == "stopped; the next run continues"
    assert status.state(SFT, {"rule_sft_wildcards_one": "R"}) == "running"


def test_the_end_of_a_failed_run_says_what_each_job_came_to(running):
    _, log = running
    job, other = Path("results/logs/slurm/3.log").absolute(), Path("results/logs/one/evaluate/sft.log")
    for file in (job, other):
        file.parent.mkdir(parents=True)
        file.write_text("srun\n")
    log.write_text(f"[one/sft] step 5/9\n[one/sft] {STOPPED}\nsrun: error: gpu1: task 0: Exited with exit code 75\n")
    other.write_text("[one/evaluate/sft] error: the model is damaged\nerror: make it anew\nsrun: error: task 0\n")
    Path("results/logs/two").mkdir()
    Path("results/logs/two/base.log").touch()  # by Snakemake
    printed = CANCELLED.format(job="gone")  # a job's log, in which Snakemake said so too
    Path("snakemake.log").write_text(CANCELLED.format(job=job) + REFUSED + LOCAL + printed)
    assert status.failed_jobs(["snakemake.log"], 0).splitlines() == [
        "3 failed or were stopped; their descendants were not made:",
        f"  one/sft: {STOPPED}",
        "      results/logs/one/sft.log",
        "      results/logs/slurm/3.log",
        "  two/base: SLURM refused the job (sbatch: error: invalid partition specified: nowhere): see "
        "`posttrain doctor`",
        "  one/evaluate/sft: the model is damaged",
        "      make it anew",
        "      results/logs/one/evaluate/sft.log",
    ]
    Path("snakemake.log").write_text(
        "Error in rule all:\n    jobid: 0\n    log: a.log (check log file(s) for error details)\n"
        "rule sft:\n    log: results/logs/one/sft.log\n1 of 1 steps (100%) done\n"
        "Error in rule sft:\n    jobid: 1\n    output: results/one/sft/manifest.json\n"  # cut off
    )
    assert status.failed_jobs(["snakemake.log"], 0) == "", "control"


def test_the_end_does_not_take_an_earlier_log_for_this_run(running):
    """As where a job ended before its stage began: its log is an earlier one's."""
    _, log = running
    log.write_text("[one/sft] done\n")
    Path("snakemake.log").write_text(CANCELLED.format(job="results/logs/slurm/3.log"))
    said = status.failed_jobs(["snakemake.log"], time.time() + 9)
    assert said.splitlines()[1:] == [
        "  one/sft: its stage printed nothing. SLURM-job '3' failed, SLURM status is: 'CANCELLED'."
    ]
    Path("snakemake.log").write_text(LOCAL)
    assert status.failed_jobs(["snakemake.log"], 0).splitlines()[1:] == [
        "  one/evaluate/sft: its stage printed nothing."
    ]
    Path("snakemake.log").write_text(CANCELLED.format(job="gone"))
    assert "one/sft: [one/sft] done" in status.failed_jobs(["snakemake.log"], 0), (
        "control: the last line, for want of better"
    )


def test_the_end_says_once_what_several_processes_said(running):
    _, log = running
    log.write_text(2 * "[one/sft] error: the loss is nan\n" + "[one/sft] what ended it: error: the loss is nan\n")
    Path("snakemake.log").write_text(CANCELLED.format(job="gone"))
    assert status.failed_jobs(["snakemake.log"], 0).splitlines()[1:] == [
        "  one/sft: the loss is nan",
        "      results/logs/one/sft.log",
    ]
    log.write_text(f"[one/sft] {STOPPED}\n[one/sft] what ended it: {STOPPED}\n")
    assert status.failed_jobs(["snakemake.log"], 0).splitlines()[1:] == [
        f"  one/sft: {STOPPED}",
        "      results/logs/one/sft.log",
    ]


BAR = "\r{0}%|####      | {0}/100 [00:01<00:02, 31.2it/s]"
CRASH = """Traceback (most recent call last):
  File "trainer.py", line 1, in train
    raise ValueError
KeyError: 'labels'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "stage.py", line 2, in run
    trainer.train()
    ^^^^^^^^^^^^^^^
RuntimeError: shapes (3, 4) and (5,) do not fit
a second line of the message
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (CRASH + BAR.format(40), "RuntimeError: shapes (3, 4) and (5,) do not fit"),
        (BAR.format(40) + CRASH, "RuntimeError: shapes (3, 4) and (5,) do not fit"),
        (CRASH.replace("\n", "\n[rank0]: "), "RuntimeError: shapes (3, 4) and (5,) do not fit"),
        (f"{BAR.format(40)}[one/sft] error: diverged at step 3\n{BAR.format(50)}", "diverged at step 3"),
        (CRASH + "[one/sft] error: SIGKILL ended the stage\n", "SIGKILL ended the stage"),
        ("loading\n" + BAR.format(40), "loading"),
    ],
)
def test_the_reason_of_a_failure_is_no_progress_bar(running, log, reason):
    """In the end of the run, and in the status; the last log has no error: the stage was killed."""
    folder, file = running
    (folder / ".lock-0123").touch()
    file.write_text(log)
    Path("snakemake.log").write_text(CANCELLED.format(job="results/logs/one/sft.job"))
    assert f"  one/sft: {reason}\n" in status.failed_jobs(["snakemake.log"], since=0)
    assert status.state(SFT, {}).startswith(f"failed: {reason} (see") or reason == "loading"
