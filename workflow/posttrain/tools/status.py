"""Which stages of a campaign are done, stale, running, failed or waiting; and why the jobs of a run failed.

posttrain status [CAMPAIGN]
"""

import re
import shutil
import time
from pathlib import Path

from posttrain.dag.artifacts import Artifact, at
from posttrain.dag.plan import Plan
from posttrain.engine import controller
from posttrain.engine.log import Failure, failures
from posttrain.ground.errors import UserError
from posttrain.ground.files import lock, read_json
from posttrain.jobs import attempt
from posttrain.tools import why

ALIVE = 120  # seconds without a word after which a stage no longer counts as running
STOPPED = "the next run continues"  # in the last line of a stage that was told to stop, or has no time left


def table(plan: Plan) -> str:
    """One line for each artifact that the campaign uses."""
    artifacts = why.survey(plan)
    to_run = why.to_run(artifacts)
    queued = controller.queued_jobs(seconds=10)
    lines, jobs = [], {comment: state for _, state, comment in queued or []}
    for artifact in map(at, artifacts):
        is_stale = artifact.folder in to_run and artifacts[artifact.folder]["whole"]
        text = f"stale (posttrain why {artifact.name})" if is_stale else state(artifact, jobs)
        lines.append(f"{artifact.name:40} {text}")
    if queued is None and shutil.which("squeue"):
        lines.append("SLURM does not answer: what is in its queue now is shown as waiting or stopped")
    return "\n".join(lines)


def state(artifact: Artifact, jobs: dict[str, str]) -> str:
    """The state of an artifact: done, in SLURM's queue, running (with step and time left), stopped, failed or waiting.

    jobs: comment -> state of the jobs in SLURM's queue.
    """
    if artifact.exists:
        return "done"
    wildcards = [name for name in (artifact.experiment, artifact.policy) if name]
    job, _, reason = jobs.get(controller.job_comment(artifact.stage, wildcards), "").partition(", ")
    if job == "PD":
        return f"in SLURM's queue ({reason})"
    folder, log = Path(artifact.folder), artifact.log
    beats = sorted(folder.glob("checkpoints/*/progress.json"), key=lambda file: file.stat().st_mtime)
    newest = max((file.stat().st_mtime for file in [*beats, log] if file.is_file()), default=0)
    if not newest:
        return "waiting"
    text = text_of_last_attempt(log)
    if "error:" in text:  # and not only in the record of a failure under earlier settings
        return failed(folder, log, text)
    is_silent = time.time() - newest > ALIVE
    if not job and (is_silent or STOPPED in text or (text and processes_died(folder))):
        return f"stopped; {STOPPED}"
    return "running" if is_silent else running(beats)


def failed(folder: Path, log: Path, text: str) -> str:
    """The state of a stage that failed, with its recorded reason where the text of its log names that one."""
    recorded = [read_json(file).get("reason", "") for file in folder.glob("checkpoints/*/failed.json")]
    reasons = [reason.splitlines()[0] for reason in recorded if reason]
    return next((f"failed: {reason}" for reason in reasons if reason in text), f"failed (see {log})")


def running(beats: list[Path]) -> str:
    """The state of a running stage, by the newest of its `progress.json`."""
    try:
        beat = read_json(beats[-1])
        left = f"{beat['left'] // 60}:{beat['left'] % 60:02d} left"
        return f"running, step {beat['step']}/{beat['steps']}, {beat['loss']}, {left}"
    except (IndexError, KeyError, TypeError, UserError):
        return "running"


def text_of_last_attempt(log: Path) -> str:
    """What a stage's log holds since its last attempt began; "" where none has."""
    return log.read_text(errors="replace").rpartition(attempt.SMALLER)[2] if log.is_file() else ""


def processes_died(folder: Path) -> bool:
    """Whether the processes that made an artifact have died: their lock files lie there, and nobody holds one."""
    files = [*folder.glob(".lock-*")]
    for file in files:
        try:
            with open(file, "r+") as opened:
                if lock(opened.fileno()) is not True:
                    return False
        except OSError:  # just deleted, or another user's
            return False
    return bool(files)


def failed_jobs(logs: list[str], since: float) -> str:
    """Each job that failed in a run of Snakemake, why, and which logs say more; "" where none did.

    logs: Snakemake's. since: when it began to work, in seconds since 1970. Printed below all that was printed since.
    """
    lines: dict[str, str] = {}
    for log in logs:
        for failure in failures(Path(log).read_text(errors="replace")):
            name = at(failure.output).name
            written = [str(file).removeprefix(f"{Path.cwd()}/") for file in failure.logs if is_written(file, since)]
            # A job's own log, printed among Snakemake's, may name the same job again.
            lines.setdefault(name, "\n      ".join([f"  {name}: {cause(failure, since)}", *written]))
    if not lines:
        return ""
    return "\n".join([f"{len(lines)} failed or were stopped; what follows from them was not made:", *lines.values()])


def is_written(log: Path, since: float) -> bool:
    """Whether something was written to a log since then: Snakemake itself makes an empty one."""
    return log.is_file() and log.stat().st_size > 0 and log.stat().st_mtime >= since


def cause(failure: Failure, since: float) -> str:
    """Why a job failed: by its stage's log, else by what Snakemake says of the job."""
    log = at(failure.output).log
    if is_written(log, since) and (text := text_of_last_attempt(log).strip()):
        errors = re.findall(r"^(?:\[[^\]]*\] )?(?:what ended it|error): (?:error: )?(.*)", text, re.M)
        stops = re.findall(rf"\] (.*{STOPPED})", text)
        lines = dict.fromkeys(errors or stops or text.splitlines()[-1:])  # several processes say the same
        return "\n      ".join(lines)
    if failure.refusal:
        return f"SLURM refused the job ({failure.refusal}): `posttrain doctor` says what it would take"
    return f"its stage said nothing. {failure.message}".strip()
