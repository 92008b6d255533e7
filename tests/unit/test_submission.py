"""Submission of jobs: none fails for a controller of SLURM that is away, and after Ctrl-C none is left."""

import threading
import time

import pytest
import snakemake_executor_plugin_slurm as plugin  # before `installed`: it looks for SLURM's commands

from posttrain.engine import executor as patches
from posttrain.jobs import slurm


@pytest.fixture
def executor(installed, monkeypatch):
    """The plugin's executor, of which only that is left which is waited for, and what it did."""
    done = []
    monkeypatch.setattr(plugin.Executor, "run_job", lambda self, job: done.append(job))
    monkeypatch.setattr(plugin.Executor, "shutdown", lambda self: done.append("shutdown"))
    monkeypatch.setattr(plugin.Executor, "cancel", None)
    patches.submit_when_slurm_answers()
    own = object.__new__(plugin.Executor)
    own.run_uuid = "uuid"
    return own, done


def test_a_job_is_submitted_when_slurm_answers(executor, monkeypatch):
    own, done = executor
    answers = [None, ""]
    monkeypatch.setattr(slurm, "ask", lambda *_: done.append("asked") or answers.pop(0))
    own.run_job("job")
    assert done == ["asked", "asked", "job"]


@pytest.mark.parametrize("how", ["shutdown", "cancel"])
def test_what_waits_to_be_submitted_ends_with_snakemake(executor, monkeypatch, how):
    own, done = executor
    monkeypatch.setattr(slurm, "ask", lambda *_: None)
    waiting = threading.Thread(target=own.run_job, args=("job",), daemon=True)
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()
    getattr(own, how)()
    waiting.join(30)
    assert not waiting.is_alive() and done == ["shutdown"]


def test_ctrl_c_cancels_also_what_was_just_being_submitted(executor, monkeypatch, capsys):
    own, done = executor
    monkeypatch.setattr(slurm, "ask", lambda *command: done.append(command) or "")
    own.cancel()
    cancel = ("scancel", "--name", "uuid")
    assert done[:3] == [cancel, "shutdown", cancel]
    assert capsys.readouterr().err.endswith("the jobs of this run are cancelled; the next call continues them\n")
    monkeypatch.setattr(slurm, "ask", lambda command, *_: None if command == "scancel" else "")  # it came back too late
    own.cancel()
    said = capsys.readouterr().err
    assert "jobs continue, and the next call waits for them; to end them: scancel --name uuid" in said
    assert "are cancelled" not in said
