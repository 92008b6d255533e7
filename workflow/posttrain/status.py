"""Which stages of a campaign are done, stale, running, failed or waiting.

posttrain status [CAMPAIGN]
"""

import shutil
import time
from pathlib import Path

from posttrain import attempt, controller, why
from posttrain.errors import UserError
from posttrain.files import read_json
from posttrain.plan import Plan

ALIVE = 120  # seconds without a word after which a stage no longer counts as running


def table(plan: Plan) -> str:
    """One line for each artifact that the campaign uses."""
    artifacts = why.survey(plan)
    again = why.to_run(artifacts)
    queued = controller.queued(seconds=10)
    lines, jobs = [], {comment: state for _, state, comment in queued or []}
    for folder in artifacts:
        stale = folder in again and artifacts[folder]["whole"]
        found = f"stale (posttrain why {folder.removeprefix('results/')})" if stale else where(Path(folder), jobs)
        lines.append(f"{folder.removeprefix('results/'):40} {found}")
    if queued is None and shutil.which("squeue"):
        lines.append("SLURM does not answer: what is in its queue now is shown as waiting or stopped")
    return "\n".join(lines)


def where(folder: Path, jobs: dict[str, str]) -> str:
    """done, in SLURM's queue, running (with step and time left), failed or waiting. jobs: comment -> state (squeue)."""
    if (folder / "manifest.json").is_file():
        return "done"
    experiment, stage, policy = [*folder.parts[1:], "", ""][:3]
    comment = f"rule_{stage}_wildcards_{'_'.join(filter(None, [experiment, policy]))}"
    state, _, reason = jobs.get(comment, "").partition(", ")
    if state == "PD":
        return f"in SLURM's queue ({reason})"
    log = Path("results/logs", *folder.parts[1:]).with_suffix(".log")
    beats = sorted(folder.glob("checkpoints/*/progress.json"), key=lambda file: file.stat().st_mtime)
    newest = max((file.stat().st_mtime for file in [*beats, log] if file.is_file()), default=0)
    if not newest:
        return "waiting"
    said = log.read_text(errors="replace").rpartition(attempt.SMALLER)[2] if log.is_file() else ""
    if "error:" in said:  # and not only in what earlier settings have left
        known = [read_json(file).get("reason", "") for file in folder.glob("checkpoints/*/failed.json")]
        reasons = [reason.splitlines()[0] for reason in known if reason]
        return next((f"failed: {reason}" for reason in reasons if reason in said), f"failed (see {log})")
    if time.time() - newest > ALIVE:
        return "running" if state else "stopped; the next run continues"
    try:
        beat = read_json(beats[-1])
        left = f"{beat['left'] // 60}:{beat['left'] % 60:02d} left"
        return f"running, step {beat['step']}/{beat['steps']}, {beat['loss']}, {left}"
    except (IndexError, KeyError, TypeError, UserError):
        return "running"
