"""What several unit tests start from: an empty directory outside of any job, and a script for a stage."""

import json
import signal
import sys
from pathlib import Path

import pytest

from posttrain.ground import credentials
from posttrain.jobs import attempt, launch, slurm


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, outside of any job."""
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_JOB_ID", "POSTTRAIN_DEVICE", slurm.SITE, credentials.PLACE):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def installed(monkeypatch):
    """A machine with SLURM's commands, as far as is looked."""
    monkeypatch.setattr("shutil.which", lambda name, **_: name)


@pytest.fixture
def stage(here, monkeypatch):
    """Lets a script stand for the stage, and runs an attempt at it."""

    def run(script: str, section: dict | None = None, name: str = "sft", batch_size: int = 0, **patches) -> int:
        monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", script])
        for key, value in ({"wait_until_reachable": lambda *_, **__: True} | patches).items():
            monkeypatch.setattr(slurm, key, value)
        kept = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        try:
            section = json.dumps(section or {"batch_size": 8})
            arguments = [name, "--config", section, "--output", f"results/x/{name}/manifest.json"]
            return attempt.attempt(arguments, 0, batch_size)
        finally:
            signal.signal(signal.SIGTERM, kept[0])
            signal.signal(signal.SIGINT, kept[1])

    return run
