"""Submission of jobs: none fails for a controller of SLURM that is away, and none is waited for after Ctrl-C."""

import threading
import time

import pytest

from posttrain import slurm, submission


class Pauses:
    """An event that never comes, and notes how long it was waited for."""

    def __init__(self):
        self.noted = []

    def wait(self, seconds: float) -> bool:
        self.noted.append(seconds)
        return False


def test_slurm_is_asked_again_until_it_answers(monkeypatch, capsys):
    answers = [None] * 8 + [""]
    monkeypatch.setattr(slurm, "ask", lambda *_: answers.pop(0))
    over = Pauses()
    assert submission.answered(over) and not answers
    assert over.noted == [0, 1, 3, 7, 15, 31, 60, 60, 60]
    assert capsys.readouterr().err == "[posttrain] SLURM does not answer: a job waits to be submitted\n", "once"


@pytest.fixture
def executor(monkeypatch):
    """The plugin's executor, of which only that is left which is waited for, and what it did."""
    import snakemake_executor_plugin_slurm as plugin

    done = []
    monkeypatch.setattr(plugin.Executor, "run_job", lambda self, job: done.append(job))
    monkeypatch.setattr(plugin.Executor, "shutdown", lambda self: done.append("shutdown"))
    submission.wait()
    return object.__new__(plugin.Executor), done


def test_a_job_is_submitted_when_slurm_answers(executor, monkeypatch):
    own, done = executor
    answers = [None, ""]
    monkeypatch.setattr(slurm, "ask", lambda *_: done.append("asked") or answers.pop(0))
    own.run_job("job")
    assert done == ["asked", "asked", "job"]


def test_what_waits_to_be_submitted_ends_with_snakemake(executor, monkeypatch):
    own, done = executor
    monkeypatch.setattr(slurm, "ask", lambda *_: None)
    waiting = threading.Thread(target=own.run_job, args=("job",), daemon=True)
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()
    own.shutdown()
    waiting.join(30)
    assert not waiting.is_alive() and done == ["shutdown"]
