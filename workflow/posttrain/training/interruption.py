"""Decide when a stage saves and stops: minutes between checkpoints, the job's time limit, SIGTERM.

python -m posttrain STAGE ... --minutes 60    # saves before the hour is over and exits with 75; run again, it continues
"""

import contextlib
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from posttrain.ground import files
from posttrain.ground.errors import INTERRUPTED, Interrupted, UserError
from posttrain.ground.progress import say

SAVING = 5.0  # seconds reserved for saving at least
WAIT = 300.0  # seconds that a process has to end after SIGTERM
GO_ON, SAVE, NEAR, TERMINATED = range(4)  # what to do after a step, by urgency; NEAR: the time limit is near

limit = 0.0  # minutes of the batch job, set once by the command line; 0: no limit
deadline = math.inf  # end of the time limit, by `time.monotonic`
terminated = False  # whether SIGTERM was received
stepping = False  # whether training steps are running, so that there is something to save


def listen(minutes: float) -> None:
    """Set the time limit, in minutes from this process's start (0: none), and handle SIGTERM."""
    global limit, deadline
    signal.signal(signal.SIGTERM, on_sigterm)
    if minutes:
        import psutil

        limit = minutes
        deadline = time.monotonic() + 60 * minutes - (time.time() - psutil.Process().create_time())


def on_sigterm(*_) -> None:
    """Stop after the current step; before the first step and after the last, exit at once: nothing is to be saved."""
    global terminated
    terminated = True
    if not stepping:
        say("told to stop (SIGTERM); the next run continues")
        sys.exit(INTERRUPTED)


def due(step: float, saving: float) -> int:
    """Whether to stop now: TERMINATED, NEAR or GO_ON. step, saving: seconds of the longest step and saving so far.

    The time left must suffice for a step of twice that length and for saving it.
    """
    if terminated:
        return TERMINATED
    return NEAR if time.monotonic() + 2 * step + max(SAVING, saving) > deadline else GO_ON


class Watch:
    """Decides after each step of a stage whether to save and to stop; all processes come to the same decision."""

    def __init__(self, section):
        """section: `config.Optimisation`. Raises UserError where the time limit is too short for a step."""
        global stepping
        self.section, self.saving, self.longest = section, 0.0, 0.0
        self.ended = self.saved = time.monotonic()
        self.urgency = agreed(due(0.0, 0.0))
        if self.urgency == NEAR:
            raise UserError(
                f"the time limit of {limit:g} min is too short for one step and for saving after it: "
                "raise --minutes, which is the job's runtime"
            )
        stepping = True

    def step(self, step: int) -> bool:
        """Whether to save; called after each step."""
        global stepping
        now = time.monotonic()
        self.longest, self.ended = max(self.longest, now - self.ended), now
        every = self.section.checkpoint_steps
        timely = now - self.saved >= 60 * self.section.checkpoint_minutes or (every and step % every == 0)
        self.urgency = agreed(max(due(self.longest, self.saving), SAVE if timely else GO_ON))
        stepping = step < self.section.steps
        return self.urgency > GO_ON

    def wrote(self) -> None:
        """Record the time of saving; called after it. The next saving is expected to take as long."""
        now = time.monotonic()
        self.saving, self.saved = max(self.saving, now - self.ended), now

    def stop(self, step: int) -> Interrupted | None:
        """The error to raise after the step was saved; None to continue, and after the last step."""
        if self.urgency < NEAR or step >= self.section.steps:
            return None
        why = "told to stop (SIGTERM)" if self.urgency == TERMINATED else f"the time limit of {limit:g} min is near"
        return Interrupted(f"{why}: saved at step {step} of {self.section.steps}; the next run continues")


def agreed(urgency: int) -> int:
    """The most urgent decision of all processes, so that all save and stop after the same step."""
    from posttrain.training import parallel

    return int(parallel.largest(float(urgency), parallel.device())) if parallel.world() > 1 else urgency


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[bool]:
    """Hold a lock file, so that a process that outlives its job and its successor do not write the same files.

    Yields whether it waited for another process. Raises UserError, naming that process, where it does not end in time.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    since, holder = time.monotonic(), ""
    while (file := locked(lock)) is None:
        if not holder:
            with contextlib.suppress(FileNotFoundError):  # the holder may have ended meanwhile
                holder = lock.read_text().strip()
            holder = holder or "another process"
            say(f"{holder} is making the same artifact: waiting for it, {WAIT / 60:g} min at most")
        if time.monotonic() - since > WAIT:
            raise UserError(f"{lock.parent}: {holder} is still making the same artifact: end it, or wait for it")
        time.sleep(1)
    os.write(file, f"process {os.getpid()} on {platform.node()}\n".encode())
    try:
        yield bool(holder)
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def locked(lock: Path) -> int | None:
    """The descriptor of the opened and locked file; None where another process holds the lock."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask
    with contextlib.suppress(FileNotFoundError):  # the last holder may have deleted it meanwhile
        if files.lock(file) is not False and os.fstat(file).st_ino == lock.stat().st_ino:
            os.ftruncate(file, 0)
            return file
    os.close(file)
    return None
