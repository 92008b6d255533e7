"""Check a sample of what a finished artifact claims: replay steps of its training, or ask questions of it again.

posttrain spotcheck tiny/sft
posttrain spotcheck tiny/evaluate/sft --questions 100
"""

import functools
import os
import random
import tempfile
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import sha256
from posttrain.jobs import artifact, damage, recorded
from posttrain.jobs.recorded import Recorded
from posttrain.tools import answered, asked, replayed
from posttrain.tools.explain import campaigns_of, folder_of, metrics_of, remake
from posttrain.training import spotchecks

ASKED = {"evaluate": asked.check, "compare": answered.check}


def spotcheck(place: str, numbers: list[int], questions: int, seed: int | None) -> int:
    """Print what was checked, what agrees or differs, what it cost, and the confidence that it gives; returns 0 where
    all agrees, else 1. Altered files end it before anything is run.

    place: an artifact, as `tiny/sft`. numbers: of places of the training (`replayed.check`). questions: to ask again.
    Raises UserError for an artifact that is not there, cannot be run again, or is of a stage that is as cheap whole.
    """
    folder = folder_of(place)
    metrics_of(folder)
    of_record = recorded.load(folder)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    if "history" in of_record.metrics:
        check = functools.partial(replayed.check, of_record, numbers, seed)
    elif of_record.stage in ASKED:
        check = functools.partial(ASKED[of_record.stage], of_record, questions, seed)
    else:
        raise UserError(whole(of_record))
    lines, agreed = [f"differs: {problem}" for problem in altered(folder)], False
    if not lines:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["HF_DATASETS_CACHE"] = cache  # temporary, as cached builders must not outlive the data
            artifact.import_libraries()
            started = spent()
            lines, agreed = check()
        lines.append(cost(of_record, started))
    print("\n".join([f"{folder}: {summary(of_record)}", *lines, "agrees" if agreed else "differs"]))
    return 0 if agreed else 1


def altered(folder: Path) -> list[str]:
    """The files of an artifact, and of its stored states, whose bytes are not those of a manifest or of the record."""
    states = folder / spotchecks.MANIFEST
    return damage.damages_of(folder / "manifest.json") + (damage.damages_of(states) if states.is_file() else [])


def summary(of_record: Recorded) -> str:
    """What the record says of the artifact's making."""
    record = of_record.record
    spent = f"{record['cpu_seconds']:,.0f} CPU seconds" if "cpu_seconds" in record else "an unknown time"
    return f"{of_record.stage}, made {record.get('started', 'at an unknown time')} in {spent}, by its record"


def whole(of_record: Recorded) -> str:
    """Why nothing of an artifact can be checked by a sample, and how to make all of it again."""
    folder = of_record.folder
    again = remake(folder, campaigns_of([folder]).get(folder))
    return (
        f"{folder}: {of_record.stage} has neither steps to replay nor answers to compare. Make it again ({again}): the "
        f"sha256 of {folder}/manifest.json must be {sha256(folder / 'manifest.json')}"
    )


def spent() -> float:
    """CPU seconds of this process so far."""
    return sum(os.times()[:2])


def cost(of_record: Recorded, started: float) -> str:
    """What the check cost beside what is recorded of the whole. started: CPU seconds before it began."""
    text = f"cost: {spent():.1f} CPU seconds, {started:.1f} of them to start Python and its libraries"
    if not (all_of_it := of_record.record.get("cpu_seconds")):
        return text
    share, alone = (amount / all_of_it for amount in (spent(), spent() - started))
    return f"{text}; {share:.1%} of the recorded {all_of_it:,.1f}, {alone:.1%} without the start"
