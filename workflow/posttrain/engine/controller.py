"""One Snakemake at a time in a folder: a dead one's lock is cleared, and the jobs that it left are waited for.

Snakemake's own lock says only that there is one. Beside it lies who holds it, in a file that the kernel unlocks when
that process ends, however it ends.
"""

import datetime
import json
import os
import re
import socket
import time
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import lock
from posttrain.ground.progress import say
from posttrain.jobs import slurm

HOLDER = Path(".snakemake/controller.json")
LOCKS = Path(".snakemake/locks")  # Snakemake's own
RULE = "rule_"  # begins the comment of each job that Snakemake's SLURM executor submits
# Options with which Snakemake runs nothing; while a Snakefile is read, it does not say itself whether it will.
READ_ONLY = re.compile(
    r"-[a-zA-Z]*n[a-zA-Z]*|--(dry-?run|unlock|report|d3dag|dag|\w+graph|lint|.*summary|list-.*|archive)(=.*)?"
)
PAUSES = (1, 5, 20, 60)  # seconds before squeue, which has not answered, is tried again
COLUMNS = {"JobID": 20, "StateCompact": 8, "Reason": 60, "Comment": 200, "WorkDir": 1000}  # of squeue -> width


def take_over(on_slurm: bool, command: list[str]) -> None:
    """Before anything is planned: clear the lock of a Snakemake that died, and wait for the jobs that it left.

    command: Snakemake's; nothing is done for one that runs nothing. Raises UserError where another Snakemake works
    here, or waits for such jobs.
    """
    if is_read_only(command):
        return
    clear_dead_lock()
    if on_slurm:
        claimed = claim()  # of two that wait, both would begin to work at once
        try:
            wait_for_left_jobs()
        except KeyboardInterrupt:
            raise UserError("interrupted; the jobs that an earlier Snakemake left go on") from None
        finally:
            os.close(claimed)


def is_read_only(command: list[str]) -> bool:
    """Whether a command line of Snakemake's runs nothing."""
    return any(READ_ONLY.fullmatch(part) for part in command)


def claim() -> int:
    """Write down that this process runs the workflow here; returns the file descriptor that holds the claim.

    It is held until the process ends or closes the descriptor. Raises UserError where another process holds one: it
    may have begun to plan before this one, whose lock it then took for a dead one's.
    """
    HOLDER.parent.mkdir(exist_ok=True)
    file = os.open(HOLDER, os.O_RDWR | os.O_CREAT, 0o644)
    if lock(file) is False:
        os.close(file)
        raise UserError(occupied(holder()))
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(file, 0)
    os.write(file, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": started}).encode())
    return file


def clear_dead_lock() -> None:
    """Remove the lock of a Snakemake that has died. Raises UserError where one is alive, or may be."""
    locks = [file for file in LOCKS.glob("*") if file.is_file()]
    if not locks or not HOLDER.is_file():
        return
    process = holder()
    if process["host"] != socket.gethostname():
        raise UserError(
            f"{Path.cwd()}: another Snakemake works here: {described(process)}. Whether it lives cannot be seen from "
            f"{socket.gethostname()}: look there, or if it has died: rm {HOLDER} && snakemake --unlock"
        )
    if is_alive(process):
        raise UserError(occupied(process))
    for file in locks:
        file.unlink(missing_ok=True)
    say(f"cleared the lock of a Snakemake that died: {described(process)}")


def described(process: dict) -> str:
    """A Snakemake, in words."""
    return f"process {process['process']} on {process['host']}, started {process['started']}"


def occupied(process: dict) -> str:
    """The message that another Snakemake is alive here."""
    return f"{Path.cwd()}: another Snakemake works here: {described(process)}. Wait for it, or stop it first"


def holder() -> dict:
    """The host, the process and the start of the Snakemake that claimed this folder last."""
    unknown = {"host": socket.gethostname(), "process": "unknown", "started": "at an unknown time"}
    try:
        return unknown | json.loads(HOLDER.read_text())
    except (OSError, ValueError, TypeError):
        return unknown


def is_alive(process: dict) -> bool:
    """Whether the holder of this folder's claim still runs, on this machine."""
    with open(HOLDER, "r+") as file:
        unlocked = lock(file.fileno())
    return Path(f"/proc/{process['process']}").exists() if unlocked is None else not unlocked


def left_jobs() -> list[tuple[str, str, str]]:
    """The (number, state, comment) of this user's SLURM jobs that a Snakemake in this folder has submitted.

    Raises UserError where SLURM does not answer: a job that it may be running would be started again.
    """
    for pause in (0, *PAUSES):
        time.sleep(pause)
        if (jobs := queued_jobs()) is not None:
            return jobs
    raise UserError("SLURM does not say which jobs still run here (squeue failed): try again when it answers")


def queued_jobs(seconds: float = 60) -> list[tuple[str, str, str]] | None:
    """The same jobs, the state of a waiting one with its reason; None where SLURM does not answer in so many seconds.

    Only those of the SLURM executor count: to wait for the job in which this Snakemake itself runs would never end.
    """
    columns = ",".join(f"{name}:.{width}" for name, width in COLUMNS.items())
    listed = slurm.ask("squeue", "--me", "-h", "-O", columns, seconds=seconds)
    if listed is None:
        return None
    jobs, here = [], os.path.realpath(os.getcwd())
    for line in listed.splitlines():
        number, state, reason, comment, folder = _fields(line)
        if comment.startswith(RULE) and folder and os.path.realpath(folder) == here:
            jobs.append((number, f"{state}, {reason}" if state == "PD" else state, comment))
    return jobs


def _fields(line: str) -> list[str]:
    """The fields of a line of squeue, which are of fixed width but for the last."""
    fields = []
    for width in [*COLUMNS.values()][:-1]:
        fields.append(line[:width].strip())
        line = line[width:]
    return [*fields, line.strip()]


def job_comment(rule: str, wildcards: list[str]) -> str:
    """The comment of a rule's job in SLURM. wildcards: their values, in the order in which its output names them."""
    return f"{RULE}{rule}_wildcards_{'_'.join(wildcards)}"


def wait_for_left_jobs(seconds: float = 10) -> None:
    """Wait for the jobs that a dead Snakemake left running: to start them again would be to race them."""
    told, jobs = 0.0, left_jobs()
    while jobs:
        if time.monotonic() - told > 600 or not told:
            told = time.monotonic()
            names = ", ".join(f"{number} ({comment}: {state})" for number, state, comment in jobs)
            say(f"an earlier Snakemake left {len(jobs)} jobs; waiting for them: {names}. Stop them: scancel NUMBER")
        time.sleep(seconds)
        if (now := queued_jobs()) is not None:  # while SLURM does not answer, they may still run
            jobs = now
