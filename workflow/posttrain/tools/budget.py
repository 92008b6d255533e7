"""Print the predicted needs of the stages that will run, and settings with which too large stages would fit.

posttrain plan [CAMPAIGN] [--all] [--terms] [--gpu-memory-gb N]
"""

import itertools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from posttrain.config.sections import Adapter, Base, Judgement, Longctx, Measured, Sampled, Sft
from posttrain.config.stages import ON_CPU, SHARDED, TRAINERS, Experiment
from posttrain.dag.artifacts import Artifact
from posttrain.dag.campaign import load
from posttrain.dag.checks import contradictions
from posttrain.dag.plan import Plan
from posttrain.ground.errors import UserError
from posttrain.resources import estimates
from posttrain.resources.estimates import GB, RESERVE, Need, size
from posttrain.resources.hours import hours as hours_of
from posttrain.resources.memory import MB
from posttrain.resources.steps import loop
from posttrain.tools import why

UNTIL = "unknown until fetched"
COLUMNS = f"{'stage':32} {'trained':>8} {'peak GB':>8}  {'most of it':22} {'host GB':>7} {'hours':>8} {'disk GB':>7}"
Change = tuple[str, str, object]  # (section, key, value)


def budget(wanted: str, campaign: Path, every: bool, terms: bool, gpu_memory_gb: float | None) -> None:
    """Print the needs of the stages that will run. Raises UserError for those that do not fit a GPU's memory.

    wanted: a campaign, or EXPERIMENT/STAGE[/POLICY] of `campaign`.
    """
    if gpu_memory_gb is not None:
        estimates.expect_device("gpu", gpu_memory_gb)
    whole = wanted.endswith((".yaml", ".yml"))
    plan = load(wanted if whole else campaign)
    print(table(plan, every, terms) if whole else one(plan, wanted))
    if gpu_memory_gb is not None:
        refuse_too_large(plan, gpu_memory_gb, every)


def table(plan: Plan, every: bool = False, terms: bool = False) -> str:
    """A line for each stage that will run (`every`: for each stage), and totals; with `terms`, the terms of each."""
    artifacts = to_plan(plan, every)
    if not artifacts:
        return why.NOTHING
    lines, requests = [COLUMNS], {}
    for artifact in artifacts:
        requests[artifact] = estimates.request(plan, artifact)
        lines.append(line(plan, artifact, requests[artifact]))
        need = estimates.predicted(plan, artifact)
        lines += list(sums(need, requests[artifact]["batch_size"])) if terms and need else []
    return "\n".join([*lines, "", *totals(plan, requests)])


def to_plan(plan: Plan, every: bool) -> list[Artifact]:
    """The artifacts that will be made, or all, without the report."""
    return plan.artifacts()[:-1] if every else why.to_make(plan)


def line(plan: Plan, artifact: Artifact, request: dict[str, int]) -> str:
    """The line of one stage: trained parameters, peak on the device with its largest term, and requested resources."""
    need = estimates.predicted(plan, artifact)
    time = estimates.seconds(plan, artifact, need)
    trained, peak, most = "", "", "" if artifact.stage in ON_CPU else UNTIL
    if need:
        largest = max(need.terms, key=lambda name: need.terms[name], default="")
        used = estimates.ratio(plan, artifact, gpu=True)
        trained, peak = short(need.trained), f"{need.device / GB * used:.2f}"
        most = f"{largest} {need.terms[largest] / GB:.2f}" if largest else ""
    hours = (span(untimed(need, artifact.stage)) or "unknown") if time is None else f"{time / 3600:.2f}"
    memory, disk = request["mem_mb"] / 1000, request["disk_mb"] / 1000
    return f"{artifact.name:32} {trained:>8} {peak:>8}  {most:22} {memory:7.1f} {hours:>8} {disk:7.2f}"


def untimed(need: Need | None, stage: str) -> tuple[float, float] | None:
    """The fewest and most hours of a training on the GPU that is planned for, by its arithmetic."""
    memory = estimates.device_memory_gb(True) if need and estimates.on_gpu() else None
    return hours_of(need, stage, memory) if need and memory else None


def span(hours: tuple[float, float] | None) -> str:
    """A range of hours as short text; "" for none."""
    return "-".join(f"{value:.2g}" if value < 10 else f"{value:.0f}" for value in hours) if hours else ""


def short(count: int) -> str:
    """A number of parameters as short text; "" for 0."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.1f} {letter}"
    return str(count or "")


def totals(plan: Plan, requests: dict[Artifact, dict]) -> list[str]:
    """Total stages, hours, GPU-hours and disk, and what the columns mean."""
    times = {name: estimates.seconds(plan, name, estimates.predicted(plan, name)) for name in requests}
    timed = [time for time in times.values() if time is not None]
    gpu = estimates.on_gpu()
    gpu_hours = sum(requests[name]["gpu"] * (time or 0) for name, time in times.items()) / 3600 if gpu else 0
    unrecorded = len(times) - len(timed)
    unknown = f"; {unrecorded} of unknown time, as no record has it yet" if unrecorded else ""
    disk = sum(request["disk_mb"] for request in requests.values()) / 1000
    hours = f"{sum(timed) / 3600:.2f} hours, {gpu_hours:.2f} GPU-hours"
    ranges = [untimed(estimates.predicted(plan, name), name.stage) for name, time in times.items() if time is None]
    fewest, most = (sum(of_stage[end] for of_stage in ranges if of_stage) for end in (0, 1))
    by_arithmetic = f"trainings without a record, by their arithmetic on one GPU: {span((fewest, most))} hours"
    return [
        f"{len(requests)} stages: {hours}, {disk:.2f} GB of disk{unknown}",
        *([by_arithmetic] if most else []),
        f"peak: on the {'GPU' if gpu else 'CPU, within host'}; host: the request, with past use and a margin",
    ]


def sums(need: Need, batch_size: int) -> Iterator[str]:
    """The terms of a stage's peak, and their sum. batch_size: that of `auto`, else 0."""
    chosen = f", batch_size {batch_size}" if batch_size else ""
    yield f"  at its peak ({need.moment}{chosen}), MB:"
    for name, term in [*need.terms.items(), ("total", need.device)]:
        yield f"  {term / MB:12,.1f}  {name}"


def one(plan: Plan, wanted: str) -> str:
    """The terms of one stage, EXPERIMENT/STAGE[/POLICY]. Raises UserError where the campaign does not have it."""
    artifacts = [artifact for artifact in plan.artifacts() if why.within(artifact.name, wanted)]
    experiment = next((name for name in plan.names if wanted.startswith(f"{name}/")), None)
    if not artifacts and experiment:
        stage, _, policy = wanted.removeprefix(f"{experiment}/").partition("/")
        if (stage, policy) in plan.made(experiment):
            artifacts = [plan.artifact(experiment, stage, policy)]
    if not artifacts:
        raise UserError(f"{wanted}: nothing of this campaign; `posttrain plan --all` lists its stages")
    lines = []
    for artifact in artifacts:
        need, request = estimates.predicted(plan, artifact), estimates.request(plan, artifact)
        lines += [COLUMNS, line(plan, artifact, request), *(sums(need, request["batch_size"]) if need else [])]
    return "\n".join(lines)


def refuse_too_large(
    plan: Plan, gb: float, every: bool = False, gpus: Mapping[str, int] | None = None, sharded: Collection[str] = ()
) -> None:
    """Raise UserError for the stages whose peak is over a GPU's memory, each with settings with which it would fit.

    gpus: stage -> GPUs that share its batch. sharded: stages whose weights are sharded too, which have no prediction.
    """
    problems = []
    for artifact in to_plan(plan, every):
        settings = with_part_of_batch(plan.experiments[artifact.experiment], artifact.stage, gpus or {})
        need = estimates.predicted(plan, artifact, settings, gpu=True, memory_gb=gb)
        used = estimates.ratio(plan, artifact, gpu=True)
        if need and need.device and size(need, used) > gb and artifact.stage not in sharded:
            ways = " or ".join(remedies(plan, artifact, (gb - RESERVE) / used + RESERVE))
            advice = f"fits with {ways}" if ways else without_remedy(artifact.stage)
            needed = f"needs {size(need, used):.1f} GB of GPU memory, there are {gb:g}"
            problems.append(f"{artifact.name}: {needed}; {advice}")
    if problems:
        raise UserError(*problems)


def without_remedy(stage: str) -> str:
    """What to do about a stage that fits with none of its settings."""
    share = f"stages: {{{stage}: {{gpu: 4, shard: true}}}} in slurm/site.yaml"
    several = f", or let several GPUs share its weights ({share})" if stage in SHARDED else ""
    return f"it fits with none of its settings: shorten rows or take a smaller model{several}"


def with_part_of_batch(settings: Experiment, stage: str, gpus: Mapping[str, int]) -> Experiment:
    """The experiment with one GPU's part of a training stage's batch."""
    section, count = loop(getattr(settings, stage)), gpus.get(stage, 1)
    if count == 1 or stage not in TRAINERS or section is None:
        return settings
    part, where = max(1, section.batch_size // count), place(settings, stage)
    micro = section.micro_batch_size and min(section.micro_batch_size, part)
    return changed(settings, ((where, "batch_size", part), (where, "micro_batch_size", micro)))


def place(settings: Experiment, stage: str) -> str:
    """The dotted key of the section with a stage's batch size."""
    return f"{stage}.scratch" if isinstance(getattr(settings, stage), Base) else stage


def remedies(plan: Plan, artifact: Artifact, gb: float) -> Iterator[str]:
    """The smallest sets of changed settings with which a stage fits, as text."""
    ways = changes(plan.experiments[artifact.experiment], artifact.stage)
    for count in range(1, len(ways) + 1):
        candidates = [fitting(plan, artifact, gb, some) for some in itertools.combinations(ways, count)]
        if any(candidates):
            yield from filter(None, candidates)
            return


def changes(settings: Experiment, stage: str) -> list[list[Change]]:
    """Possible changes of a stage's settings, in the order to try; for each setting, the mildest value first."""
    section, where = loop(getattr(settings, stage)), place(settings, stage)
    dtype: list[Change] = [] if settings.base.dtype == "bfloat16" else [("base", "dtype", "bfloat16")]
    if not hasattr(section, "micro_batch_size"):
        now = 1 if section.batch_size == "auto" else section.batch_size
        sizes: list[Change] = [(where, "batch_size", size) for size in divisors(now, now)]
        keys: list[Change] = [(where, "merge", False)] if isinstance(section, Measured) else []
        keys += [(where, "quantize", True)] if isinstance(section, Judgement) else []
        return [values for values in [sizes, dtype, *([key] for key in keys)] if values]
    now = section.micro_batch_size or section.batch_size
    ways: list[list[Change]] = [[(where, "micro_batch_size", size) for size in divisors(section.batch_size, now)]]
    if isinstance(section, Sampled):
        at_once = section.answer_batch_size or section.batch_size
        ways.append([(where, "answer_batch_size", size) for size in divisors(section.batch_size, at_once)])
    if getattr(section, "gradient_checkpointing", True) is False:
        ways.append([(where, "gradient_checkpointing", True)])
    if isinstance(section, Longctx) and section.tuning in ("full", "lora"):
        ways.append([(where, "tuning", "qlora")])
    elif isinstance(section, Sft | Adapter) and settings.sft.method in ("full", "lora"):
        ways.append([("sft", "method", "qlora")])
    if isinstance(section, Adapter) and section.method == "full":
        ways.append([(where, "method", method) for method in ("lora", "qlora")])
    if section.precision == "float32":
        ways.append([(where, "precision", "bfloat16")])
    ways.append(dtype)
    return [values for values in ways if values]


def divisors(whole: int, under: int) -> list[int]:
    """Divisors of `whole` below `under`, the largest first."""
    return [size for size in range(under - 1, 0, -1) if whole % size == 0]


def fitting(plan: Plan, artifact: Artifact, gb: float, ways: tuple[list[Change], ...]) -> str:
    """The mildest valid choice of one value for each setting with which a stage fits, as text; "" where none fits."""
    settings = plan.experiments[artifact.experiment]
    problems = set(contradictions(settings))
    for chosen in itertools.product(*ways):
        other = changed(settings, chosen)
        need = estimates.predicted(plan, artifact, other, gpu=True, memory_gb=gb)
        if need and size(need) <= gb and set(contradictions(other)) <= problems:
            return ", ".join(f"{where}.{key}: {str(value).lower()}" for where, key, value in chosen)
    return ""


def changed(settings: Experiment, chosen: Collection[Change]) -> Experiment:
    """An experiment with changed values."""
    for where, key, value in chosen:
        first, _, inner = where.partition(".")
        section = getattr(settings, first)
        if inner:
            part = getattr(section, inner).model_copy(update={key: value})
            section = section.model_copy(update={inner: part})
        else:
            section = section.model_copy(update={key: value})
        settings = settings.model_copy(update={first: section})
    return settings
