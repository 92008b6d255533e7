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

from posttrain.cluster import sites
from posttrain.ground.errors import UserError
from posttrain.ground.files import lock
from posttrain.ground.progress import say
from posttrain.jobs import slurm

HOLDER = Path(".snakemake/controller.json")
# Snakemake's options that run nothing; while a Snakefile is read, it does not say itself whether it will.
LOOKS = re.compile(
    r"-[a-zA-Z]*n[a-zA-Z]*|--(dry-?run|unlock|report|d3dag|dag|\w+graph|lint|.*summary|list-.*|archive)(=.*)?"
)
PAUSES = (1, 5, 20, 60)  # seconds before SLURM is asked again that has not answered
COLUMNS = 0, 20, 28, 88, 288  # where each of what squeue is asked for begins
LOCKS = Path(".snakemake/locks")  # Snakemake's own


def begin(site: sites.Site | None, command: list[str]) -> None:
    """Before anything is planned: clear the lock of a Snakemake that died, and wait for the jobs that it left.

    site: where jobs run; None on this machine. command: Snakemake's, of which some only look. Raises UserError where
    another Snakemake works here, or waits for such jobs.
    """
    if looks(command):
        return
    clear()
    if site is not None:
        held = hold()  # of two that wait, both would begin to work at once
        try:
            wait_for_left_jobs()
        except KeyboardInterrupt:
            raise UserError("interrupted; the jobs that an earlier Snakemake left go on") from None
        finally:
            os.close(held)


def looks(command: list[str]) -> bool:
    """Whether Snakemake runs nothing. command: its own."""
    return any(LOOKS.fullmatch(part) for part in command)


def hold() -> int:
    """Say that this process runs the workflow here, from now on until it ends or closes the file descriptor that this
    gives back. Raises UserError where another one does that began to plan before this one said so, and whose lock it
    may have taken for a dead one's."""
    HOLDER.parent.mkdir(exist_ok=True)
    file = os.open(HOLDER, os.O_RDWR | os.O_CREAT, 0o644)  # open until this process ends
    if lock(file) is False:
        os.close(file)
        raise UserError(works_here(holder()))
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(file, 0)
    os.write(file, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": started}).encode())
    return file


def clear() -> None:
    """Remove the lock of a Snakemake that has died. Raises UserError where one is alive, or may be."""
    locks = [file for file in LOCKS.glob("*") if file.is_file()]
    if not locks or not HOLDER.is_file():
        return
    who = holder()
    said = described(who)
    if who["host"] != socket.gethostname():
        raise UserError(
            f"{Path.cwd()}: another Snakemake works here: {said}. Whether it lives cannot be seen from "
            f"{socket.gethostname()}: look there, or if it has died: rm {HOLDER} && snakemake --unlock"
        )
    if alive():
        raise UserError(works_here(who))
    for file in locks:
        file.unlink(missing_ok=True)
    say(f"cleared the lock of a Snakemake that died: {said}")


def described(who: dict) -> str:
    """A Snakemake, in words."""
    return f"process {who['process']} on {who['host']}, started {who['started']}"


def works_here(who: dict) -> str:
    """That it is alive."""
    return f"{Path.cwd()}: another Snakemake works here: {described(who)}. Wait for it, or stop it first"


def holder() -> dict:
    """Who ran the workflow here last."""
    unknown = {"host": socket.gethostname(), "process": "unknown", "started": "at an unknown time"}
    try:
        return unknown | json.loads(HOLDER.read_text())
    except (OSError, ValueError, TypeError):
        return unknown


def alive() -> bool:
    """Whether that process still runs, on this machine."""
    with open(HOLDER, "r+") as file:
        locked = lock(file.fileno())
    return Path(f"/proc/{holder()['process']}").exists() if locked is None else not locked


def left_jobs() -> list[tuple[str, str, str]]:
    """The (number, state, comment) of this user's SLURM jobs that a Snakemake in this directory has submitted.

    Raises UserError where SLURM does not say: what it may be running would be started again.
    """
    for pause in (0, *PAUSES):
        time.sleep(pause)
        if (jobs := queued()) is not None:
            return jobs
    raise UserError("SLURM does not say which jobs still run here (squeue failed): try again when it answers")


def queued(seconds: float = 60) -> list[tuple[str, str, str]] | None:
    """Such jobs, with the reason of one that waits in its state; None where SLURM does not say in so many seconds."""
    columns = "JobID:.20,StateCompact:.8,Reason:.60,Comment:.200,WorkDir:.1000"
    said = slurm.ask("squeue", "--me", "-h", "-O", columns, seconds=seconds)
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
    spoken, jobs = 0.0, left_jobs()
    while jobs:
        if time.monotonic() - spoken > 600 or not spoken:
            spoken = time.monotonic()
            names = ", ".join(f"{number} ({comment or 'job'}: {state})" for number, state, comment in jobs)
            say(f"an earlier Snakemake left {len(jobs)} jobs; waiting for them: {names}. Stop them: scancel NUMBER")
        time.sleep(seconds)
        if (now := queued()) is not None:  # while SLURM does not answer, they may still run
            jobs = now
