"""What SLURM says of a job, and asking it to run one again. Imports nothing heavy."""

import os
import signal
import subprocess
import time
from pathlib import Path

from posttrain.progress import say


def ask(*command: str, seconds: float = 60) -> str | None:
    """What a SLURM command says; None where it is not there, fails or does not answer."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout if found.returncode == 0 else None


def job_id() -> str | None:
    """The job that this process runs in."""
    return os.environ.get("SLURM_JOB_ID")


def shown(job: str, key: str) -> str:
    """One field of what SLURM knows of a job."""
    fields = (ask("scontrol", "show", "job", job) or "").split()
    return next((field.partition("=")[2] for field in fields if field.startswith(f"{key}=")), "")


def state(job: str) -> str:
    """How a job stands or ended; "" where SLURM has forgotten it and keeps no accounts."""
    return (shown(job, "JobState") or ask("sacct", "-nXP", "-j", job, "-o", "State") or "").strip()


def minutes_of(text: str) -> float:
    """SLURM's `days-hours:minutes:seconds` in minutes; 0 for no limit."""
    days, _, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        return int(days or 0) * 1440 + sum(part * 60**place for place, part in enumerate(reversed(parts))) / 60
    except ValueError:  # UNLIMITED, INVALID
        return 0.0


def memory_mb(job: str) -> int:
    """The memory that a job has on a node, in MB; 0 where SLURM does not say."""
    text = shown(job, "MinMemoryNode")
    units = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
    return round(float(text[:-1]) * units[text[-1]]) if text and text[-1] in units else 0


def kills() -> int:
    """How many processes of this job the kernel has killed for want of memory."""
    found = 0
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("memory", ""):
            root = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            for file in (root / "memory.oom_control", root / "memory.events"):
                words = file.read_text().split() if file.is_file() else []
                found += int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0
    return found


def could_run(job: str, option: str) -> bool:
    """Whether a job with another option of sbatch could run in this one's partition: what never can, waits for ever."""
    partition = shown(job, "Partition")
    return ask("sbatch", "--test-only", f"--partition={partition}", option, "--wrap", "true") is not None


def again(job: str, **changes: str) -> None:
    """Let SLURM run this job again, with other limits."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ask("scontrol", "requeue", job) is None:
        say("SLURM does not run this job again by itself (requeue is off): snakemake --profile slurm continues it")
        return
    for _ in range(50 if changes else 0):  # until the job counts as waiting
        if ask("scontrol", "update", f"JobId={job}", *(f"{key}={value}" for key, value in changes.items())) is not None:
            break
        time.sleep(0.1)
