"""Why a stage failed, kept beside its checkpoints: where retrying is pointless, the next attempt stops at once."""

import contextlib
import datetime
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from posttrain.ground.errors import Diverged, Interrupted, TooLarge, UserError
from posttrain.ground.files import read_json, write_json

NAME = "failed.json"
FULL = 1e6  # bytes left, under which a disk counts as full


@contextlib.contextmanager
def remembered(checkpoints: Path) -> Iterator[None]:
    """Run a stage's training in this context, which records why it failed.

    `Diverged` is final: with the same settings, inputs and code the stage would diverge again. Any other failure is
    recorded, and the stage is tried again. Raises UserError where an earlier attempt at the same diverged.
    """
    refuse_final(checkpoints)
    try:
        yield
    except (Interrupted, TooLarge):
        raise
    except Exception as error:
        full = full_disk(error, checkpoints)
        with contextlib.suppress(OSError):
            record(checkpoints, str(full or error) or type(error).__name__, isinstance(error, Diverged) and not full)
        if full:
            raise full from None
        raise


def refuse_final(checkpoints: Path) -> None:
    """Raise UserError where an earlier attempt with the same settings, inputs and code failed for good."""
    file = checkpoints / NAME
    failure = read_json(file) if file.is_file() else {}
    if failure.get("final"):
        raise UserError(
            *failure["reason"].splitlines(),
            f"it failed so {failure['when']} on {failure['host']}, and would again: change the settings, or, to try it "
            f"all the same: rm {file}",
        )
    file.unlink(missing_ok=True)


def record(checkpoints: Path, reason: str, final: bool) -> None:
    """Write down why a stage failed."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    failure = {"reason": reason, "final": final, "when": now, "host": platform.node()}
    write_json(checkpoints / NAME, failure | {"job": os.environ.get("SLURM_JOB_ID")})


def full_disk(error: Exception, folder: Path) -> UserError | None:
    """The error to raise in place of one that a full disk caused, which names the disk and what to do; None for any
    other error."""
    existing = next(part for part in [folder, *folder.absolute().parents] if part.is_dir())
    free = shutil.disk_usage(existing).free
    if free > FULL and "No space left" not in str(error):
        return None
    return UserError(
        f"{existing}: the disk is full ({free / 1e6:.1f} MB are left): make room, and run it again to continue"
    )
