"""Run a stage so that its artifact appears whole or not at all, with a manifest and a provenance record."""

import datetime
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from posttrain import tracking
from posttrain.errors import UserError
from posttrain.files import write_json
from posttrain.identity import identity, manifest_of, verify

DATED = ("provenance.json", "lm_eval.json")  # hold times and hosts, so they are no part of the artifact's identity
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "tokenizers", "lm_eval", "accelerate")


def make(stage: str, run: Callable, section, inputs: dict[str, Path], output: Path) -> None:
    """Call `run(section, **inputs, work, checkpoints)` and publish what it made beside `output`, the manifest.

    `run` writes `model/` or `data/` into the folder `work` and returns its metrics. Inputs are verified against
    their manifests first. Everything appears by rename, the manifest last; checkpoints go when it has appeared.
    """
    for role, manifest in inputs.items():
        if role != "fetched":  # what fetch brought lies in the shared cache; `hub` checks it where it is used
            verify(manifest)
    home = output.parent
    refuse_strangers(output)
    name = identity(stage, section.model_dump(mode="json"), inputs)
    if os.environ.get("WANDB_MODE", "disabled") == "offline":
        tracking.describe(home.absolute().parts[-2], stage, name)
    work, checkpoints = home / f".making-{name}", home / "checkpoints" / name
    if os.environ.get("RANK", "0") != "0":  # the first of several processes writes for all
        with tempfile.TemporaryDirectory() as unused:
            run(section, **inputs, work=Path(unused), checkpoints=checkpoints)
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic()
    metrics = run(section, **inputs, work=work, checkpoints=checkpoints)
    write_json(work / "metrics.json", metrics)
    write_json(work / "provenance.json", provenance(name, started, time.monotonic() - clock))
    parts = sorted(part.name for part in work.iterdir() if not part.name.startswith("."))
    write_json(work / "manifest.json", manifest_of(work, [part for part in parts if part not in DATED]))
    publish(work, home, [*parts, "manifest.json"])
    shutil.rmtree(checkpoints, ignore_errors=True)


def refuse_strangers(output: Path) -> None:
    """Raise UserError for another name than manifest.json, and for folders beside it that no stage left there:
    publishing would replace them."""
    if output.name != "manifest.json":
        raise UserError(f"--output {output}: must be called manifest.json, in the folder for the artifact")
    ours = any(any(output.parent.glob(sign)) for sign in ("manifest.json", "provenance.json", ".making-*"))
    for folder in (output.parent / part for part in ("data", "model", "snapshots")):
        if folder.exists() and not ours:
            raise UserError(f"--output {output}: {folder} is no artifact's and would be replaced; name another folder")


def publish(work: Path, home: Path, parts: list[str]) -> None:
    """Move finished parts into place, in the given order, with permissions that a group can read."""
    for file in work.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes files that only their owner can read
    for part in parts:
        target = home / part
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(work / part, target)
    shutil.rmtree(work)


def provenance(name: str, started: datetime.datetime, seconds: float) -> dict:
    """What is true of this run only: when, where, with which versions and at what cost."""
    return {
        "identity": name,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(os.times()[:2]), 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
        "git_commit": _git_commit(),
        "command": ["posttrain", *sys.argv[1:]],
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _git_commit() -> str:
    """The commit of the code that ran, with `+changes` when the tree differs from it."""
    here = Path(__file__).parent
    run = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes"], cwd=here, capture_output=True, text=True
    )
    return run.stdout.strip() if run.returncode == 0 else "unknown"
