"""One Snakemake at a time in a directory: a dead one's lock is cleared, and the jobs that it left are waited for.

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

from posttrain import cluster, slurm
from posttrain.errors import UserError
from posttrain.files import lock
from posttrain.progress import say

HOLDER = Path(".snakemake/controller.json")
# Snakemake's options that run nothing; while a Snakefile is read, it does not say itself whether it will.
LOOKS = re.compile(
    r"-[a-zA-Z]*n[a-zA-Z]*|--(dry-?run|unlock|report|d3dag|dag|\w+graph|lint|.*summary|list-.*|archive)(=.*)?"
)
PAUSES = (1, 5, 20, 60)  # seconds before SLURM is asked again that has not answered
UNKNOWN = "unknown"
COLUMNS = 0, 20, 28, 88, 288  # where each of what squeue is asked for begins
LOCKS = Path(".snakemake/locks")  # Snakemake's own


def begin(site: cluster.Site | None, command: list[str]) -> None:
    """Before anything is planned: clear the lock of a Snakemake that died, and wait for the jobs that it left.

    site: where jobs run; None on this machine. command: Snakemake's, of which some only look. Raises UserError where
    another Snakemake works here.
    """
    if any(LOOKS.fullmatch(part) for part in command):
        return
    hold()
    if site is not None:
        try:
            wait_for_left_jobs()
        except KeyboardInterrupt:
            raise UserError("interrupted; the jobs that an earlier Snakemake left go on") from None


def hold() -> None:
    """Have this directory for this process until it ends, and say so. Raises UserError where another one has it."""
    try:
        HOLDER.parent.mkdir(exist_ok=True)
        file = os.open(HOLDER, os.O_RDWR | os.O_CREAT, 0o644)  # open until this process ends
    except OSError as error:
        raise UserError(f"{Path.cwd() / HOLDER}: cannot be written: {error.strerror}") from None
    try:
        clear(lock(file))
    except UserError:
        os.close(file)
        raise
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(file, 0)
    os.write(file, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": started}).encode())


def clear(held: bool | None) -> None:
    """Remove Snakemake's lock where the one that had it has died. Raises UserError where one is alive, or may be.

    held: whether this process has the directory now; None where the file system knows no locks.
    """
    locks = [file for file in LOCKS.glob("*") if file.is_file()]
    who = holder()
    said = f"process {who['process']} on {who['host']}, started {who['started']}"
    alive = held is None and who["host"] == socket.gethostname() and Path(f"/proc/{who['process']}").exists()
    if held is False or (locks and alive):
        raise UserError(f"{Path.cwd()}: another Snakemake works here: {said}. Wait for it, or stop it first")
    if not locks or who["process"] == UNKNOWN:  # to Snakemake a lock of unknown holder is one of a living
        return
    if who["host"] != socket.gethostname():
        raise UserError(
            f"{Path.cwd()}: another Snakemake works here: {said}. Whether it lives cannot be seen from "
            f"{socket.gethostname()}: look there, or if it has died: rm {HOLDER} && snakemake --unlock"
        )
    for file in locks:
        file.unlink(missing_ok=True)
    say(f"cleared the lock of a Snakemake that died: {said}")


def holder() -> dict:
    """Who ran the workflow here last."""
    unknown = {"host": socket.gethostname(), "process": UNKNOWN, "started": "at an unknown time"}
    try:
        return unknown | json.loads(HOLDER.read_text())
    except (OSError, ValueError, TypeError):
        return unknown


def left_jobs() -> list[tuple[str, str, str]]:
    """The (number, state, comment) of this user's SLURM jobs that a Snakemake in this directory has submitted.

    Raises UserError where SLURM does not say: what it may be running would be started again.
    """
    for pause in PAUSES:
        if (jobs := queued()) is not None:
            return jobs
        time.sleep(pause)
    raise UserError("SLURM does not say which jobs still run here (squeue failed): try again when it answers")


def queued() -> list[tuple[str, str, str]] | None:
    """Such jobs, with the reason of one that waits in its state; None where SLURM does not say."""
    said = slurm.ask("squeue", "--me", "-h", "-O", "JobID:.20,StateCompact:.8,Reason:.60,Comment:.200,WorkDir:.1000")
    if said is None:
        return None
    jobs, here = [], os.path.realpath(os.getcwd())
    for line in said.splitlines():
        number, state, reason, comment, folder = (
            line[start:end].strip() for start, end in zip(COLUMNS, [*COLUMNS[1:], None], strict=True)
        )
        if comment.startswith("rule_") and folder and os.path.realpath(folder) == here:
            jobs.append((number, f"{state}, {reason}" if state == "PD" else state, comment))
    return jobs


def wait_for_left_jobs(seconds: float = 10) -> None:
    """Wait for the jobs that a dead Snakemake left running: to start them again would be to race them."""
    spoken = 0.0
    while jobs := left_jobs():
        if time.monotonic() - spoken > 600 or not spoken:
            spoken = time.monotonic()
            names = ", ".join(f"{number} ({comment or 'job'}: {state})" for number, state, comment in jobs)
            say(f"an earlier Snakemake left {len(jobs)} jobs; waiting for them: {names}. Stop them: scancel NUMBER")
        time.sleep(seconds)
