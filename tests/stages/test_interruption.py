"""Interrupted and continued: SIGTERM, a time limit, damaged checkpoints, a survivor; the bytes of the whole run."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT, make, start, trainers

from posttrain.__main__ import main
from posttrain.config.sections import Reference
from posttrain.ground.errors import INTERRUPTED, Interrupted, UserError
from posttrain.ground.files import read_json
from posttrain.jobs import artifact
from posttrain.training import checkpoint, interruption, parallel, spotchecks
from posttrain.training import trainers as shared
from posttrain.training.interruption import GO_ON, NEAR, SAVE, TERMINATED
from posttrain.training.trainers import Heartbeat

STAGES = tuple(trainers())


def files(manifest: Path) -> dict:
    return read_json(manifest)["files"]


def made_of(stage: str, read_by: dict, folder: str, section=None) -> Path:
    """A trainer's artifact in a folder of its own; raises Interrupted where it was told to stop."""
    output = Path(f"results/{folder}/{stage}/manifest.json")
    return make(stage, section or trainers()[stage], output, **read_by[stage])


def urgencies(monkeypatch, *planned: int) -> None:
    """What a stage finds after its steps, in turn; afterwards there is nothing to do."""
    found = iter((GO_ON, *planned))  # the first is asked for before training
    monkeypatch.setattr(interruption, "due", lambda step, saving: next(found, GO_ON))


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_at_any_step_and_saved_at_any_step(stage, uninterrupted, read_by, monkeypatch, capsys):
    """Stopped twice, with saves between at moments that no step decides; in each of the trainers. The states for
    spot-checks are kept all the same, and lead to the recorded steps."""
    for module, name, value in ((spotchecks, "wanted", 2), (parallel, "fits", None)):
        monkeypatch.setattr(module, name, value)
    chance = random.Random(stage)
    for attempt in range(2):
        urgencies(monkeypatch, *chance.choices((GO_ON, SAVE), k=chance.randint(2, 7)), (TERMINATED, NEAR)[attempt])
        with pytest.raises(Interrupted, match=r"saved at step \d+ of \d+; the next run continues"):
            made_of(stage, read_by, "stopped")
    urgencies(monkeypatch, *chance.choices((GO_ON, SAVE), k=15))
    made = made_of(stage, read_by, "stopped")
    assert "continuing" in capsys.readouterr().err
    assert files(made) == files(uninterrupted[stage])
    assert main(["spotcheck", f"stopped/{stage}", "--place", "2"]) == 0
    assert "(place 2 of 2)\n  equal to the byte: " in capsys.readouterr().out


def test_a_damaged_checkpoint_is_not_continued_from(uninterrupted, read_by, monkeypatch, capsys):
    """The one before is."""
    urgencies(monkeypatch, GO_ON, SAVE, GO_ON, GO_ON, TERMINATED)
    with pytest.raises(Interrupted):
        made_of("sft", read_by, "damaged")
    older, newest = checkpoint.all_in(next(Path("results/damaged/sft/checkpoints").iterdir()))
    spoil(newest / "optimizer.pt", "bit")
    made = made_of("sft", read_by, "damaged")
    said = capsys.readouterr().err
    assert (
        f"deleting {newest.name}, which is incomplete or damaged" in said
        and f"from a checkpoint of step {older.name[11:]}" in said
    )
    assert files(made) == files(uninterrupted["sft"])


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_checkpoint_of_any_damage_is_deleted(damage, tmp_path):
    for step in (3, 6):
        checkpoint.write(tmp_path / f"checkpoint-{step}", {}, {"iteration": step})
    assert checkpoint.newest(tmp_path).name == "checkpoint-6", "control"
    spoil(tmp_path / "checkpoint-6/tensors.pt", damage)
    assert checkpoint.read(tmp_path)[1] == {"iteration": 3}
    assert checkpoint.all_in(tmp_path) == [tmp_path / "checkpoint-3"]


def test_a_checkpoint_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch):
    """A file system's hiccup is no damage: with the newest two gone, all would begin anew."""
    checkpoint.write(tmp_path / "checkpoint-3", {}, {"iteration": 3})
    read_text = Path.read_text

    def stale(self, **options):
        if self.name == "manifest.json":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read_text(self, **options)

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(UserError, match="cannot be read: Stale file handle"):
        checkpoint.read(tmp_path)
    monkeypatch.undo()
    assert checkpoint.read(tmp_path)[1] == {"iteration": 3}
    (tmp_path / "checkpoint-3/manifest.json").unlink()
    assert checkpoint.read(tmp_path) is None, "control: half written"


def test_without_verification_a_flipped_bit_is_trained_on(uninterrupted, read_by, monkeypatch):
    """Control of the test above."""
    urgencies(monkeypatch, GO_ON, SAVE, GO_ON, GO_ON, TERMINATED)
    with pytest.raises(Interrupted):
        made_of("sft", read_by, "believed")
    newest = checkpoint.all_in(next(Path("results/believed/sft/checkpoints").iterdir()))[-1]
    spoil(newest / "adapter_model.safetensors", "bit")
    monkeypatch.setattr(checkpoint, "verify", lambda manifest: None)
    assert files(made_of("sft", read_by, "believed")) != files(uninterrupted["sft"])


def spoil(file: Path, damage: str) -> None:
    """Flip the file's middle bit, cut its end off, or delete it."""
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 32
    file.unlink() if damage == "gone" else file.write_bytes(held if damage == "bit" else held[:-1])


def test_a_limit_too_short_for_a_step_is_the_users_to_mend(read_by, monkeypatch):
    monkeypatch.setattr(interruption, "limit", 0.5)
    monkeypatch.setattr(interruption, "deadline", time.monotonic() + 1)
    with pytest.raises(UserError, match=r"time limit of 0.5 min is too short for one step.*raise --minutes") as error:
        made_of("sft", read_by, "short")
    assert not isinstance(error.value, Interrupted), "to run it again would not help"


def test_there_must_be_time_for_a_longer_step_and_for_saving(monkeypatch):
    monkeypatch.setattr(interruption, "deadline", time.monotonic() + 100)
    assert interruption.due(step=40, saving=0) == GO_ON
    assert interruption.due(step=49, saving=0) == NEAR == interruption.due(step=10, saving=85)
    monkeypatch.setattr(interruption, "terminated", True)
    assert interruption.due(step=0, saving=0) == TERMINATED


@pytest.mark.slow
def test_sigterm_saves_and_the_next_run_continues(uninterrupted, read_by, capsys):
    output = Path("results/told/reward/manifest.json")
    process = start("reward", trainers()["reward"], output, read_by["reward"])
    while not list(output.parent.glob("checkpoints/*/progress.json")) and process.poll() is None:
        time.sleep(0.02)
    for _ in range(3):  # the later ones find it saving, or gone
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    said = process.communicate()[1]
    assert process.returncode == INTERRUPTED, said
    assert "told to stop (SIGTERM): saved at step" in said and "error" not in said and not output.exists()
    made = made_of("reward", read_by, "told")
    assert "continuing" in capsys.readouterr().err
    assert files(made) == files(uninterrupted["reward"])


def test_a_time_limit_that_takes_several_runs(uninterrupted, read_by, monkeypatch):
    """0.3, 0.4, 1.1, 3.0, ... s of training, saved every 50 ms; in this process, whose start is not counted."""
    stops, made = 0, None

    class Limited(Heartbeat):
        def __init__(self, *rest):
            super().__init__(*rest)
            monkeypatch.setattr(interruption, "deadline", time.monotonic() + 0.3 + 0.1 * stops**3)

    monkeypatch.setattr(interruption, "SAVING", 0.0)
    monkeypatch.setattr(interruption, "limit", 0.5)
    monkeypatch.setattr(shared, "Heartbeat", Limited)
    section = trainers(checkpoint_minutes=0.05 / 60)["dpo"]
    while made is None:
        try:
            made = made_of("dpo", read_by, "limited", section)
        except Interrupted as stopped:
            assert "the time limit of 0.5 min is near" in str(stopped)
            stops += 1
    assert stops > 1, "control: it was stopped"
    assert files(made) == files(uninterrupted["dpo"])


def test_sigterm_where_there_is_nothing_to_save_ends_at_once():
    process = running("import time; interruption.listen(0); print(1, flush=True); time.sleep(1000)")
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == INTERRUPTED


def test_a_survivor_and_its_successor_never_write_the_same_files(tmp_path, monkeypatch, capsys):
    lock = tmp_path / ".lock"
    survivor = running(
        f"from pathlib import Path; import sys\nwith interruption.alone(Path({str(lock)!r})): "
        "print(1, flush=True); sys.stdin.read()"
    )
    monkeypatch.setattr(interruption, "WAIT", 0.5)
    with pytest.raises(UserError, match=rf"process {survivor.pid} on .* is still making"), interruption.alone(lock):
        pass
    monkeypatch.setattr(interruption, "WAIT", 60)
    survivor.stdin.close()
    with interruption.alone(lock) as waited:
        assert lock.read_text().startswith(f"process {os.getpid()} on ")
    assert waited in (True, False) and not lock.exists()
    survivor.wait()
    with interruption.alone(lock) as waited:
        assert not waited


def test_what_the_survivor_has_made_is_not_made_again(tmp_path, monkeypatch):
    """Control: what it has made from other settings is."""
    calls = []

    def run(section, work, checkpoints):
        calls.append(section.batch_size)
        (work / "data").mkdir()
        return {}

    monkeypatch.chdir(tmp_path)
    output = Path("results/one/reference/manifest.json")
    artifact.make("reference", run, Reference(batch_size=1), {}, output)
    monkeypatch.setattr(interruption, "alone", lambda lock: contextlib.nullcontext(True))
    artifact.make("reference", run, Reference(batch_size=1), {}, output)
    assert calls == [1]
    artifact.make("reference", run, Reference(batch_size=2), {}, output)
    assert calls == [1, 2]


def running(program: str) -> subprocess.Popen:
    """A process that has come to print something."""
    environment, pipe = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}, subprocess.PIPE
    command = [sys.executable, "-c", f"from posttrain.training import interruption; {program}"]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
    process.stdout.readline()
    return process
