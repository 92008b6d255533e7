"""Which stages of a campaign are done, stale, running, failed or waiting.

posttrain status [CAMPAIGN]
"""

import time
from pathlib import Path

from posttrain import attempt, why
from posttrain.errors import UserError
from posttrain.files import read_json
from posttrain.plan import Plan

ALIVE = 120  # seconds without a word after which a stage no longer counts as running


def table(plan: Plan) -> str:
    """One line for each artifact that the campaign uses."""
    artifacts = why.survey(plan)
    again = why.to_run(artifacts)
    lines = []
    for folder in artifacts:
        stale = folder in again and artifacts[folder]["whole"]
        found = f"stale (posttrain why {folder.removeprefix('results/')})" if stale else where(Path(folder))
        lines.append(f"{folder.removeprefix('results/'):40} {found}")
    return "\n".join(lines)


def where(folder: Path) -> str:
    """done, running (with step and time left), failed or waiting."""
    if (folder / "manifest.json").is_file():
        return "done"
    log = Path("results/logs", *folder.parts[1:]).with_suffix(".log")
    beats = sorted(folder.glob("checkpoints/*/progress.json"), key=lambda file: file.stat().st_mtime)
    for file in folder.glob("checkpoints/*/failed.json"):
        known = read_json(file)
        if known.get("final"):
            return f"failed: {known['reason'].splitlines()[0]}"
    newest = max((file.stat().st_mtime for file in [*beats, log] if file.is_file()), default=0)
    if not newest:
        return "waiting"
    if log.is_file() and "error:" in log.read_text(errors="replace").rpartition(attempt.SMALLER)[2]:
        return f"failed (see {log})"
    if time.time() - newest > ALIVE:
        return "stopped; the next run continues"
    try:
        beat = read_json(beats[-1])
        left = f"{beat['left'] // 60}:{beat['left'] % 60:02d} left"
        return f"running, step {beat['step']}/{beat['steps']}, {beat['loss']}, {left}"
    except (IndexError, KeyError, TypeError, UserError):
        return "running"
