"""One Snakemake to a directory: locks of dead ones, and the jobs that these have left."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain.engine import controller, hooks
from posttrain.ground.errors import UserError
from posttrain.jobs import slurm
from posttrain.training import interruption


def locked(here: Path, **who) -> None:
    """A directory as a Snakemake leaves it that has died."""
    (here / ".snakemake/locks").mkdir(parents=True)
    (here / ".snakemake/locks/0.input.lock").write_text("")
    (here / ".snakemake/controller.json").write_text(json.dumps(who))


def test_a_dead_controllers_lock_is_cleared(here, capsys):
    locked(here, host=socket.gethostname(), process=123, started="2026-01-01T00:00:00+00:00")
    controller.clear_dead_lock()
    assert not list((here / ".snakemake/locks").iterdir())
    assert "process 123 on" in capsys.readouterr().err


def test_a_living_controller_and_one_elsewhere_are_left_alone(here):
    locked(here, host="elsewhere", process=123, started="2026-01-01T00:00:00+00:00")
    with pytest.raises(UserError, match=r"on elsewhere.*snakemake --unlock"):
        controller.clear_dead_lock()
    script = "from posttrain.engine import controller; controller.claim(); print('held', flush=True); input()"
    living = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert living.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another Snakemake works here: process {living.pid} on"):
        controller.clear_dead_lock()
    for file in (here / ".snakemake/locks").iterdir():
        file.unlink()
    controller.clear_dead_lock()
    with pytest.raises(UserError, match=rf"another Snakemake works here: process {living.pid} on"):
        controller.claim()  # it began before this one saw who it is
    (here / ".snakemake/locks/0.input.lock").write_text("")
    living.kill()
    living.wait()
    controller.clear_dead_lock()
    assert not list((here / ".snakemake/locks").iterdir()), "control: once it is dead"
    controller.claim()


LEFT = "{}|{}|{}|{}|{}\n".format


def test_what_a_dead_snakemake_left_is_told_from_other_jobs(here, monkeypatch):
    """The job in which this Snakemake itself may run and a notebook would be waited for without an end."""
    ours = LEFT("7", "R", "None", "rule_sft_wildcards_one", here)
    long = "rule_sft_wildcards_" + 250 * "x"
    ours += LEFT("5", "R", "None", long, here)
    ours += LEFT("6", "PD", "PartitionTimeLimit", "rule_base_wildcards_one", here)
    said = (
        ours
        + LEFT("8", "R", "None", "", here)
        + LEFT("9", "R", "None", "note|book\nrule_", here)
        + LEFT("10", "R", "None", "rule_dpo", "/elsewhere")
    )
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: said)
    assert controller.left_jobs() == [
        ("7", "R", "rule_sft_wildcards_one"),
        ("5", "R", long),
        ("6", "PD, PartitionTimeLimit", "rule_base_wildcards_one"),
    ]


def test_slurm_that_does_not_answer_is_asked_again(here, monkeypatch):
    """Else the jobs that still run would be started once more."""
    answers = [None, None, "", None]
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: answers.pop(0))
    monkeypatch.setattr(controller, "PAUSES", (0, 0))
    assert controller.left_jobs() == [] and answers == [None]
    answers[:] = [None] * 3
    with pytest.raises(UserError, match=r"does not say which jobs still run here .* try again"):
        controller.left_jobs()


def test_jobs_that_are_waited_for_still_run_while_slurm_does_not_answer(here, monkeypatch):
    job = LEFT("7", "R", "None", "rule_sft_wildcards_one", here)
    answers = [job, None, None, job, ""]
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: answers.pop(0))
    controller.wait_for_left_jobs(0)
    assert answers == []


def test_jobs_of_every_user_who_worked_here_are_waited_for(here, monkeypatch):
    """The second user of a group would start again what a job of the first, whose Snakemake died, still makes."""
    asked = []
    monkeypatch.setattr(slurm, "ask", lambda *command, **_: asked.append(command[:3]) or "")
    for user in (1001, 1002, 1001):
        monkeypatch.setattr(os, "getuid", lambda user=user: user)
        os.close(controller.claim())
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert controller.left_jobs() == [] and asked == [("squeue", "--user", "1000,1001,1002")]
    (here / ".snakemake/controller.json").write_text('{"users": "all"}')
    controller.left_jobs()
    assert asked[1:] == [("squeue", "--user", "1000")], "control: of a broken record, this user's alone"


WAITS = """
import sys
from posttrain.engine import controller, hooks
from posttrain.jobs import slurm
slurm.ask = lambda *_, **__: sys.argv[1]
controller.take_over(True, ["snakemake"])
"""


def test_the_second_of_two_that_would_wait_is_refused(here, monkeypatch):
    """Both would begin to work when the jobs have ended, and one of them end with Snakemake's words on locks."""
    job = LEFT("7", "R", "None", "rule_sft_wildcards_one", here)
    first = subprocess.Popen([sys.executable, "-c", WAITS, job], stderr=subprocess.PIPE, text=True)
    assert "waiting for them: 7" in first.stderr.readline()
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: "")
    with pytest.raises(UserError, match=rf"another Snakemake works here: process {first.pid} on"):
        controller.take_over(True, ["snakemake"])
    with pytest.raises(UserError, match=rf"another Snakemake works here: process {first.pid} on"):
        controller.claim()  # as one on this machine does when it begins to work
    first.kill()
    first.wait()
    controller.take_over(True, ["snakemake"])
    controller.claim()  # control: the wait is over, and this process may begin to work


def test_who_only_looks_is_let_in(here):
    locked(here, host="elsewhere", process=123, started="2026-01-01T00:00:00+00:00")
    for looks in ("-n", "-np", "--dry-run", "--dryrun", "--report", "--rulegraph", "--unlock", "--list-rules"):
        controller.take_over(False, ["snakemake", looks])
    for works in ("--cores=2", "-j2", "-k", "--profile", "--keep-going", "results/main/sft/manifest.json"):
        with pytest.raises(UserError):
            controller.take_over(False, ["snakemake", works])


def test_a_reader_is_told_that_snakemake_has_to_write(here, monkeypatch):
    controller.refuse_reader()
    (here / ".snakemake").mkdir()
    controller.refuse_reader()  # control
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) in writable)
    writable = {".snakemake"}
    controller.refuse_reader()
    (here / ".snakemake/controller.json").touch()
    with pytest.raises(UserError, match=r"/\.snakemake/controller\.json: no permission"):
        controller.refuse_reader()  # of another user, with a stricter umask
    (here / ".snakemake/controller.json").unlink()
    writable = set()
    with pytest.raises(UserError, match=rf"{here}/.snakemake: no permission to write, which Snakemake needs, for -n"):
        controller.refuse_reader()
    (here / ".snakemake").rmdir()
    with pytest.raises(UserError, match=f"{here}: no permission"):
        controller.refuse_reader()


def test_hooks_of_an_imported_workflow_run_beside_those_of_the_one_that_imports_it():
    """Else no claim is made there, and a second Snakemake works in the same folder."""
    ran = []
    workflow = SimpleNamespace(_onstart=lambda log: ran.append(("outer, earlier", log)))
    workflow._onsuccess = workflow._onerror = lambda log: None
    hooks.run_in_modules(workflow)
    workflow.onstart(lambda log: ran.append(("module", log)))
    workflow.onstart(lambda log: ran.append(("outer, later", log)))
    workflow._onstart("x")
    assert ran == [("outer, earlier", "x"), ("module", "x"), ("outer, later", "x")]
    workflow._onsuccess("x")
    assert len(ran) == 3, "control: another hook"


def test_a_run_makes_what_its_jobs_make_and_touching_makes_nothing():
    outputs = (["results/a/sft/manifest.json", "results/a/sft/metrics.json"], [], ["elsewhere"])
    jobs = [SimpleNamespace(output=output) for output in outputs]
    workflow = SimpleNamespace(touch=False, dag=SimpleNamespace(needrun_jobs=lambda **_: jobs))
    assert [artifact.name for artifact in hooks.to_make(workflow)] == ["a/sft"]
    workflow.touch = True
    assert hooks.to_make(workflow) == []


def test_a_file_system_without_locks_is_lived_with(here, monkeypatch):
    """Lustre mounted without them: who holds a directory is told by its process."""

    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    with interruption.alone(here / "lock") as waited:
        assert not waited
    locked(here, host=socket.gethostname(), process=os.getpid(), started="2026-01-01T00:00:00+00:00")
    with pytest.raises(UserError, match="another Snakemake works here"):
        controller.clear_dead_lock()
    (here / ".snakemake/controller.json").write_text(json.dumps({"host": socket.gethostname(), "process": 2**22 + 1}))
    controller.clear_dead_lock()
    assert not list((here / ".snakemake/locks").iterdir())
