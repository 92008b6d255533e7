"""Run a stage in a process of its own, and do what is to be done when it does not end well.

posttrain attempt --gpus 1 sft --config ... --output results/NAME/sft/manifest.json

In a SLURM job: near its time limit, or out of memory, the job asks SLURM to run it again, which Snakemake does not
notice. Preempted jobs and those of a dead node SLURM itself runs again. What a person cancels stays cancelled.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from posttrain.config.stages import TRAINERS
from posttrain.ground.errors import INTERRUPTED, TOO_LARGE, UserError
from posttrain.ground.files import read_json, write_json
from posttrain.ground.progress import say
from posttrain.jobs import cards, launch, slurm

SMALLER = "out of GPU memory: goes on with micro-batches of"
FRUITLESS = 3  # attempts that end at a time limit without a step


class Stop:
    """Whether this process was told to stop, and whether its job is to be run again for that; SIGTERM reaches the
    stage, which saves and ends."""

    def __init__(self):
        self.told = self.again = False
        signal.signal(signal.SIGTERM, self.hear)
        signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the stage too, which ends of it

    def hear(self, *_) -> None:
        self.told = True


def attempt(arguments: list[str], gpus: int) -> int:
    """Run a stage by its arguments until it ends; returns the exit code for Snakemake."""
    stop, job = Stop(), slurm.job_id()
    record = home(arguments) / "checkpoints" / "attempt"
    at_scratch(home(arguments) / "checkpoints")
    before = begin(record, arguments)
    if job:  # which SLURM is asked about, should it be killed with all its processes (`resources.ran_out`)
        before |= {"job": job, "mem_mb": slurm.memory_mb(job)}
        write_json(record / "attempt.json", before)
    environment = dict(os.environ)
    if not job and gpus:
        own, _held = cards.take(gpus)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    while True:
        code = run(arguments + shape(arguments[0], before) + limit(job), environment, stop, job, before, record)
        if code != TOO_LARGE or arguments[0] not in TRAINERS:
            break
        world = launch.processes(environment) * asked(arguments[0]).get("nodes", 1)
        before["micro_batch_size"] = smaller(arguments, before, world)
        write_json(record / "attempt.json", before)
    if code == 0:
        shutil.rmtree(record, ignore_errors=True)
        return 0
    if job:
        slurm.wait("the job asks to be run again, if it is to be, when it does", longest=5)
    if job and not stop.told and out_of_memory(code, job):
        more_memory(job, before, record)
    elif code < 0 and not stop.told:
        ended = signal.Signals(-code).name
        say(f"error: {ended} ended the stage, which had held {held():.0f} MB at most; the next call continues it")
    elif job and not stop.again and (slurm.preempted(job) if stop.told else code == INTERRUPTED):
        slurm.again(job)  # preempted before it could say that it stopped for that, too
    return code if code > 0 else 128 - code


def home(arguments: list[str]) -> Path:
    """The folder of the artifact."""
    return Path(arguments[arguments.index("--output") + 1]).parent


def site() -> dict:
    """What this run was told of the site (`cluster.Site`); nothing outside of its jobs."""
    return json.loads(os.environ.get("POSTTRAIN_SITE", "{}"))


def asked(stage: str) -> dict:
    """What the site asks for a stage (`cluster.Request`)."""
    return site().get("stages", {}).get(stage, {})


def scratch(text: str | None) -> Path | None:
    """The site's folder for checkpoints, with ~ and variables filled in. Raises UserError where it is none then."""
    if text is None:
        return None
    folder = os.path.expandvars(os.path.expanduser(text))
    if "$" in folder or not os.path.isabs(folder):
        raise UserError(f"{text!r} is {folder!r}: give a folder from / on, with variables that are set")
    return Path(folder)


def python(container: str | None, folder: str | None) -> list[str]:
    """How Python is started on a compute node: in the site's container where it has one, which sees its scratch."""
    if container is None:
        return [sys.executable]
    return ["apptainer", "exec", "--nv", *(["--bind", str(scratch(folder))] if folder else []), container, "python"]


def at_scratch(checkpoints: Path) -> None:
    """Let checkpoints lie in the site's scratch, where it has one and there are none yet: not in an earlier scratch
    either, nor in that of the folder where this one was before."""
    folder = scratch(site().get("scratch"))
    if folder and not checkpoints.exists():
        project = hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:8]
        there = Path(folder, f"posttrain-{project}", *checkpoints.parts[1:-1])
        there.mkdir(parents=True, exist_ok=True)
        checkpoints.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.unlink(missing_ok=True)
        checkpoints.symlink_to(there)


def what(arguments: list[str]) -> str:
    """Digest of all that a stage is made from, by its arguments: settings, code and inputs, not how it is run."""
    said = arguments[arguments.index("--config") :]
    said = said[: said.index("--output")] if "--output" in said else said
    return hashlib.sha256("\0".join(said).encode()).hexdigest()


def begin(record: Path, arguments: list[str]) -> dict:
    """What is known of earlier attempts at just this, with this one counted. Raises UserError where the time limit is
    too short."""
    file, digest = record / "attempt.json", what(arguments)
    known = read_json(file) if file.is_file() else {}
    if known.get("what") != digest:  # other settings, inputs or code
        known = {}
        (record / "failed.json").unlink(missing_ok=True)
    saved = newest(record.parent)
    fruitless = known.get("fruitless", 0) + 1 if known.get("limited") and known.get("saved") == saved else 0
    if fruitless >= FRUITLESS:
        shutil.rmtree(record)
        raise UserError(
            f"{record.parent.parent}: {fruitless} jobs ended at their time limit without a step that was saved; raise "
            f"stages.{arguments[0]}.runtime in slurm/site.yaml"
            + (", or lower checkpoint_minutes" if arguments[0] in TRAINERS else "")
        )
    now = known | {"what": digest, "saved": saved, "fruitless": fruitless, "limited": False}
    record.mkdir(parents=True, exist_ok=True)
    write_json(file, now)
    return now


def newest(checkpoints: Path) -> str:
    """The whole checkpoint that was written last; "" where there is none."""
    whole = checkpoints.glob("*/checkpoint-*/manifest.json")
    return str(max(whole, key=lambda file: file.stat().st_mtime, default=""))


def run(arguments: list[str], environment: dict, stop: Stop, job: str | None, before: dict, record: Path) -> int:
    """Start the stage and wait for it; returns its exit code. A signal to stop is handed on once."""
    outcome = record / "outcome.json"  # torchrun has one exit code for all that goes wrong
    outcome.unlink(missing_ok=True)
    nodes, inside = asked(arguments[0]).get("nodes", 1), python(site().get("container"), site().get("scratch"))
    command = launch.command(arguments, launch.processes(environment), nodes, inside)
    several = "torch.distributed.run" in command
    environment = launch.outside(environment) if nodes > 1 else environment
    # SLURM itself signals each of a job's steps. An srun that hears of it from here too forces its step to end, and a
    # torchrun that hears a third time, after `cluster.pass_on_sigterm`, ends before its processes have saved.
    group = {"start_new_session": True} if nodes > 1 else {}
    child = subprocess.Popen(command, env=environment | {"POSTTRAIN_OUTCOME": str(outcome)}, **group)
    while child.poll() is None and not stop.told:
        time.sleep(0.1)
    if stop.told and not (job and several):
        child.send_signal(signal.SIGTERM)
    if stop.told and job and slurm.shown(job, "Reason") == "TimeLimit":
        before["limited"] = True
        write_json(record / "attempt.json", before)
        longer(job, before, record)
    while child.poll() is None:
        time.sleep(0.1 if not job or stop.again else 1.0)
        if job and not stop.again and slurm.ended_by_preemption(job):  # it may be killed before its stage has saved
            stop.again = True
            slurm.again(job)
    if not child.returncode or not outcome.is_file():
        return child.returncode
    try:
        ended = read_json(outcome)
    except UserError:  # nothing could be written: the disk is full
        return child.returncode
    if several:
        say(f"what ended it: {ended['message']}")  # once more, below all that torchrun says
    return ended["code"]


def shape(stage: str, before: dict) -> list[str]:
    """How the stage goes through its batch: smaller micro-batches after an attempt without enough GPU memory, weights
    shared out where the site says so."""
    size = before.get("micro_batch_size")
    return (["--micro-batch-size", str(size)] if size else []) + (["--shard"] if asked(stage).get("shard") else [])


def smaller(arguments: list[str], before: dict, world: int) -> int:
    """Half of the micro-batch that was too large for one of `world` processes. Raises UserError where it was 1."""
    section = json.loads(arguments[arguments.index("--config") + 1])
    section = section.get("scratch") or section
    size = before.get("micro_batch_size") or section.get("micro_batch_size") or section.get("batch_size", 1)
    size = min(size, max(1, section.get("batch_size", 1) // world))
    if size == 1:
        raise UserError(
            f"{home(arguments)}: out of GPU memory with one sequence at a time; `posttrain plan` says what fits"
        )
    say(f"{SMALLER} {size // 2} at the same global batch: another shape")
    return size // 2


def limit(job: str | None) -> list[str]:
    """The minutes that the job has left, for the stage."""
    left = (slurm.ask("squeue", "-h", "-j", job, "-o", "%L") or "").strip() if job else ""
    minutes = slurm.minutes_of(left)
    return ["--minutes", f"{minutes:.2f}"] if minutes else []


def longer(job: str, before: dict, record: Path) -> None:
    """Ended by its time limit: run again; where no step was saved, with twice the time, if the partition has it."""
    minutes = slurm.minutes_of(slurm.shown(job, "TimeLimit"))
    twice = max(1, round(2 * minutes))
    if not minutes or newest(record.parent) != before["saved"] or slurm.refusal(job, time=str(twice)):
        say(f"the time limit of {minutes:g} min is here: run again")
        slurm.again(job)
    else:
        say(f"the time limit of {minutes:g} min is here and no step was saved: run again with twice the time")
        slurm.again(job, TimeLimit=str(twice))


def out_of_memory(code: int, job: str) -> bool:
    """Whether the stage ended for want of memory: the kernel killed one of its processes, whatever the others said of
    that, or it was killed and had held nearly all that the job has."""
    if slurm.kills() > 0:
        return code != INTERRUPTED
    return code in (-signal.SIGKILL, 128 + signal.SIGKILL) and held() > 0.85 * (slurm.memory_mb(job) or 1e9)


def held() -> float:
    """MB that the largest of this process's children had at most."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def more_memory(job: str, before: dict, record: Path) -> None:
    """Run again with twice the memory, where SLURM would; later runs ask for it at once, else for as much as before."""
    memory, file = slurm.memory_mb(job) or before["mem_mb"], record / "failed.json"
    now = {"reason": "out of memory", "mem_mb": memory, "job": job}
    if file.is_file() and read_json(file) == now:
        refused = "SLURM did not give this job the twice that it was to get"
    else:
        refused = slurm.refusal(job, mem=str(2 * memory))
    if refused:
        file.unlink(missing_ok=True)
        write_json(record / "attempt.json", {key: value for key, value in before.items() if key != "job"})
        return say(f"error: out of memory with {memory} MB, and no more is to be had ({refused}): lower batch sizes")
    write_json(file, now)
    say(f"out of memory with {memory} MB: it is run again with {2 * memory} MB")
    slurm.again(job, MinMemoryNode=str(2 * memory))
