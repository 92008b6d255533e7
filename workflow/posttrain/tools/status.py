"""Which stages of a campaign are done, stale, running, failed or waiting, and what those that failed came to.

posttrain status [CAMPAIGN]
"""

import re
import shutil
import time
from pathlib import Path

from posttrain.cluster import controller
from posttrain.dag.plan import Plan
from posttrain.ground.errors import UserError
from posttrain.ground.files import lock, read_json
from posttrain.jobs import attempt
from posttrain.tools import why

ALIVE = 120  # seconds without a word after which a stage no longer counts as running
STOPPED = "the next run continues"  # what a stage says last that was told to stop, or has no time left


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
    log = log_of(folder)
    beats = sorted(folder.glob("checkpoints/*/progress.json"), key=lambda file: file.stat().st_mtime)
    newest = max((file.stat().st_mtime for file in [*beats, log] if file.is_file()), default=0)
    if not newest:
        return "waiting"
    said = last_said(log)
    if "error:" in said:  # and not only in what earlier settings have left
        known = [read_json(file).get("reason", "") for file in folder.glob("checkpoints/*/failed.json")]
        reasons = [reason.splitlines()[0] for reason in known if reason]
        return next((f"failed: {reason}" for reason in reasons if reason in said), f"failed (see {log})")
    silent = time.time() - newest > ALIVE
    if not state and (silent or STOPPED in said or (said and is_left(folder))):
        return f"stopped; {STOPPED}"
    if silent:
        return "running"
    try:
        beat = read_json(beats[-1])
        left = f"{beat['left'] // 60}:{beat['left'] % 60:02d} left"
        return f"running, step {beat['step']}/{beat['steps']}, {beat['loss']}, {left}"
    except (IndexError, KeyError, TypeError, UserError):
        return "running"


def log_of(folder: Path) -> Path:
    """Where a stage says how it goes."""
    return Path("results/logs", *folder.parts[1:]).with_suffix(".log")


def last_said(log: Path) -> str:
    """What a stage has said since its last attempt began; nothing where it has not begun."""
    return log.read_text(errors="replace").rpartition(attempt.SMALLER)[2] if log.is_file() else ""


def is_left(folder: Path) -> bool:
    """Whether the processes that made an artifact have died: their lock file lies there, and nobody holds it."""
    files = [*folder.glob(".lock-*")]
    for file in files:
        try:
            with open(file, "r+") as held:
                if lock(held.fileno()) is not True:
                    return False
        except OSError:  # just deleted, or another user's
            return False
    return bool(files)


def ended(logs: list[str], since: float) -> str:
    """What each job came to that failed in a run of Snakemake, and where it says more, below all that was printed
    since; "" where none did.

    logs: Snakemake's. since: when it began to work, in seconds since 1970.
    """
    lines = {}
    for file in logs:
        said = Path(file).read_text(errors="replace")
        for block in re.split(r"^Error in rule ", said, flags=re.M)[1:]:  # as Snakemake 9.27.1 says it
            message, _, rest = block.partition("\n    jobid: ")
            manifest = re.search(r"^    output: ([^,\n]+)", rest, re.M)
            named = re.search(r"^    log: (.*) \(check log", rest, re.M)
            if manifest and named:
                folder = Path(manifest[1]).parent
                name = "/".join(folder.parts[1:])
                written = [log for log in named[1].split(", ") if wrote(Path(log), since)]
                more = "".join(f"\n      {log.removeprefix(f'{Path.cwd()}/')}" for log in written)
                # A job's own log, printed among Snakemake's, may say it again.
                lines.setdefault(name, f"  {name}: {cause(folder, message.partition(': ')[2], since)}{more}")
    if not lines:
        return ""
    return "\n".join([f"{len(lines)} failed or were stopped; what follows from them was not made:", *lines.values()])


def wrote(log: Path, since: float) -> bool:
    """Whether something was written to a log since then: Snakemake itself makes an empty one."""
    return log.is_file() and log.stat().st_size > 0 and log.stat().st_mtime >= since


def cause(folder: Path, message: str, since: float) -> str:
    """Why a job failed: what its stage said, else what Snakemake says of the job."""
    log = log_of(folder)
    if wrote(log, since) and (said := last_said(log).strip()):
        words = re.findall(r"^(?:\[[^\]]*\] )?(?:what ended it|error): (?:error: )?(.*)", said, re.M)
        stopped = re.findall(rf"\] (.*{STOPPED})", said)
        told = dict.fromkeys(words or stopped or said.splitlines()[-1:])  # several processes say the same
        return "\n      ".join(told)
    if refused := re.search(r"sbatch failed\. The error message was '(.*?)'?\.?$", message, re.M):
        return f"SLURM refused the job ({refused[1]}): `posttrain doctor` says what it would take"
    known = message.partition(" Detailed failure")[0].strip().removeprefix("None")
    return f"its stage said nothing. {known}".strip()
