"""What SLURM says of a job, and asking it to run one again. Imports nothing heavy."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

from posttrain.ground.progress import say

PAUSE = 2.0  # seconds before a job asks again, which has little time left


def ask(*command: str, seconds: float = 60) -> str | None:
    """What a SLURM command says; None where it is not there, fails or does not answer."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout if found.returncode == 0 else None


def answers() -> bool:
    """Whether its controller answers now, where it can be asked: a node without squeue would wait without an end."""
    return not shutil.which("squeue") or ask("squeue", "-h", "--me") is not None


def wait(why: str, longest: float = 60, over: threading.Event | None = None) -> bool:
    """Wait until SLURM answers, asking at least every `longest` seconds; False where it is `over` before.

    why: what waits, in words.
    """
    over, pause = over or threading.Event(), 0.0
    while not over.wait(pause):
        if answers():
            return True
        if not pause:
            say(f"SLURM does not answer: {why}")
        pause = min(2 * pause + 1, longest)
    return False


def job_id() -> str | None:
    """The job of `snakemake --profile slurm` that this process runs in; one of the user's own is left alone."""
    return os.environ.get("SLURM_JOB_ID") if "POSTTRAIN_SITE" in os.environ else None


def shown(job: str, key: str) -> str:
    """One field of what SLURM knows of a job."""
    fields = (ask("scontrol", "show", "job", job) or "").split()
    return next((field.partition("=")[2] for field in fields if field.startswith(f"{key}=")), "")


def state(job: str) -> str:
    """The state of a job, by the controller, else by accounts; UNKNOWN where neither remembers it, RUNNING where nobody
    can be asked now."""
    if said := shown(job, "JobState"):
        return said
    if not answers():
        return "RUNNING"
    accounted = ask("sacct", "-nPX", "-j", job, "-o", "State")
    if accounted is None and remembered(configured())[1]:
        return "RUNNING"
    return next(iter((accounted or "").split()), "UNKNOWN")


def preempted(job: str) -> bool:
    """Whether a job ends for another one and is not to be run again: in a grace time, in which it ends by itself, and
    where the site cancels what it preempts. One that SLURM runs again by itself has no such time any more."""
    return shown(job, "PreemptTime") not in ("", "None")


def ended_by_preemption(job: str) -> bool:
    """Whether a site that cancels what it preempts has ended a job, whose processes have `KillWait` left."""
    return shown(job, "JobState") == "COMPLETING" and preempted(job)


def ran_out(job: str) -> bool:
    """Whether a job or a step of it ended for want of memory; of steps, only a site that keeps accounts knows."""
    said = [shown(job, "JobState"), *(ask("sacct", "-nP", "-j", job, "-o", "State") or "").split()]
    return "OUT_OF_MEMORY" in said


def configured() -> dict[str, str]:
    """How the site has set up SLURM; nothing where it does not say."""
    config = ask("scontrol", "show", "config", seconds=10) or ""
    return dict(map(str.strip, line.partition("=")[::2]) for line in config.splitlines() if "=" in line)


def remembered(fields: dict[str, str]) -> tuple[int, bool]:
    """The seconds for which the controller remembers an ended job, and whether the site keeps accounts (`sacct`).

    fields: what `configured` says.
    """
    accounts = fields.get("AccountingStorageType", "(null)") not in ("(null)", "accounting_storage/none")
    age = int((fields.get("MinJobAge") or "1").split()[0])
    return age or 10**9, accounts  # 0: it forgets none


def longest(partition: str | None) -> int:
    """The most minutes that a partition (or the longest of several, the default one for None) lets a job run; 0 for no
    limit, and where SLURM does not say."""
    named, limits = (partition or "").split(","), []
    for line in (ask("sinfo", "-h", "-o", "%P|%l", seconds=10) or "").splitlines():
        name, _, limit = line.strip().partition("|")
        if name.rstrip("*") in named or (not partition and name.endswith("*")):
            limits.append(int(minutes_of(limit)))
    return max(limits) if limits and all(limits) else 0


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


def refusal(job: str, **changes: str) -> str:
    """Why SLURM would never run a job like this one with other limits; "" where it would. One that can never run would
    wait for ever. changes: options of sbatch."""
    known = {
        "partition": "Partition",
        "account": "Account",
        "qos": "QOS",
        "constraint": "Features",
        "time": "TimeLimit",
    }
    asked = {option: shown(job, field) for option, field in known.items()}
    gpus = re.sub(r"^gres[:/]gpu:", "", shown(job, "TresPerJob"))  # versions of SLURM write it in two ways
    asked |= {"nodes": shown(job, "NumNodes"), "gpus": gpus} | changes
    options = [f"--{key}={value}" for key, value in asked.items() if value not in ("", "(null)")]
    if "time" in changes and 0 < (limit := longest(asked["partition"])) < int(changes["time"]):
        return f"its partition allows {limit} min"  # which --test-only does not say where the job would only wait
    try:
        run = subprocess.run(["sbatch", "--test-only", *options, "--wrap", "true"], capture_output=True, text=True)
    except OSError:
        return "there is no sbatch to ask"
    said = run.stderr.strip().splitlines() or [f"sbatch ended with {run.returncode}"]
    return said[-1].removeprefix("allocation failure: ") if run.returncode else ""


def again(job: str, **changes: str) -> None:
    """Let SLURM run this job again, with other limits. While its controller is away, it is asked again."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    refused = 0
    while ask("scontrol", "requeue", job) is None:
        refused = refused + 1 if answers() else 0
        if refused and shown(job, "JobState") == "PENDING":  # it was accepted without a word
            break
        if refused == 3:  # it came back between two questions at most once
            say("SLURM does not run this job again by itself (requeue is off): snakemake --profile slurm continues it")
            return
        time.sleep(PAUSE)
    other = [f"{key}={value}" for key, value in changes.items()]
    for _ in range(50 if other else 0):  # until the job counts as waiting
        if ask("scontrol", "update", f"JobId={job}", *other) is not None:
            return
        time.sleep(0.1)
    if other:
        say(f"SLURM refused {' '.join(other)}: the job is run again as it was")
