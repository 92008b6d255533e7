"""Why a stage failed, left beside its checkpoints: the next attempt at the same identity reads it and stops at once."""

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
LEFT = 1e6  # bytes under which a disk counts as full


@contextlib.contextmanager
def remembered(checkpoints: Path) -> Iterator[None]:
    """Run a stage's training under this. What training itself came to (`Diverged`) is final: the same settings, inputs
    and code come to it again. Whatever else ends a stage is noted, and tried again.

    Raises UserError where an attempt before this one has found such a mistake.
    """
    refuse_known(checkpoints)
    try:
        yield
    except (Interrupted, TooLarge):
        raise
    except Exception as error:
        full = on_full_disk(error, checkpoints)
        final = isinstance(error, Diverged)
        with contextlib.suppress(OSError):
            note(checkpoints, str(full or error) or type(error).__name__, final and not full)
        if full:
            raise full from None
        raise


def refuse_known(checkpoints: Path) -> None:
    """Raise UserError where the same settings, inputs and code are known to fail."""
    file = checkpoints / NAME
    known = read_json(file) if file.is_file() else {}
    if known.get("final"):
        raise UserError(
            *known["reason"].splitlines(),
            f"it failed so {known['when']} on {known['host']}, and would again: change the settings, or, to try it "
            f"all the same: rm {file}",
        )
    file.unlink(missing_ok=True)


def note(checkpoints: Path, reason: str, final: bool) -> None:
    """Write down why a stage failed."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    job = os.environ.get("SLURM_JOB_ID")
    said = {"reason": reason, "final": final, "when": now, "host": platform.node(), "job": job}
    write_json(checkpoints / NAME, said)


def on_full_disk(error: Exception, folder: Path) -> UserError | None:
    """What to tell where a disk is full: some libraries do not say so, and none says what to do."""
    there = next(part for part in [folder, *folder.absolute().parents] if part.is_dir())
    free = shutil.disk_usage(there).free
    if free > LEFT and "No space left" not in str(error):
        return None
    return UserError(
        f"{there}: the disk is full ({free / 1e6:.1f} MB are left): make room, and run it again to continue"
    )
