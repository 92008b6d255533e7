"""Run a stage as a subprocess; handle time limit, preemption and out of memory.

posttrain attempt --gpus 1 sft --config ... --output results/NAME/sft/manifest.json

A SLURM job that reaches its time limit or runs out of memory requests its own requeueing, which Snakemake does not
notice. SLURM itself requeues preempted jobs and jobs of a failed node. A job cancelled by a person stays cancelled.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from posttrain.config.sections import LARGEST_BATCH
from posttrain.config.stages import ON_CPU, STAGES, TRAINERS
from posttrain.dag.artifacts import at
from posttrain.ground import progress
from posttrain.ground.errors import INTERRUPTED, TOO_LARGE, UserError
from posttrain.ground.files import read_json, read_object, write_json
from posttrain.ground.progress import say
from posttrain.jobs import cards, compute, failure, launch, slurm

SMALLER = "out of GPU memory: goes on with micro-batches of"
FRUITLESS = 3  # consecutive attempts that ended at a time limit without a saved step, after which the stage fails


class Stop:
    """Whether this process received SIGTERM, and whether its job was requeued for that."""

    def __init__(self):
        self.requested = self.requeued = False
        signal.signal(signal.SIGTERM, self.request)
        signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the stage too, which then ends

    def request(self, *_) -> None:
        self.requested = True


def attempt(arguments: list[str], gpus: int, batch_size: int = 0) -> int:
    """Run a stage until it ends; returns the exit code for Snakemake.

    arguments: the stage and its flags. gpus: number of GPUs to reserve on this machine; in a SLURM job, SLURM decides.
    batch_size: most rows in memory at once, for a batch size `auto`; 0: as the settings say.
    """
    stop, trial = Stop(), Attempt(arguments, batch_size)
    progress.name = at(home(arguments)).name
    environment = dict(os.environ)
    if not trial.job and gpus:
        taken, _held = cards.take(gpus)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    if trial.stage in ON_CPU:  # no GPU is reserved for it
        environment["CUDA_VISIBLE_DEVICES"] = ""
    code = trial.run(environment, stop)
    while code == TOO_LARGE and (trial.stage in TRAINERS or STAGES[trial.stage].any_batch):
        trial.halve_micro_batch(launch.processes(environment) * trial.nodes)
        code = trial.run(environment, stop)
    if code == 0:
        shutil.rmtree(trial.folder, ignore_errors=True)
        return 0
    if trial.job:
        slurm.wait_until_reachable("waiting, to requeue the job if needed", longest=5)
    if trial.job and not stop.requested and is_out_of_memory(code, trial.job):
        trial.requeue_with_more_memory(trial.job)
    elif code < 0 and not stop.requested:
        name = signal.Signals(-code).name
        say(f"error: {name} ended the stage (peak memory {compute.peak_mb():.0f} MB); the next call continues it")
    elif trial.job and not stop.requeued and (slurm.is_preempted(trial.job) if stop.requested else code == INTERRUPTED):
        slurm.requeue(trial.job)  # also for a stage that was preempted before it could report it
    return code if code > 0 else 128 - code


class Attempt:
    """An attempt at a stage, with a record of all attempts with the same settings, inputs and code."""

    def __init__(self, arguments: list[str], batch_size: int = 0):
        """batch_size: most rows at once. Raises UserError where too many attempts ended at their time limit without a
        saved step."""
        checkpoints = home(arguments) / "checkpoints"
        self.arguments, self.stage, self.batch_size = arguments, arguments[0], batch_size
        self.job = slurm.job_id()
        self.nodes = launch.request(self.stage).get("nodes", 1)
        link_to_scratch(checkpoints)
        self.folder = checkpoints / "attempt"
        self.record = register(self.folder, arguments)
        if self.job:  # for `resources.estimates`, which asks SLURM about a job that was killed with all its processes
            self.note(job=self.job, mem_mb=slurm.memory_mb(self.job))

    def note(self, **values) -> None:
        """Add to the record."""
        self.record |= values
        write_json(self.folder / "attempt.json", self.record)

    def run(self, environment: dict[str, str], stop: Stop) -> int:
        """Start the stage, wait for it and account for it; returns its exit code. SIGTERM is passed on once."""
        outcome, notes = self.folder / "outcome.json", self.folder / "notes.json"
        for file in (outcome, notes):
            file.unlink(missing_ok=True)
        python = launch.python(launch.site().get("container"), launch.site().get("scratch"))
        command = launch.command(self.stage, launch.processes(environment), self.nodes, python)
        several = "torch.distributed.run" in command
        self.account = self.opened(environment, several)
        environment = launch.outside_step(environment) if self.nodes > 1 else environment
        # SLURM itself signals each step of a job. A second signal makes srun kill its step, and a third one, after that
        # of `slurm.pass_on_sigterm`, makes torchrun end before its processes have saved.
        environment = environment | {"POSTTRAIN_OUTCOME": str(outcome), compute.NOTES: str(notes)}
        child = subprocess.Popen([*command, *self.options()], env=environment, start_new_session=self.nodes > 1)
        while child.poll() is None and not stop.requested:
            time.sleep(0.1)
            self.account.beat(child.pid, notes)
        if stop.requested:
            if not (self.job and several):
                child.send_signal(signal.SIGTERM)
            self.wait_for_stopped(child, stop, notes)
        code, message = self.ended(child.returncode, outcome)
        self.account.end_of_child(*self.ending(code, message, stop.requested, notes), notes)
        if several and message:
            say(f"what ended it: {message}")  # again, below torchrun's output
        return code

    def opened(self, environment: dict[str, str], several: bool) -> compute.Account:
        """The account of a start of the stage. several: whether it runs in more than one process."""
        given = cards.given(environment)
        given["gpus"] *= self.nodes
        processes = launch.processes(environment) * self.nodes if several else 1
        return compute.Account(self.folder.parents[1] / "manifest.json", self.stage, processes=processes, **given)

    def ended(self, code: int, outcome: Path) -> tuple[int, str]:
        """Exit code and last message of a stage; torchrun has one exit code for all failures, so the stage itself
        writes both to the file `outcome`."""
        try:
            ended = read_json(outcome) if code else {}
            return ended.get("code", code), ended.get("message", "")
        except UserError:  # it could not be written: the disk is full
            return code, ""

    def ending(self, code: int, message: str, stopped: bool, notes: Path) -> tuple[str, str]:
        """Outcome and reason for the account of an attempt (`compute.ending`)."""
        noted = read_object(notes)
        if code == 0:
            return ("reused" if noted.get("reused") else "done"), ""
        record = read_object(self.folder.parent / str(noted.get("identity")) / failure.NAME)
        reason = message or record.get("reason", "") or ("time limit" if self.record["limited"] else "")
        return compute.ending(code, stopped, reason, bool(self.job) and slurm.oom_kills() > 0)

    def wait_for_stopped(self, child: subprocess.Popen, stop: Stop, notes: Path) -> None:
        """Wait for a stage that received SIGTERM, and requeue its job meanwhile where that is urgent."""
        if self.job and slurm.field(self.job, "Reason") == "TimeLimit":
            self.note(limited=True)
            self.requeue_at_time_limit(self.job)
        while child.poll() is None:
            time.sleep(0.1 if not self.job or stop.requeued else 1.0)
            self.account.beat(child.pid, notes)
            if self.job and not stop.requeued and slurm.is_ended_by_preemption(self.job):
                stop.requeued = True  # at once: the stage may be killed before it has saved
                slurm.requeue(self.job)

    def options(self) -> list[str]:
        """The stage's arguments, with those that do not change its result: micro-batch size, sharding, minutes left."""
        size = self.record.get("micro_batch_size") or self.batch_size
        sharded = launch.request(self.stage).get("shard")
        smaller = ["--micro-batch-size", str(size)] if size else []
        left = slurm.ask("squeue", "-h", "-j", self.job, "-o", "%L") if self.job else None
        minutes = slurm.minutes((left or "").strip())
        limit = ["--minutes", f"{minutes:.2f}"] if minutes else []
        return [*self.arguments, *smaller, *(["--shard"] if sharded else []), *limit]

    def halve_micro_batch(self, processes: int) -> None:
        """Continue with half of the micro-batch that was too large for one process. Raises UserError where it was 1."""
        from posttrain.config.settings import settings_of_argument

        section = dict(settings_of_argument(self.arguments[self.arguments.index("--config") + 1]))
        section = section.get("scratch") or section
        batch = section.get("batch_size", 1)
        batch = (self.batch_size or LARGEST_BATCH) if batch == "auto" else batch
        size = self.record.get("micro_batch_size") or section.get("micro_batch_size") or batch
        size = min(size, max(1, batch // processes))
        if size == 1:
            short = "out of GPU memory with one sequence at a time"
            raise UserError(f"{home(self.arguments)}: {short}; see `posttrain plan` for what fits")
        say(f"{SMALLER} {size // 2} at the same global batch")
        self.note(micro_batch_size=size // 2)

    def requeue_at_time_limit(self, job: str) -> None:
        """Requeue the job; where no step was saved, with twice the time if the partition allows it."""
        minutes = slurm.minutes(slurm.field(job, "TimeLimit"))
        twice = str(max(1, round(2 * minutes)))
        has_saved = newest_checkpoint(self.folder.parent) != self.record["saved"]
        if not minutes or has_saved or slurm.refusal(job, time=twice):
            say(f"reached the time limit of {minutes:g} min: run again")
            slurm.requeue(job)
        else:
            say(f"reached the time limit of {minutes:g} min and no step was saved: run again with twice the time")
            slurm.requeue(job, TimeLimit=twice)

    def requeue_with_more_memory(self, job: str) -> None:
        """Requeue the job with twice the memory, where SLURM allows it; later runs request as much from the start."""
        memory, file = slurm.memory_mb(job) or self.record["mem_mb"], self.folder / "failed.json"
        failure = {"reason": "out of memory", "mem_mb": memory, "job": job}
        if file.is_file() and read_json(file) == failure:
            refusal = "SLURM did not double the memory of this job"
        else:
            refusal = slurm.refusal(job, mem=str(2 * memory))
        if refusal:
            file.unlink(missing_ok=True)
            self.record.pop("job")
            self.note()
            say(f"error: out of memory with {memory} MB, and more is not available ({refusal}): lower batch sizes")
        else:
            write_json(file, failure)
            say(f"out of memory with {memory} MB: it is run again with {2 * memory} MB")
            slurm.requeue(job, MinMemoryNode=str(2 * memory))


def home(arguments: list[str]) -> Path:
    """The folder of the artifact. Raises UserError where the stage's arguments lack what an attempt needs."""
    if not {"--config", "--output"} <= {*arguments[:-1]}:
        raise UserError("attempt: give a stage with --config SECTION and --output MANIFEST")
    return Path(arguments[arguments.index("--output") + 1]).parent


def link_to_scratch(checkpoints: Path) -> None:
    """Link the folder of checkpoints to the site's scratch, where the site has one and there are no checkpoints yet,
    here or in an earlier scratch."""
    folder = launch.scratch(launch.site().get("scratch"))
    if folder and not checkpoints.exists():
        project = hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:8]
        target = Path(folder, f"posttrain-{project}", *checkpoints.parts[1:-1])
        target.mkdir(parents=True, exist_ok=True)
        checkpoints.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.unlink(missing_ok=True)
        checkpoints.symlink_to(target)


def digest(arguments: list[str]) -> str:
    """Digest of a stage's settings, code and inputs, by its arguments."""
    made_from = arguments[arguments.index("--config") :]
    made_from = made_from[: made_from.index("--output")] if "--output" in made_from else made_from
    return hashlib.sha256("\0".join(made_from).encode()).hexdigest()


def register(folder: Path, arguments: list[str]) -> dict:
    """Add this attempt to the record of attempts with the same settings, inputs and code; returns the record.

    Raises UserError where too many of them ended at their time limit without a saved step.
    """
    file, what = folder / "attempt.json", digest(arguments)
    before = read_json(file) if file.is_file() else {}
    if before.get("what") != what:  # other settings, inputs or code
        before = {}
        (folder / "failed.json").unlink(missing_ok=True)
    saved = newest_checkpoint(folder.parent)
    fruitless = before.get("fruitless", 0) + 1 if before.get("limited") and before.get("saved") == saved else 0
    if fruitless >= FRUITLESS:
        shutil.rmtree(folder)
        raise UserError(
            f"{folder.parent.parent}: {fruitless} jobs ended at their time limit without a saved step; raise "
            f"stages.{arguments[0]}.runtime in slurm/site.yaml"
            + (", or lower checkpoint_minutes" if arguments[0] in TRAINERS else "")
        )
    record = before | {"what": what, "saved": saved, "fruitless": fruitless, "limited": False}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, record)
    return record


def newest_checkpoint(checkpoints: Path) -> str:
    """The last complete checkpoint; "" where there is none."""
    whole = checkpoints.glob("*/checkpoint-*/manifest.json")
    return str(max(whole, key=lambda file: file.stat().st_mtime, default=""))


def is_out_of_memory(code: int, job: str) -> bool:
    """Whether a stage ended out of memory: the kernel's OOM killer ended one of its processes, or the stage was killed
    and had used nearly all memory of its job."""
    if slurm.oom_kills() > 0:
        return code != INTERRUPTED
    return code in (-signal.SIGKILL, 128 + signal.SIGKILL) and compute.peak_mb() > 0.85 * (slurm.memory_mb(job) or 1e9)
