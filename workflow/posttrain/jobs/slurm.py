"""Query SLURM's jobs, partitions and configuration; pass SIGTERM on, and requeue jobs. Imports nothing heavy."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

from posttrain.ground.progress import say

SITE = "POSTTRAIN_SITE"  # variable with the site's settings as JSON, in every job of `snakemake --profile slurm`
PAUSE = 2.0  # seconds before a failed requeue is tried again; short, as the job has little time left
UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}  # of memory, in MB
COMMANDS = ("sbatch", "squeue", "scontrol", "sinfo", "srun")
TODO = "log in to the cluster, or load its module of SLURM"  # where a command is absent


def absent() -> list[str]:
    """The commands of SLURM that are not on PATH."""
    return [name for name in COMMANDS if not shutil.which(name)]


def ask(*command: str, seconds: float = 60) -> str | None:
    """The output of a SLURM command; None where it does not exist, fails or does not end within `seconds`."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout if run.returncode == 0 else None


def is_reachable() -> bool:
    """Whether SLURM's controller answers; True where squeue does not exist, as waiting would then never end."""
    return not shutil.which("squeue") or ask("squeue", "-h", "--me") is not None


def wait_until_reachable(why: str, longest: float = 60, over: threading.Event | None = None) -> bool:
    """Wait until SLURM answers, with queries at least every `longest` seconds; False where `over` is set before.

    why: text on what waits, for the message.
    """
    over, pause = over or threading.Event(), 0.0
    while not over.wait(pause):
        if is_reachable():
            return True
        if not pause:
            say(f"SLURM does not answer: {why}")
        pause = min(2 * pause + 1, longest)
    return False


def job_id() -> str | None:
    """The job of `snakemake --profile slurm` that this process runs in, or None; a job of the user's own is none."""
    return os.environ.get("SLURM_JOB_ID") if SITE in os.environ else None


def field(job: str, key: str) -> str:
    """One field of `scontrol show job`; "" where it is unknown."""
    fields = (ask("scontrol", "show", "job", job) or "").split()
    return next((field.partition("=")[2] for field in fields if field.startswith(f"{key}=")), "")


def state(job: str) -> str:
    """The state of a job by the controller, else by sacct; RUNNING where neither answers, UNKNOWN where neither has the
    job."""
    if current := field(job, "JobState"):
        return current
    if not is_reachable():
        return "RUNNING"
    accounted = ask("sacct", "-nPX", "-j", job, "-o", "State")
    if accounted is None and retention(configuration())[1]:
        return "RUNNING"
    return next(iter((accounted or "").split()), "UNKNOWN")


def is_preempted(job: str) -> bool:
    """Whether a job is being preempted and will not be requeued by SLURM itself.

    This holds in a grace time, in which the job ends by itself, and where the site cancels preempted jobs. A job that
    SLURM requeues has no PreemptTime.
    """
    return field(job, "PreemptTime") not in ("", "None")


def is_ended_by_preemption(job: str) -> bool:
    """Whether a site that cancels preempted jobs has ended a job; its processes then have `KillWait` left."""
    return field(job, "JobState") == "COMPLETING" and is_preempted(job)


def ran_out_of_memory(job: str) -> bool:
    """Whether a job or one of its steps ended out of memory; steps are known only at a site with accounting."""
    states = [field(job, "JobState"), *(ask("sacct", "-nP", "-j", job, "-o", "State") or "").split()]
    return "OUT_OF_MEMORY" in states


def configuration() -> dict[str, str]:
    """SLURM's configuration at this site; empty where it does not answer."""
    lines = (ask("scontrol", "show", "config", seconds=10) or "").splitlines()
    pairs = [line.partition("=")[::2] for line in lines if "=" in line]
    return {key.strip(): value.strip() for key, value in pairs}


def retention(fields: dict[str, str]) -> tuple[int, bool]:
    """(seconds for which the controller remembers an ended job, whether the site has accounting, `sacct`).

    fields: the `configuration`.
    """
    accounts = fields.get("AccountingStorageType", "(null)") not in ("(null)", "accounting_storage/none")
    age = int((fields.get("MinJobAge") or "1").split()[0])
    return age or 10**9, accounts  # 0: jobs are never forgotten


def time_limit(partition: str | None) -> int:
    """The longest time limit of some partitions, in minutes; 0 for no limit, and where SLURM does not answer.

    partition: names, separated by commas; None for the default one.
    """
    names, limits = (partition or "").split(","), []
    for line in (ask("sinfo", "-h", "-o", "%P|%l", seconds=10) or "").splitlines():
        name, _, limit = line.strip().partition("|")
        if name.rstrip("*") in names or (not partition and name.endswith("*")):
            limits.append(int(minutes(limit)))
    return max(limits) if limits and all(limits) else 0


def minutes(text: str) -> float:
    """SLURM's `days-hours:minutes:seconds` in minutes; 0 for no limit."""
    days, _, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        return int(days or 0) * 1440 + sum(part * 60**place for place, part in enumerate(reversed(parts))) / 60
    except ValueError:  # UNLIMITED, INVALID
        return 0.0


def memory_mb(job: str) -> int:
    """The memory of a job on each node, in MB; 0 where it is unknown."""
    text = field(job, "MinMemoryNode")
    return round(float(text[:-1]) * UNITS[text[-1]]) if text and text[-1] in UNITS else 0


def oom_kills() -> int:
    """Number of processes of this job that the kernel's OOM killer ended, by its control groups."""
    kills = 0
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("memory", ""):
            root = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            for file in (root / "memory.oom_control", root / "memory.events"):
                words = file.read_text().split() if file.is_file() else []
                kills += int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0
    return kills


def refusal(job: str, **changes: str) -> str:
    """The reason why SLURM would never run a job like this one with changed limits; "" where it would.

    changes: options of sbatch. SLURM may accept such a job and never start it.
    """
    fields = {"partition": "Partition", "account": "Account", "qos": "QOS", "constraint": "Features",
              "time": "TimeLimit", "nodes": "NumNodes"}  # fmt: skip
    wanted = {option: field(job, name) for option, name in fields.items()}
    wanted["gpus"] = re.sub(r"^gres[:/]gpu:", "", field(job, "TresPerJob"))  # versions of SLURM write it in two ways
    wanted |= changes
    options = [f"--{key}={value}" for key, value in wanted.items() if value not in ("", "(null)")]
    if "time" in changes and 0 < (limit := time_limit(wanted["partition"])) < int(changes["time"]):
        return f"its partition allows {limit} min"  # --test-only does not report it where the job would wait
    try:
        run = subprocess.run(["sbatch", "--test-only", *options, "--wrap", "true"], capture_output=True, text=True)
    except OSError:
        return "there is no sbatch"
    errors = run.stderr.strip().splitlines() or [f"sbatch ended with {run.returncode}"]
    return errors[-1].removeprefix("allocation failure: ") if run.returncode else ""


def pass_on_sigterm() -> None:
    """Pass SIGTERM on to the stage: SLURM sends it only to a task's first process, which is Snakemake.

    Snakemake keeps its own handler; a thread also receives the signal, and signals the whole process group once.
    """
    if "SLURM_STEP_ID" not in os.environ:  # this process submits the stage and does not run it
        return
    received, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def listen() -> None:
        while signal.SIGTERM not in os.read(received, 64):
            pass
        os.killpg(0, signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()


def requeue(job: str, **changes: str) -> None:
    """Requeue a job, with changed limits. changes: fields of `scontrol update`.

    While SLURM's controller does not answer, the request is repeated.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    refusals = 0
    while ask("scontrol", "requeue", job) is None:
        refusals = refusals + 1 if is_reachable() else 0
        if refusals and field(job, "JobState") == "PENDING":  # it was requeued, but the answer was lost
            break
        if refusals == 3:  # one failure may be due to a controller that came back meanwhile
            say("SLURM does not run this job again by itself (requeue is off): snakemake --profile slurm continues it")
            return
        time.sleep(PAUSE)
    limits = [f"{key}={value}" for key, value in changes.items()]
    for _ in range(50 if limits else 0):  # until the job is pending
        if ask("scontrol", "update", f"JobId={job}", *limits) is not None:
            return
        time.sleep(0.1)
    if limits:
        say(f"SLURM refused {' '.join(limits)}: the job runs again with its former limits")
