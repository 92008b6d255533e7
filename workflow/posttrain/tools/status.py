"""Show which stages of a campaign are done, stale, running, failed or waiting, and why the jobs of a run failed.

posttrain status [CAMPAIGN]
"""

import re
import shutil
import time
from pathlib import Path

from posttrain.dag.artifacts import Artifact, at
from posttrain.dag.plan import Plan
from posttrain.engine import controller
from posttrain.engine.log import Failure, errors, exception, failures, last_line
from posttrain.ground.errors import UserError
from posttrain.ground.files import lock, read_json
from posttrain.jobs import attempt
from posttrain.tools import ledger, why

ALIVE = 120  # seconds without output after which a stage no longer counts as running
STOPPED = "the next run continues"  # part of the last line of a stage that stopped by a signal or its time limit


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
    return "\n".join([*lines, *filter(None, [ledger.lacking(plan)])])


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
    if errors(text):  # the failure is that of the present settings
        return failed(folder, log, text)
    is_silent = time.time() - newest > ALIVE
    if not job and (is_silent or STOPPED in text or (text and processes_died(folder))):
        crashed = STOPPED not in text and exception(text)
        return failed(folder, log, text) if crashed else f"stopped; {STOPPED}"
    return "running" if is_silent else running(beats)


def failed(folder: Path, log: Path, text: str) -> str:
    """The state of a failed stage, with the recorded reason that occurs in the text of its log."""
    recorded = [read_json(file).get("reason", "") for file in folder.glob("checkpoints/*/failed.json")]
    reasons = [reason.splitlines()[0] for reason in recorded if reason]
    if recorded := [reason for reason in reasons if reason in text]:
        return f"failed: {recorded[0]}"
    return f"failed: {(errors(text) or exception(text))[-1]} (see {log})"


def running(beats: list[Path]) -> str:
    """The state of a running stage, by the newest of its `progress.json` files."""
    try:
        beat = read_json(beats[-1])
        left = f"{beat['left'] // 60}:{beat['left'] % 60:02d} left"
        return f"running, step {beat['step']}/{beat['steps']}, {beat['loss']}, {left}"
    except (IndexError, KeyError, TypeError, UserError):
        return "running"


def text_of_last_attempt(log: Path) -> str:
    """The part of a stage's log from its last attempt; "" without a log."""
    return log.read_text(errors="replace").rpartition(attempt.SMALLER)[2] if log.is_file() else ""


def processes_died(folder: Path) -> bool:
    """Whether the processes that made an artifact have died: their lock files exist and no process holds one."""
    files = [*folder.glob(".lock-*")]
    for file in files:
        try:
            with open(file, "r+") as opened:
                if lock(opened.fileno()) is not True:
                    return False
        except OSError:  # deleted meanwhile, or another user's
            return False
    return bool(files)


def failed_jobs(logs: list[str], since: float) -> str:
    """Each failed job of a run of Snakemake, with the reason and its logs; "" where none failed.

    logs: Snakemake's own. since: start of the run, in seconds since 1970. Printed after all other output.
    """
    lines: dict[str, str] = {}
    for log in logs:
        for failure in failures(Path(log).read_text(errors="replace")):
            name = at(failure.output).name
            written = [str(file).removeprefix(f"{Path.cwd()}/") for file in failure.logs if is_written(file, since)]
            # Snakemake's log contains the logs of jobs, which may name the same job again.
            lines.setdefault(name, "\n      ".join([f"  {name}: {cause(failure, since)}", *written]))
    if not lines:
        return ""
    return "\n".join([f"{len(lines)} failed or were stopped; their descendants were not made:", *lines.values()])


def is_written(log: Path, since: float) -> bool:
    """Whether a log has text and was changed since then; Snakemake itself creates an empty one."""
    return log.is_file() and log.stat().st_size > 0 and log.stat().st_mtime >= since


def cause(failure: Failure, since: float) -> str:
    """The reason why a job failed, by its stage's log, else by Snakemake's message."""
    log = at(failure.output).log
    if is_written(log, since) and (text := text_of_last_attempt(log).strip()):
        stops = re.findall(rf"\] (.*{STOPPED})", text)
        lines = errors(text) or stops or exception(text) or last_line(text)
        return "\n      ".join(dict.fromkeys(lines))  # several processes print the same
    if failure.refusal:
        return f"SLURM refused the job ({failure.refusal}): see `posttrain doctor`"
    return f"its stage printed nothing. {failure.message}".strip()
