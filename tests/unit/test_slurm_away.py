"""What SLURM is asked while its controller is away: again, until it answers, and what it refuses then is refused."""

import signal

import pytest

from posttrain.jobs import slurm


class Pauses:
    """An event that never comes, and notes how long it was waited for."""

    def __init__(self):
        self.noted = []

    def wait(self, seconds: float) -> bool:
        self.noted.append(seconds)
        return False


@pytest.mark.parametrize(("longest", "last"), [(60, [15, 31, 60, 60, 60]), (5, [5, 5, 5, 5, 5])])
def test_slurm_is_asked_again_until_it_answers(installed, monkeypatch, capsys, longest, last):
    answers = [None] * 8 + [""]
    monkeypatch.setattr(slurm, "ask", lambda *_: answers.pop(0))
    over = Pauses()
    assert slurm.wait_until_reachable("a job waits", longest, over) and not answers
    assert over.noted == [0, 1, 3, min(7, longest), *last]
    assert capsys.readouterr().err == "[posttrain] SLURM does not answer: a job waits\n", "once"


def test_nothing_is_waited_for_where_it_cannot_be_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.wait_until_reachable("a job waits")
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    assert not slurm.is_reachable(), "control"


@pytest.fixture
def asked(installed, monkeypatch):
    """What is asked of a SLURM that is away at first, for some questions, and refuses."""
    known = {"away": 0, "refused": 0, "state": "RUNNING", "asked": []}

    def ask(*command, **_):
        known["away"] -= 1
        if known["away"] >= 0:
            return None
        if command[:2] == ("scontrol", "requeue"):
            known["asked"].append("requeue")
            known["refused"] -= 1
            return None if known["refused"] >= 0 else ""
        if command[:2] == ("scontrol", "update"):
            known["asked"].append(command[3:])
        return f"JobState={known['state']}" if command[:2] == ("scontrol", "show") else ""

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr(slurm, "PAUSE", 0)
    kept = signal.getsignal(signal.SIGTERM)
    yield known
    signal.signal(signal.SIGTERM, kept)


@pytest.mark.parametrize("away", range(0, 40))
def test_to_run_a_job_again_is_asked_until_slurm_answers(asked, away, capsys):
    asked["away"] = away
    slurm.requeue("7", TimeLimit="2")
    assert asked["asked"] == ["requeue", ("TimeLimit=2",)] and "requeue is off" not in capsys.readouterr().err


def test_what_slurm_refuses_is_told(asked, capsys):
    asked["refused"] = 10
    slurm.requeue("7", TimeLimit="2")
    assert asked["asked"] == ["requeue"] * 3 and "requeue is off" in capsys.readouterr().err


def test_what_was_accepted_without_a_word_counts(asked, capsys):
    asked.update(refused=10, state="PENDING")
    slurm.requeue("7", TimeLimit="2")
    assert asked["asked"] == ["requeue", ("TimeLimit=2",)] and capsys.readouterr().err == ""
