"""Account for every attempt at a stage, whatever its end, in a file of its own that outlives the artifact.

results/compute/EXPERIMENT/STAGE/START-RANDOM.json

The process that outlives the stage writes the file: at the start, at least twice a minute, and at the end. An attempt
that was killed with that process, or lost its node, leaves what was written last: its time is then known from below.
Each file has one writer and is replaced by rename, so that no lock is needed, which some file systems do not have.
"""

import contextlib
import datetime
import os
import platform
import resource
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from posttrain.ground.errors import INTERRUPTED, Interrupted
from posttrain.ground.files import read_object, write_json
from posttrain.reporting.compute import FOLDER
from posttrain.reporting.text import visible

NOTES = "POSTTRAIN_NOTES"  # variable with the file in which a stage says of itself what its parent cannot see
BEAT = 30.0  # seconds between two writings, at most
LONGEST = 300  # characters of a reason

noted: dict = {}  # what this process, a stage, has said of itself


class Account:
    """The account of one attempt. A file that cannot be written is left out: it must not fail the stage."""

    def __init__(self, output: Path, stage: str, **about):
        """output: the manifest that the stage will write. about: further fields that are known at the start."""
        started = datetime.datetime.now(datetime.UTC)
        self.begun = self.written = time.monotonic()
        self.cpu = cpu_of_children()
        folder = folder_of(output)
        self.file = folder / f"{started:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.json" if folder else None
        self.record = {"stage": stage, "identity": None, "started": started.isoformat(timespec="seconds")} | about
        self.record |= {"host": platform.node(), "job": os.environ.get("SLURM_JOB_ID"), "outcome": None, "reason": ""}
        self.write(seconds=0.0)

    def write(self, **fields) -> None:
        """Add fields to the account, and write it."""
        self.written = time.monotonic()
        self.record |= {"seconds": round(self.written - self.begun, 1)} | fields
        if self.file:
            with contextlib.suppress(OSError):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.file, self.record)

    def beat(self, process: int, notes: Path) -> None:
        """Write what is known by now, after 1, 3, 7, 15 seconds, and from then on every half minute. process: the
        stage's. notes: the file with what it noted."""
        if time.monotonic() - self.written >= min(BEAT, self.written - self.begun + 1):
            self.write(cpu_seconds=cpu_of_process(process), **self.noted_in(notes))

    def end(self, outcome: str, reason: str, **fields) -> None:
        """Write how the attempt ended: done, reused, failed, interrupted or killed; and why, in a line."""
        line = next(iter(reason.splitlines()), "").removeprefix("error: ")
        self.write(outcome=outcome, reason=visible(line)[:LONGEST], **fields)

    def end_of_child(self, outcome: str, reason: str, notes: Path) -> None:
        """Write how the stage ended that ran as a child of this process, and what it took."""
        used = {"cpu_seconds": round(cpu_of_children() - self.cpu, 1), "peak_memory_mb": round(peak_mb())}
        self.end(outcome, reason, **used, **self.noted_in(notes))

    def noted_in(self, notes: Path) -> dict:
        """What the stage has noted. GPUs that were reserved count, also where it used fewer."""
        fields = read_object(notes)
        reserved, used = self.record.get("gpus", 0), fields.get("gpus", 0)
        return fields | {"gpus": max(reserved, used)}


def folder_of(output: Path) -> Path | None:
    """The folder with the accounts of an artifact; None for one outside of the project's results."""
    results = Path("results")
    artifact = Path(os.path.abspath(output)).parent
    if not artifact.is_relative_to(results.absolute()):
        return None
    return results / FOLDER / artifact.relative_to(results.absolute())


def note(**fields) -> None:
    """Say of this process, a stage, what its parent cannot see. The first of several processes speaks for all."""
    noted.update(fields)
    if (file := os.environ.get(NOTES)) and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            write_json(Path(file), noted)


@contextlib.contextmanager
def by_hand(output: Path, stage: str) -> Iterator[None]:
    """Account for the stage in this context where no `attempt` does. A killed process leaves the start alone."""
    noted.clear()
    if NOTES in os.environ or os.environ.get("RANK", "0") != "0":
        yield
        return
    account = Account(output, stage, processes=int(os.environ.get("WORLD_SIZE", "1")), gpus=0)
    outcome, reason = "failed", ""
    try:
        yield
        outcome = "reused" if noted.get("reused") else "done"
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        outcome, reason = "interrupted" if stopped else "failed", str(error) or type(error).__name__
        raise
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        account.end(outcome, reason, cpu_seconds=round(sum(os.times()[:4]), 1), peak_memory_mb=round(used), **noted)


def ending(code: int, stopped: bool, message: str, out_of_memory: bool) -> tuple[str, str]:
    """How a stage ended, and why, by its exit code. stopped: whether it was told to. message: what it said."""
    if code == 0:
        return "done", ""
    killer = -code if code < 0 else code - 128  # a shell, and srun, add 128
    if stopped or code == INTERRUPTED or killer in (signal.SIGTERM, signal.SIGINT):
        return "interrupted", message or ("Ctrl-C" if killer == signal.SIGINT else "SIGTERM")
    if out_of_memory or killer > 0:
        names = {number.value: number.name for number in signal.Signals}
        return "killed", "out of memory" if out_of_memory else names.get(killer, f"signal {killer}")
    return "failed", message or f"exit code {code}"


def cpu_of_children() -> float:
    """CPU seconds of the processes that this one has waited for, and of those for which they have."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_of_process(process: int) -> float:
    """CPU seconds of a process and its living descendants; 0 where it has ended."""
    import psutil

    seconds = 0.0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process)
        for one in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                seconds += sum(one.cpu_times()[:2])
    return round(seconds, 1)


def peak_mb() -> float:
    """Peak memory of the largest child process, in MB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
