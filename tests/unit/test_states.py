"""States of jobs: none is lost while SLURM does not answer, and none is waited for that has ended."""

import asyncio
import os

import pytest

from posttrain.cluster import states
from posttrain.engine import controller, executor
from posttrain.jobs import slurm


@pytest.mark.parametrize(
    ("age", "kind", "command"),
    [
        ("300 sec", "accounting_storage/slurmdbd", "squeue"),
        ("60 sec", "accounting_storage/slurmdbd", "sacct"),
        ("60 sec", "accounting_storage/none", "squeue"),
        ("60 sec", "(null)", "squeue"),
        ("0 sec", "accounting_storage/slurmdbd", "squeue"),
    ],
)
def test_states_are_asked_of_what_remembers_them(monkeypatch, age, kind, command):
    said = f"Configuration data\nAccountingStorageType   = {kind}\nMinJobAge               = {age}\nKillWait = 30 sec\n"
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: said)
    assert states.command() == command


def test_no_job_is_lost_where_its_state_could_not_be_asked(monkeypatch, tmp_path):
    """What the executor plugin neither reports nor names as running is still waited for."""
    import snakemake_executor_plugin_slurm as plugin

    settings = type("Settings", (), {"init_seconds_before_status_checks": 20})

    class Lost:
        def report_job_success(self, job):
            reported.append(job.external_jobid)

        report_job_error = report_job_success
        next_seconds_between_status_checks = 20
        workflow = type("Workflow", (), {"executor_settings": settings})

        async def check_active_jobs(self, active):
            if answers:
                self.report_job_success(active[0])
                self.report_job_error(active[1])
                yield active[2]
            self.next_seconds_between_status_checks += 10

    monkeypatch.setattr(plugin.Executor, "check_active_jobs", Lost.check_active_jobs)

    async def query(command, logger):
        return {"b": "CANCELLED by 1000", "z": "RUNNING"}, 0.1

    monkeypatch.setattr(plugin, "query_job_status", query)
    monkeypatch.setattr(plugin, "get_min_job_age", None)
    executor.report_states(states.settle)
    assert plugin.get_min_job_age() > 10**9, "it never asks accounts by itself"
    Lost.check_active_jobs = plugin.Executor.check_active_jobs
    own = type("Own", (), {"output": [str(tmp_path / "manifest.json")]})
    jobs = [type("Job", (), {"external_jobid": name, "job": own})() for name in "abc"]

    lost = Lost()

    async def left():
        return [job.external_jobid async for job in lost.check_active_jobs(jobs)]

    answers, reported = False, []
    assert asyncio.run(left()) == ["a", "b", "c"] and reported == []
    listed, _ = asyncio.run(plugin.query_job_status("", None))
    assert listed == {"a": "RUNNING", "b": "CANCELLED", "c": "RUNNING"}
    monkeypatch.setattr(slurm, "state", lambda _: "UNKNOWN")
    listed, _ = asyncio.run(plugin.query_job_status("", None))
    assert listed == {"a": "FAILED", "b": "CANCELLED", "c": "FAILED"}, "forgotten, and nothing was made"
    monkeypatch.setattr(states, "made_by_this_run", own.output[0].__eq__)
    listed, _ = asyncio.run(plugin.query_job_status("", None))
    assert listed == {"a": "UNKNOWN", "b": "CANCELLED", "c": "UNKNOWN"}, "control: what they were to make is there"
    answers = True
    assert asyncio.run(left()) == ["c"] and reported == ["a", "b"], "control: what ended is not waited for"
    pauses = [lost.next_seconds_between_status_checks for _ in range(4) if asyncio.run(left())]
    assert pauses == [50, 60, 60, 60], "each is 10 s longer, at most three times the first"


def test_it_is_said_once_that_states_are_not_known_and_once_that_they_are(monkeypatch, capsys):
    import snakemake_executor_plugin_slurm as plugin

    answers = [{}, None, None, None, {}, {}, None]

    async def query(command, logger):
        return answers.pop(0), None

    monkeypatch.setattr(plugin, "query_job_status", query)
    for name in ("get_min_job_age", "Executor"):
        monkeypatch.setattr(plugin, name, type("Executor", (), {"check_active_jobs": None}))
    executor.report_states(states.settle)
    said = [capsys.readouterr().err for _ in list(answers) if asyncio.run(plugin.query_job_status("", None))]
    away = "[posttrain] SLURM does not answer: jobs continue, and it is queried again\n"
    assert said == ["", away, "", "", "[posttrain] SLURM answers\n", "", away]


ASKED = {"1": "RUNNING", "2": "CANCELLED by 1000", "3": "PREEMPTED", "4": "TIMEOUT", "5": "COMPLETED", "8": "NODE_FAIL"}


def test_what_may_yet_change_is_believed_the_second_time(monkeypatch):
    """3 is preempted for good, 4 had to be run again by itself, 6, 7 and 9 are not listed, as one is forgotten."""
    own = {"3": "PREEMPTED", "4": "TIMEOUT", "6": "PENDING", "7": "UNKNOWN", "8": "NODE_FAIL", "9": "PREEMPTED"}
    monkeypatch.setattr(slurm, "state", own.get)
    doubts: dict[str, str] = {}
    monkeypatch.setattr(states, "made_by_this_run", "7".__eq__)
    jobs = dict(zip("123456789", "123456789", strict=True))  # each makes what is called like it
    first = states.settle(ASKED, jobs, doubts)
    known_of_failed_nodes = {"8": "NODE_FAIL"}
    assert first == dict.fromkeys("134679", "RUNNING") | {"2": "CANCELLED", "5": "COMPLETED"} | known_of_failed_nodes
    del jobs["1"], jobs["2"]
    second = states.settle(ASKED, jobs, doubts)
    assert second == {
        "3": "CANCELLED", "4": "TIMEOUT", "5": "COMPLETED", "6": "PENDING", "7": "UNKNOWN", "8": "FAILED",
        "9": "CANCELLED",
    }  # fmt: skip
    own |= {"3": "PENDING", "8": "PENDING"}
    accounts = states.settle(ASKED, {"3": "3", "8": "8"}, doubts)
    assert accounts == {"3": "PENDING", "8": "PENDING"}, "accounts do not know yet what the controller runs again"
    two = {"3": "3", "4": "4"}
    assert states.settle({"3": "PENDING", "4": "RUNNING"}, two, doubts) == {"3": "PENDING", "4": "RUNNING"}
    again = states.settle(ASKED, two, doubts)
    assert again == {"3": "RUNNING", "4": "RUNNING"}, "control: one that was run again is believed no sooner"


@pytest.mark.parametrize(
    ("controller", "queue", "accounts", "found"),
    [
        ("JobId=7 JobState=PENDING Reason=None", "", "", "PENDING"),
        (None, None, "COMPLETED", "RUNNING"),  # nobody can be asked now
        (None, "", "CANCELLED by 1000", "CANCELLED"),
        (None, "", None, "UNKNOWN"),
    ],
)
def test_a_jobs_own_state(installed, monkeypatch, controller, queue, accounts, found):
    said = {"scontrol": controller, "squeue": queue, "sacct": accounts}
    monkeypatch.setattr(slurm, "ask", lambda command, *_, **__: said[command])
    assert slurm.state("7") == found


def test_a_site_whose_accounts_do_not_answer_knows_more_later(monkeypatch):
    kept = "AccountingStorageType = accounting_storage/slurmdbd\nMinJobAge = 60 sec\n"
    answers = {"scontrol show config": kept, "scontrol show job": None, "squeue -h --me": "", "sacct -nPX -j": None}
    monkeypatch.setattr(slurm, "ask", lambda *asked, **_: answers[" ".join(asked[:3])])
    assert slurm.state("7") == "RUNNING"
    answers["scontrol show config"] = kept.replace("slurmdbd", "none")
    assert slurm.state("7") == "UNKNOWN", "control: there are none"


def test_an_earlier_artifact_is_not_what_a_forgotten_job_made(here):
    began, record = here / controller.HOLDER, here / "provenance.json"
    began.parent.mkdir()
    manifest = str(here / "manifest.json")
    assert not states.made_by_this_run(manifest), "nothing is there"
    for file, moment in ((began, 100), (record, 90)):
        file.write_text("{}")
        os.utime(file, (moment, moment))
    assert not states.made_by_this_run(manifest)
    os.utime(record, (110, 110))
    assert states.made_by_this_run(manifest), "control"
