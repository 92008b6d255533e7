"""What to ask a scheduler for: the predicted memory, time and disk of a stage, corrected by what past runs really used.

posttrain plan [CAMPAIGN]
"""

import json
import math
import os
import shlex
import statistics
from functools import cache
from pathlib import Path
from typing import NamedTuple

from posttrain.config.experiment import Experiment
from posttrain.config.stages import JUDGES, STAGES, TRAINERS
from posttrain.dag.plan import Plan
from posttrain.ground.identity import record_of
from posttrain.jobs import attempt, cards, slurm
from posttrain.resources import architecture, memory, moments
from posttrain.resources.architecture import Architecture
from posttrain.resources.memory import MB
from posttrain.resources.steps import learned

# Minutes and MB that are asked for where nothing is known: of a model that was not fetched yet, or of another stage.
UNKNOWN = {"mem_mb": 8000, "runtime": 720, "disk_mb": 20000, "gpu": 1}
PREPARE = {"mem_mb": 4000, "runtime": 120, "disk_mb": 2000, "gpu": 0}
JUDGED = 240  # minutes
MARGIN = 1.25  # of memory; twice of time
BOUNDS = 0.5, 4.0  # of the correction by past use
TEXTS = 20  # MB of metrics, tokenizer and settings


class Need(NamedTuple):
    """What one stage needs, by the formulas."""

    settings: Experiment
    shape: Architecture
    moment: str
    terms: memory.Terms  # bytes on the device at that moment
    host: float  # bytes of the process, on the device that is expected
    disk: float  # bytes
    trained: int  # parameters


def request(plan: Plan, experiment: str, stage: str, policy: str = "", processes: int = 1) -> dict[str, int]:
    """`mem_mb`, `runtime` (minutes), `disk_mb` and `gpu` to ask for. processes: on a node, of which each holds as much.

    Reads the data card, headers and past records, each once, and no weight.
    """
    asked = dict(PREPARE if stage == "prepare" else UNKNOWN | ({"runtime": JUDGED} if stage in JUDGES else {}))
    need = predicted(plan, experiment, stage, policy)
    if need:
        asked["mem_mb"] = round(need.host / MB * ratio(plan, experiment, stage, policy) * MARGIN)
        asked["disk_mb"] = round(need.disk / MB)
    if known := seconds(plan, experiment, stage, policy, need):
        asked["runtime"] = 10 + round(2 * known / 60)
        if stage in TRAINERS:  # a longer one goes on in further jobs, which a partition lets in sooner
            asked["runtime"] = min(asked["runtime"], UNKNOWN["runtime"])
    asked["mem_mb"] = max(processes * asked["mem_mb"], 2 * exhausted_mb(plan, experiment, stage, policy))
    return asked


def predicted(
    plan: Plan, experiment: str, stage: str, policy: str = "", settings: Experiment | None = None, gpu: bool = False
) -> Need | None:
    """What a stage needs by the formulas; None for one without a model, or of a model that is not fetched yet.

    settings: others than the experiment's. gpu: on a GPU, whatever past runs had.
    """
    shape = None if stage in ("prepare", "report", "fetch") else architecture.of_experiment(plan, experiment)
    if shape is None:
        return None
    settings, gpu = settings or plan.experiments[experiment], gpu or on_gpu()
    rows = {kind: found["max"] for kind, found in architecture.prepared(plan, experiment).get("tokens", {}).items()}
    moment, terms = moments.peak(moments.moments(settings, shape, stage, policy, rows, gpu))
    trained = learned(settings, shape, stage).numbers
    host = moments.host(shape, stage, terms, trained, gpu)
    return Need(settings, shape, moment, terms, host, disk(settings, shape, stage, trained), trained)


def disk(settings: Experiment, shape: Architecture, stage: str, trained: int) -> float:
    """Bytes of an artifact and, while it is made, of two checkpoints: weights that are trained, and two moments."""
    whole = 4 * shape.parameters
    kept = {"base": whole, "longctx": 2 * whole}.get(stage, 4 * trained)
    snapshots = settings.ppo.steps // settings.ppo.snapshot_steps * 4 * trained if stage == "ppo" else 0
    return TEXTS * MB + kept + snapshots + 2 * 12 * trained


def on_gpu() -> bool:
    """Whether stages run on a GPU: as POSTTRAIN_DEVICE says (`gpu` or `cpu`: a cluster's head has no GPU of its own),
    else as the newest record of a stage does, else as this machine has one."""
    told = os.environ.get("POSTTRAIN_DEVICE")
    return told == "gpu" if told else _on_gpu(os.getcwd())


@cache
def _on_gpu(here: str) -> bool:
    found = [record for _, record in records(here) if record.get("shape", {}).get("device")]
    newest = max(found, key=lambda record: record.get("started", ""), default=None)
    return newest["shape"]["device"] != "cpu" if newest else bool(cards.present())


@cache
def records(here: str) -> list[tuple[str, dict]]:
    """(folder, record) of every artifact under results/ of a directory, read once in a process."""
    files = [*Path(here, "results").glob("*/*/provenance.json"), *Path(here, "results").glob("*/*/*/provenance.json")]
    found = [(str(file.parent.relative_to(here)), record_of(file.parent)) for file in sorted(files)]
    return [(folder, record) for folder, record in found if record and record["stage"] != "report"]


def past(plan: Plan, experiment: str, stage: str, policy: str) -> list[tuple[dict, Need]]:
    """(record, what was predicted of it) of past runs of the same kind: stage, method and device."""
    return _past(os.getcwd(), plan, stage, method(plan.experiments[experiment], stage, policy))


@cache
def _past(here: str, plan: Plan, stage: str, kind: str) -> list[tuple[dict, Need]]:
    found = []
    for folder, record in records(here):
        _, name, made, policy = [*folder.split("/"), ""][:4]
        same_device = (record.get("shape", {}).get("device", "cpu") != "cpu") == on_gpu()
        if made != stage or name not in plan.experiments or not same_device:
            continue
        settings = as_it_was(plan.experiments[name], stage, record)
        if method(settings, stage, policy) == kind and (need := predicted(plan, name, stage, policy, settings)):
            found.append((record, need))
    return found


def as_it_was(settings: Experiment, stage: str, record: dict) -> Experiment:
    """An experiment with the section that a record was made from; as it is, where that is no section any more."""
    try:
        section = STAGES[stage].section.model_validate(json.loads(record["params"][0]))
    except ValueError:
        return settings
    return settings.model_copy(update={stage: section})


def method(settings: Experiment, stage: str, policy: str) -> str:
    """What tells runs of a stage apart in kind: how it is trained, or on what."""
    tuned = settings.sft.method if settings.sft else ""
    if stage == "longctx":
        return settings.longctx.tuning
    if stage == "base":
        return settings.base.scratch.positions if settings.base.scratch else "given"
    return f"{tuned if policy != 'base' else ''} {policy}"


def ratio(plan: Plan, experiment: str, stage: str, policy: str = "", gpu: bool = False) -> float:
    """Resident memory (gpu: the GPU's) over its prediction: the median of past runs of the same kind, held within
    bounds; 1 where there is none."""
    key, found = "peak_gpu_memory_mb" if gpu else "peak_memory_mb", []
    for record, need in past(plan, experiment, stage, policy):
        used, told = record.get(key), sum(need.terms.values()) if gpu else need.host
        found += [used * 2**20 / told] if isinstance(used, int | float) and used > 0 and told else []
    return min(max(statistics.median(found), BOUNDS[0]), BOUNDS[1]) if found else 1.0


def seconds(plan: Plan, experiment: str, stage: str, policy: str, need: Need | None) -> float | None:
    """Time by the past runs of the same kind whose work is nearest, in proportion to it; None where there is none.

    need: as predicted. Small runs spend their time on starting, and say little of large ones.
    """
    if stage == "prepare":
        found = [record.get("seconds") for _, record in records(os.getcwd()) if record["stage"] == "prepare"]
        return statistics.median(times) if (times := [time for time in found if time]) else None
    found = past(plan, experiment, stage, policy) if need else []
    timed = [(record["seconds"], work(was, stage)) for record, was in found if record.get("seconds")]
    if not timed:
        return None
    wanted = work(need, stage)
    near = min(abs(math.log(wanted / done)) for _, done in timed)
    return statistics.median(time * wanted / done for time, done in timed if abs(math.log(wanted / done)) == near)


def work(need: Need, stage: str) -> float:
    """What a run's time is in proportion to: parameters, times the tokens of all steps where it trains."""
    section = need.settings.base.scratch if stage == "base" else getattr(need.settings, stage)
    if not hasattr(section, "steps"):
        return float(need.shape.parameters)
    length = getattr(section, "context", None) or getattr(section, "max_length", None) or 1
    return float(need.shape.parameters) * section.steps * section.batch_size * length


def folder_of(plan: Plan, experiment: str, stage: str, policy: str) -> str:
    """Where an artifact lies."""
    return plan.folder(experiment, stage, policy)


def exhausted_mb(plan: Plan, experiment: str, stage: str, policy: str) -> int:
    """MB with which a run of just this, with these settings, inputs and code, was killed for want of memory; 0 where
    none was.

    By `failed.json`, or by what SLURM says of a job that was killed with all its processes, and could write none.
    """
    record = Path(folder_of(plan, experiment, stage, policy), "checkpoints", "attempt")
    began, failed = noted(record / "attempt.json"), noted(record / "failed.json")
    if not began or began.get("what") != attempt.digest(shlex.split(plan.arguments(experiment, stage, policy))):
        return 0
    out = [failed.get("mem_mb")] if failed.get("reason") == "out of memory" else []
    out += [began.get("mem_mb")] if began.get("job") and slurm.ran_out_of_memory(began["job"]) else []
    return max((round(had) for had in out if isinstance(had, int | float)), default=0)


def noted(file: Path) -> dict:
    """What an attempt left; nothing where it left none, or no whole one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
