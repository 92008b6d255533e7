"""Allow one Snakemake at a time in a folder: clear the lock of a dead one, and wait for the SLURM jobs that it left.

Snakemake's own lock does not name its holder. The file HOLDER does, and the kernel unlocks it when that process ends in
any way.
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
RULE = "rule_"  # prefix of the comment of each job that Snakemake's SLURM executor submits
# Options with which Snakemake runs nothing. Snakemake has no other sign of it while a Snakefile is read.
READ_ONLY = re.compile(
    r"-[a-zA-Z]*n[a-zA-Z]*|--(dry-?run|unlock|report|d3dag|dag|\w+graph|lint|.*summary|list-.*|archive|containerize)(=.*)?"
)
PAUSES = (1, 5, 20, 60)  # seconds before squeue is tried again after a failure
FIELDS = "%i|%t|%r|%k|%Z"  # of squeue: number, state, reason, comment, and the folder, which may contain a |


def take_over(on_slurm: bool, command: list[str]) -> None:
    """Clear the lock of a Snakemake that died, and wait for the jobs that it left; called before planning.

    command: Snakemake's command line; one that runs nothing takes over nothing. Raises UserError where another
    Snakemake works here, or waits for such jobs.
    """
    if is_read_only(command):
        return
    clear_dead_lock()
    if on_slurm:
        claimed = claim()  # otherwise two waiting Snakemakes would start at the same time
        try:
            wait_for_left_jobs()
        except KeyboardInterrupt:
            raise UserError("interrupted; the jobs that an earlier Snakemake left continue") from None
        finally:
            os.close(claimed)


def is_read_only(command: list[str]) -> bool:
    """Whether a Snakemake command line runs nothing."""
    return any(READ_ONLY.fullmatch(part) for part in command)


def refuse_reader() -> None:
    """Raise UserError where this user may not write into Snakemake's folder; it cannot plan then, by `-n` either."""
    places = [place for place in (HOLDER, HOLDER.parent) if place.exists()] or [Path()]
    if denied := [place for place in places if not os.access(place, os.W_OK)]:
        raise UserError(
            f"{denied[0].absolute()}: no permission to write, which Snakemake needs, for -n too: use a clone of your "
            "own, or ask its owner to let your group write. posttrain check, why, status and verify need none"
        )


def claim() -> int:
    """Claim this folder for this process; returns the file descriptor that holds the claim.

    The claim ends with the process or when the descriptor is closed. Raises UserError where another process holds a
    claim: it may have started to plan before this one, and taken this one's lock for a dead one's.
    """
    HOLDER.parent.mkdir(exist_ok=True)
    file = os.open(HOLDER, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask
    if lock(file) is False:
        os.close(file)
        raise UserError(occupied(holder()))
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    process = {"host": socket.gethostname(), "process": os.getpid(), "started": started, "users": users()}
    os.ftruncate(file, 0)
    os.write(file, json.dumps(process).encode())
    return file


def clear_dead_lock() -> None:
    """Remove the lock of a Snakemake that died. Raises UserError where it is, or may be, alive."""
    locks = [file for file in LOCKS.glob("*") if file.is_file()]
    if not locks or not HOLDER.is_file():
        return
    process = holder()
    if process["host"] != socket.gethostname():
        raise UserError(
            f"{Path.cwd()}: another Snakemake works here: {described(process)}. {socket.gethostname()} cannot tell "
            f"whether it is alive: look there, or if it has died: rm {HOLDER} && snakemake --unlock"
        )
    if is_alive(process):
        raise UserError(occupied(process))
    for file in locks:
        file.unlink(missing_ok=True)
    say(f"cleared the lock of a Snakemake that died: {described(process)}")


def described(process: dict) -> str:
    """The text that names a Snakemake: process, host and start."""
    return f"process {process['process']} on {process['host']}, started {process['started']}"


def occupied(process: dict) -> str:
    """The message that another Snakemake is alive here."""
    return f"{Path.cwd()}: another Snakemake works here: {described(process)}. Wait for it, or stop it first"


def holder() -> dict:
    """Host, process and start of the last Snakemake that claimed this folder."""
    unknown = {"host": socket.gethostname(), "process": "unknown", "started": "at an unknown time"}
    try:
        return unknown | json.loads(HOLDER.read_text())
    except (OSError, ValueError, TypeError):
        return unknown


def users() -> list[int]:
    """Number of this user, and of all others whose Snakemake worked in this folder and may have left jobs."""
    earlier = holder().get("users")
    numbers = [user for user in earlier if isinstance(user, int)] if isinstance(earlier, list) else []
    return sorted({*numbers, os.getuid()})


def is_alive(process: dict) -> bool:
    """Whether the holder of this folder's claim still runs on this machine."""
    with open(HOLDER, "r+") as file:
        unlocked = lock(file.fileno())
    return Path(f"/proc/{process['process']}").exists() if unlocked is None else not unlocked


def left_jobs() -> list[tuple[str, str, str]]:
    """(number, state, comment) of the SLURM jobs that a Snakemake in this folder submitted, also another user's.

    Raises UserError where SLURM does not answer, as a running job could then be started twice.
    """
    for pause in (0, *PAUSES):
        time.sleep(pause)
        if (jobs := queued_jobs()) is not None:
            return jobs
    raise UserError("SLURM does not say which jobs still run here (squeue failed): try again when it answers")


def queued_jobs(seconds: float = 60) -> list[tuple[str, str, str]] | None:
    """The same jobs, with the reason in a waiting job's state; None where SLURM does not answer within `seconds`.

    Only jobs of the SLURM executor count: the job in which this Snakemake itself may run must not be waited for.
    """
    of_users = ",".join(map(str, users()))
    listed = slurm.ask("squeue", "--user", of_users, "-h", "-o", FIELDS, seconds=seconds)
    if listed is None:
        return None
    jobs, here = [], os.path.realpath(os.getcwd())
    for line in listed.splitlines():
        match line.split("|", 4):
            case number, state, reason, comment, folder if (
                comment.startswith(RULE) and os.path.realpath(folder) == here
            ):
                jobs.append((number, f"{state}, {reason}" if state == "PD" else state, comment))
    return jobs


def job_comment(rule: str, wildcards: list[str]) -> str:
    """The comment of a rule's job in SLURM. wildcards: their values, in the order of the output's path."""
    return f"{RULE}{rule}_wildcards_{'_'.join(wildcards)}"


def wait_for_left_jobs(seconds: float = 10) -> None:
    """Wait for the jobs that a dead Snakemake left running; otherwise they would be started twice."""
    last_message, jobs = 0.0, left_jobs()
    while jobs:
        if time.monotonic() - last_message > 600 or not last_message:
            last_message = time.monotonic()
            names = ", ".join(f"{number} ({comment}: {state})" for number, state, comment in jobs)
            say(f"an earlier Snakemake left {len(jobs)} jobs; waiting for them: {names}. Stop them: scancel NUMBER")
        time.sleep(seconds)
        if (now := queued_jobs()) is not None:  # None: SLURM does not answer, and the jobs may still run
            jobs = now
