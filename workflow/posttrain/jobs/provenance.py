"""The record of a stage's run: its time, place and cost, the hardware and versions, and the keys that it read."""

import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

from posttrain.config.sections import Evaluate, Sampled, Section, Training, slice_of, unread
from posttrain.ground.code import PACKAGE

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "tokenizers", "lm_eval", "accelerate")


def of_run(name: str, started: datetime.datetime, seconds: float) -> dict:
    """Time, place and cost of a run."""
    return {
        "identity": name,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(os.times()[:2]), 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_gpu_memory_mb": peak_gpu_memory(),
        "host": platform.node(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "command": ["posttrain", *sys.argv[1:]],
    }


def peak_gpu_memory() -> int | None:
    """Peak of PyTorch's GPU memory, in MB (2^20 bytes); None without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**20)


def of_gpu() -> dict:
    """Number and name of the GPUs that the processes of a stage used, one each, and the peak memory; {} without one,
    and where the error that ended the stage left CUDA unusable."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    try:
        used = {"gpus": int(os.environ.get("WORLD_SIZE", "1")), "gpu": torch.cuda.get_device_name()}
        return used | {"peak_gpu_memory_mb": peak_gpu_memory()}
    except RuntimeError:
        return {}


def of_section(section: Section, keys_read: set[str]) -> dict:
    """The `shape` of a run with these settings, and the keys that it left `unread`."""
    return {"shape": shape_of(section), "unread": unread(slice_of(section), keys_read)}


def shape_of(section) -> dict:
    """Hardware, parallelism and versions, which may change the last bits of a result and are not in its identity."""
    shape = {"machine": platform.machine(), "processes": int(os.environ.get("WORLD_SIZE", "1"))} | parts_of(section)
    if torch := sys.modules.get("torch"):
        shape |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
        shape["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return shape | {"versions": versions()}


def parts_of(section) -> dict[str, int]:
    """Micro-batch and accumulation of rank 0 for a stage that trains, requests at once for `evaluate`; else {}."""
    section = getattr(section, "scratch", section)
    if isinstance(section, Sampled):
        from posttrain.rl.batches import micro_batches, minibatches

        parts = micro_batches(section, minibatches(section, range(section.batch_size))[0])
        return {"micro_batch": len(parts[0]), "accumulation": len(parts)}
    if isinstance(section, Training):
        from posttrain.training import parallel

        fits = parallel.at_once(section, section.batch_size)
        micro, accumulation = parallel.split(section.batch_size, fits, parallel.world())
        return {"micro_batch": micro, "accumulation": accumulation} | ({"sharded": True} if parallel.sharded else {})
    if isinstance(section, Evaluate):
        from posttrain.training import parallel

        return {"batch_size": parallel.requests_at_once(section)}
    return {}


def versions() -> dict[str, str]:
    """Package -> its installed version."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _git_commit() -> str:
    """The commit of the code, with `+changes` where the working tree differs from it; `unknown` outside a repository
    of its own: a project that was unpacked inside another repository is not of that one's commits."""
    project = PACKAGE.parents[1]
    if git(project, "rev-parse", "--show-prefix") != "":
        return "unknown"
    return git(project, "describe", "--always", "--abbrev=40", "--dirty=+changes") or "unknown"


def git(folder: Path, *arguments: str) -> str | None:
    """What git answers in a folder, which another user of the group may own; None where it fails."""
    run = subprocess.run(["git", "-c", "safe.directory=*", *arguments], cwd=folder, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def disk_of(*folders: Path) -> float:
    """MB (10^6 bytes) of all files below some folders."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)
