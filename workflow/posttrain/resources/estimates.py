"""Resource requests for a scheduler: a stage's predicted memory, time and disk, corrected by the use of past runs.

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

from posttrain.config.sections import LARGEST_BATCH, Adapter, Base, Longctx, Passes, Sampled
from posttrain.config.stages import JUDGES, ON_CPU, STAGES, TRAINERS, Experiment
from posttrain.dag.artifacts import Artifact, at
from posttrain.dag.plan import Plan
from posttrain.ground.files import read_object
from posttrain.ground.identity import record_of
from posttrain.jobs import attempt, cards, slurm
from posttrain.resources import architecture, memory, moments
from posttrain.resources.architecture import Architecture
from posttrain.resources.memory import MB
from posttrain.resources.steps import learned, loop, stated, with_steps
from posttrain.resources.threads import bytes_of_files

# Requests where nothing is predicted, in minutes and MB: for a stage without a model, and for a model not yet fetched.
WITHOUT_MODEL = {"mem_mb": 4000, "runtime": 120, "disk_mb": 2000, "gpu": 0, "batch_size": 0}
UNKNOWN = {"mem_mb": 8000, "runtime": 720, "disk_mb": 20000, "gpu": 1, "batch_size": 0}
GROWTH = {"mem_mb": 1.5, "disk_mb": 6, "runtime": 0.1}  # of `prepare`, for each MB of data files
JUDGED = 240  # minutes for a judge without past runs
GB = 1e9
RESERVE = 0.6  # GB of a GPU for CUDA's context and the allocator's rounding
SHARE = 0.5  # of a machine's memory for one judgement on a CPU, as several may run at once
MARGIN = 1.25  # factor of memory; that of time is 2
BOUNDS = 0.5, 4.0  # smallest and largest correction by past use
TEXTS = 20  # MB of metrics, tokenizer and settings


class Need(NamedTuple):
    """The predicted needs of one stage."""

    settings: Experiment
    shape: Architecture
    moment: str
    terms: memory.Terms  # bytes on the device at that moment
    host: float  # bytes of host memory
    disk: float  # bytes
    trained: int  # parameters

    @property
    def device(self) -> float:
        """Bytes on the device at the peak."""
        return sum(self.terms.values())


def request(plan: Plan, artifact: Artifact, processes: int = 1) -> dict[str, int]:
    """The requested `mem_mb`, `runtime` (minutes), `disk_mb` and `gpu`, and the number for a batch size `auto`, else 0.

    processes: on a node, each with the same memory.

    Reads the data card, headers and past records, each once, and no weights.
    """
    stage = artifact.stage
    values = dict(WITHOUT_MODEL if stage in ON_CPU else UNKNOWN)
    values |= {"runtime": JUDGED} if stage in JUDGES else {}
    if stage == "prepare":  # measured: its memory grows by a byte, its files by three bytes for each byte of rows
        megabytes = bytes_of_files(plan, artifact) / 1e6
        values = {key: round(values[key] + GROWTH.get(key, 0) * megabytes) for key in values}
    need = predicted(plan, artifact)
    if need:
        values["batch_size"] = chosen_batch_size(plan, artifact, need)
        values["mem_mb"] = round(need.host / MB * ratio(plan, artifact) * MARGIN)
        values["disk_mb"] = round(need.disk / MB)
    if time := seconds(plan, artifact, need):
        values["runtime"] = 10 + round(2 * time / 60)
        if stage in TRAINERS:  # a longer run continues in further jobs; shorter jobs start sooner
            values["runtime"] = min(values["runtime"], UNKNOWN["runtime"])
    values["mem_mb"] = max(processes * values["mem_mb"], 2 * exhausted_mb(plan, artifact))
    return values


def predicted(
    plan: Plan,
    artifact: Artifact,
    settings: Experiment | None = None,
    gpu: bool = False,
    memory_gb: float | None = None,
) -> Need | None:
    """The predicted needs of a stage; None for a stage without a model, and for a model that is not fetched.

    settings: in place of the experiment's. gpu: predict for a GPU, whatever device past runs had. memory_gb: into which
    a batch size `auto` must fit (default: `device_memory_gb`); where none does, it is 1.
    """
    experiment, stage, policy = artifact
    shape = None if stage in ON_CPU else architecture.of_experiment(plan, experiment)
    if shape is None:
        return None
    counts = architecture.prepared(plan, experiment).get("tokens", {})
    longest = {kind: lengths["max"] for kind, lengths in counts.items()}
    settings, gpu = settings or plan.experiments[experiment], gpu or on_gpu()
    settings = with_steps(settings, stage, architecture.prepared(plan, experiment) or stated(settings))
    needs = [
        need_of(moments.Case(one, shape, stage, policy, longest, gpu), plan.campaign.spotchecks)
        for one in with_batch_sizes(settings, stage)
    ]
    if len(needs) == 1:
        return needs[0]
    used, available = ratio(plan, artifact, gpu), memory_gb or device_memory_gb(gpu)
    return next((need for need in needs if fits(need, used, gpu, available)), needs[-1])


def need_of(case: moments.Case, states: int) -> Need:
    """The predicted needs of a stage. states: of its training, kept for spot-checks."""
    moment, terms = moments.peak(moments.moments(case))
    trained = learned(case.settings, case.shape, case.stage).numbers
    host = moments.host(case, terms, trained)
    return Need(case.settings, case.shape, moment, terms, host, disk(case, trained, states), trained)


def with_batch_sizes(settings: Experiment, stage: str) -> list[Experiment]:
    """The settings with each number that a batch size `auto` may become, the largest first; as they are without one."""
    section = getattr(settings, stage)
    if getattr(section, "batch_size", None) != "auto":
        return [settings]
    sizes = [LARGEST_BATCH >> halvings for halvings in range(LARGEST_BATCH.bit_length())]
    return [settings.model_copy(update={stage: section.model_copy(update={"batch_size": size})}) for size in sizes]


def fits(need: Need, used: float, gpu: bool, available: float | None) -> bool:
    """Whether a stage fits into the available GB, or None for as much as it needs. used: as in `ratio`."""
    needed = size(need, used) if gpu else need.host / GB * used * MARGIN
    return available is None or needed <= available


def size(need: Need, used: float = 1.0) -> float:
    """GB of a GPU that a stage needs. used: use of past runs over their prediction."""
    return need.device / GB * used + RESERVE


def chosen_batch_size(plan: Plan, artifact: Artifact, need: Need) -> int:
    """The number that a stage's batch size `auto` became; 0 for a batch size that is a number."""
    before = getattr(plan.experiments[artifact.experiment], artifact.stage)
    chosen = getattr(need.settings, artifact.stage)
    return chosen.batch_size if getattr(before, "batch_size", None) == "auto" else 0


def disk(case: moments.Case, trained: int, states: int) -> float:
    """Bytes of an artifact, two checkpoints and the kept states, each with the trained weights and the optimiser's
    state."""
    weights, section = 4 * trained, case.section
    if isinstance(section, Base | Longctx):  # whole models; longctx also stores the rescaled one
        twice = isinstance(section, Longctx)
        weights = (2 * case.size if twice else case.stored) * case.shape.parameters
    if isinstance(section, Adapter) and section.method == "full":  # trained counts PPO's value function too
        weights = case.size * case.shape.parameters
    snapshots = section.steps // section.snapshot_steps * weights if isinstance(section, Sampled) else 0
    kept = 4 * trained + (case.optimiser + case.paged if trained else 0)
    return TEXTS * MB + weights + snapshots + (2 + states) * kept


def on_gpu() -> bool:
    """Whether stages run on a GPU: by POSTTRAIN_DEVICE (`gpu` or `cpu`; a cluster's login node may have no GPU), else
    by
    the newest record of a stage, else by whether this machine has one."""
    device = os.environ.get("POSTTRAIN_DEVICE")
    return device == "gpu" if device else _on_gpu(os.getcwd())


def expect_device(device: str, gpu_memory_gb: float | None) -> None:
    """Make estimates for another machine's device, `gpu` or `cpu`, in this process and those that it starts."""
    os.environ["POSTTRAIN_DEVICE"] = device
    os.environ["POSTTRAIN_GPU_MEMORY_GB"] = str(gpu_memory_gb or "")


def device_memory_gb(gpu: bool) -> float | None:
    """GB that a stage may fill: a GPU's memory, or this machine's SHARE; None where the machine is another one whose
    memory is not known."""
    if gpu and (named := os.environ.get("POSTTRAIN_GPU_MEMORY_GB")):
        return float(named)
    if os.environ.get("POSTTRAIN_DEVICE"):
        return None
    return cards.memory_gb() if gpu else SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB


@cache
def _on_gpu(here: str) -> bool:
    with_device = [record for _, record in records(here) if record.get("shape", {}).get("device")]
    newest = max(with_device, key=lambda record: record.get("started", ""), default=None)
    return newest["shape"]["device"] != "cpu" if newest else bool(cards.present())


@cache
def records(here: str) -> list[tuple[str, dict]]:
    """(folder, record) of every artifact under results/ of a directory, without the report; read once per process."""
    files = [*Path(here, "results").glob("*/*/provenance.json"), *Path(here, "results").glob("*/*/*/provenance.json")]
    pairs = [(str(file.parent.relative_to(here)), record_of(file.parent)) for file in sorted(files)]
    return [(folder, record) for folder, record in pairs if record and record["stage"] != "report"]


def past(plan: Plan, artifact: Artifact) -> list[tuple[dict, Need]]:
    """(record, prediction) of past runs of the same stage, method and device."""
    experiment, stage, policy = artifact
    return _past(os.getcwd(), plan, stage, method(plan.experiments[experiment], stage, policy))


@cache
def _past(here: str, plan: Plan, stage: str, kind: str) -> list[tuple[dict, Need]]:
    runs = []
    for folder, record in records(here):
        artifact = at(folder)
        same_device = (record.get("shape", {}).get("device", "cpu") != "cpu") == on_gpu()
        if artifact.stage != stage or artifact.experiment not in plan.experiments or not same_device:
            continue
        settings = as_recorded(plan.experiments[artifact.experiment], stage, record)
        if method(settings, stage, artifact.policy) == kind and (need := predicted(plan, artifact, settings)):
            runs.append((record, need))
    return runs


def as_recorded(settings: Experiment, stage: str, record: dict) -> Experiment:
    """An experiment with the section of a past run, and the number that its batch size `auto` was; unchanged where that
    section is no longer valid."""
    try:
        values = json.loads(record["params"][0])
        if values.get("batch_size") == "auto":
            values["batch_size"] = record.get("shape", {}).get("batch_size", LARGEST_BATCH)
        section = STAGES[stage].section.model_validate(values)
    except ValueError:
        return settings
    return settings.model_copy(update={stage: section})


def method(settings: Experiment, stage: str, policy: str) -> str:
    """The kind of a stage's run: its training method, or the method and policy that it is based on."""
    section = getattr(settings, stage)
    if isinstance(section, Longctx):
        return section.tuning
    if isinstance(section, Base):
        return section.scratch.positions if section.scratch else "given"
    tuned = settings.sft.method if settings.sft and policy != "base" else ""
    return f"{tuned} {policy}"


def ratio(plan: Plan, artifact: Artifact, gpu: bool = False) -> float:
    """Resident memory (gpu: the GPU's) over its prediction: the median of past runs of the same kind, within BOUNDS; 1
    without past runs."""
    key, ratios = "peak_gpu_memory_mb" if gpu else "peak_memory_mb", []
    for record, need in past(plan, artifact):
        used, expected = record.get(key), need.device if gpu else need.host
        ratios += [used * 2**20 / expected] if isinstance(used, int | float) and used > 0 and expected else []
    return min(max(statistics.median(ratios), BOUNDS[0]), BOUNDS[1]) if ratios else 1.0


def seconds(plan: Plan, artifact: Artifact, need: Need | None) -> float | None:
    """Seconds, in proportion to work, of the past runs of the same kind with the nearest work; None without past runs.

    need: the prediction. Only the nearest count, as small runs spend their time on starting.
    """
    stage = artifact.stage
    if stage in ON_CPU:
        of_stage = [record for _, record in records(os.getcwd()) if record["stage"] == stage]
        times = [record["seconds"] for record in of_stage if record.get("seconds")]
        return statistics.median(times) if times else None
    section = None if need is None else getattr(need.settings, stage)
    if need is None or (isinstance(section, Passes) and section.epochs is not None):
        return None  # steps are not known before the data is prepared
    runs = past(plan, artifact)
    timed = [(record["seconds"], work(before, stage)) for record, before in runs if record.get("seconds")]
    if not timed:
        return None
    wanted = work(need, stage)
    nearest = min(abs(math.log(wanted / done)) for _, done in timed)
    return statistics.median(time * wanted / done for time, done in timed if abs(math.log(wanted / done)) == nearest)


def work(need: Need, stage: str) -> float:
    """The work of a run, to which its time is proportional: parameters, times the tokens of all steps if it trains."""
    section = loop(getattr(need.settings, stage))
    if not hasattr(section, "steps"):
        return float(need.shape.parameters)
    length = getattr(section, "context", None) or getattr(section, "max_length", None) or 1
    return float(need.shape.parameters) * section.steps * section.batch_size * length


def exhausted_mb(plan: Plan, artifact: Artifact) -> int:
    """MB with which a run of these settings, inputs and code was killed out of memory; 0 where none was.

    Read from `failed.json`, or from SLURM for a job that was killed with all its processes and could not write it.
    """
    folder = Path(plan.folder(*artifact), "checkpoints", "attempt")
    began, failed = read_object(folder / "attempt.json"), read_object(folder / "failed.json")
    if not began or began.get("what") != attempt.digest(shlex.split(plan.arguments(*artifact))):
        return 0
    sizes = [failed.get("mem_mb")] if failed.get("reason") == "out of memory" else []
    sizes += [began.get("mem_mb")] if began.get("job") and slurm.ran_out_of_memory(began["job"]) else []
    return max((round(size) for size in sizes if isinstance(size, int | float)), default=0)
