"""What the stages to be run need, as a table, term by term; and what would make those fit that cannot.

posttrain plan [CAMPAIGN] [--all] [--terms] [--gpu-memory-gb N]
"""

import itertools
from collections.abc import Collection, Iterator, Mapping

from posttrain.config.experiment import Experiment
from posttrain.config.stages import TRAINERS
from posttrain.dag.checks import contradictions
from posttrain.dag.plan import Plan
from posttrain.ground.errors import UserError
from posttrain.resources import estimates
from posttrain.resources.estimates import Need
from posttrain.resources.memory import MB
from posttrain.tools import why

GB = 1e9
RESERVE = 0.6  # GB of a GPU that CUDA's context and the allocator's rounding take
UNTIL = "unknown until fetched"
COLUMNS = f"{'stage':32} {'trained':>8} {'peak GB':>8}  {'most of it':22} {'host GB':>7} {'hours':>8} {'disk GB':>7}"


def table(plan: Plan, every: bool = False, terms: bool = False) -> str:
    """A line for each stage to be run (`every`: for each stage), and the totals; with `terms`, the sum below each."""
    folders = stages(plan, every)
    if not folders:
        return why.NOTHING
    lines, asked = [COLUMNS], {}
    for folder in folders:
        asked[folder] = estimates.request(plan, *place(folder))
        lines.append(line(plan, folder, asked[folder]))
        need = estimates.predicted(plan, *place(folder))
        lines += list(sums(need)) if terms and need else []
    return "\n".join([*lines, "", *totals(plan, asked)])


def stages(plan: Plan, every: bool) -> list[str]:
    """Folders of the stages to be run, or of all; the report needs nothing to speak of."""
    found = plan.folders() if every else why.to_run(why.survey(plan))
    return [folder for folder in found if folder != "results/report"]


def place(folder: str) -> tuple[str, str, str]:
    """The experiment, the stage and the policy of an artifact's folder."""
    _, experiment, stage, policy = [*folder.split("/"), ""][:4]
    return experiment, stage, policy


def line(plan: Plan, folder: str, asked: dict[str, int]) -> str:
    """One stage: what it trains, its peak on the device and the largest term, and what is asked for it."""
    need = estimates.predicted(plan, *place(folder))
    time = estimates.seconds(plan, *place(folder), need)
    trained, peak, most = ("", "", "" if place(folder)[1] == "prepare" else UNTIL)
    if need:
        largest = max(need.terms, key=need.terms.get, default="")
        used = estimates.ratio(plan, *place(folder), gpu=True)
        trained, peak = short(need.trained), f"{sum(need.terms.values()) / GB * used:.2f}"
        most = f"{largest} {need.terms[largest] / GB:.2f}" if largest else ""
    hours = "unknown" if time is None else f"{time / 3600:.2f}"
    name = folder.removeprefix("results/")
    memory, disk = asked["mem_mb"] / 1000, asked["disk_mb"] / 1000
    return f"{name:32} {trained:>8} {peak:>8}  {most:22} {memory:7.1f} {hours:>8} {disk:7.2f}"


def short(count: int) -> str:
    """A number of parameters for people; "" for none."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return str(count or "")


def totals(plan: Plan, asked: dict[str, dict]) -> list[str]:
    """Stages, hours, GPU-hours and disk in all, and how the numbers were come by."""
    places = {folder: place(folder) for folder in asked}
    times = {name: estimates.seconds(plan, *at, estimates.predicted(plan, *at)) for name, at in places.items()}
    known = [time for time in times.values() if time is not None]
    gpu, used = estimates.on_gpu(), sum(asked[folder]["gpu"] * (time or 0) for folder, time in times.items()) / 3600
    unknown = (
        f"; {len(times) - len(known)} of unknown time, which no record tells yet" if len(known) < len(times) else ""
    )
    disk = sum(one["disk_mb"] for one in asked.values()) / 1000
    hours = f"{sum(known) / 3600:.2f} hours, {used if gpu else 0:.2f} GPU-hours"
    return [
        f"{len(asked)} stages: {hours}, {disk:.2f} GB of disk{unknown}",
        f"peak: on the {'GPU' if gpu else 'CPU, within host'}; host: what is asked for, past use and a margin in it",
    ]


def sums(need: Need) -> Iterator[str]:
    """The terms of a stage's peak, and their sum."""
    yield f"  at its peak ({need.moment}), MB:"
    for name, size in [*need.terms.items(), ("in all", sum(need.terms.values()))]:
        yield f"  {size / MB:12,.1f}  {name}"


def one(plan: Plan, wanted: str) -> str:
    """The terms of one stage, EXPERIMENT/STAGE[/POLICY]. Raises UserError for one that is not there."""
    found = [folder for folder in plan.folders() if why.within(folder.removeprefix("results/"), wanted)]
    own = [name for name in plan.names if wanted.startswith(f"{name}/")]
    if not found and own:
        stage, _, policy = wanted.removeprefix(f"{own[0]}/").partition("/")
        found = [plan.folder(own[0], stage, policy)] if (stage, policy) in plan.made(own[0]) else []
    if not found:
        raise UserError(f"{wanted}: nothing of this campaign; `posttrain plan --all` lists its stages")
    lines = []
    for folder in found:
        need = estimates.predicted(plan, *place(folder))
        lines += [COLUMNS, line(plan, folder, estimates.request(plan, *place(folder))), *(sums(need) if need else [])]
    return "\n".join(lines)


def refuse_too_large(
    plan: Plan, gb: float, every: bool = False, gpus: Mapping[str, int] | None = None, sharded: Collection[str] = ()
) -> None:
    """Raise UserError for the stages whose peak is over a GPU's memory, each with settings that would make it fit.

    gpus: stage -> GPUs that share its batch. sharded: those that share its weights too, of which one says nothing.
    """
    problems = []
    for folder in stages(plan, every):
        experiment, stage, policy = place(folder)
        settings = shared(plan.experiments[experiment], stage, (gpus or {}).get(stage, 1))
        need = estimates.predicted(plan, experiment, stage, policy, settings, gpu=True)
        used = estimates.ratio(plan, experiment, stage, policy, gpu=True)
        if need and size(need, used) > gb and stage not in sharded:
            ways = list(remedies(plan, experiment, stage, policy, (gb - RESERVE) / used + RESERVE))
            advice = (
                f"fits with {' or '.join(ways)}"
                if ways
                else "no setting of its own makes it fit: shorten rows or take a smaller model"
            )
            name = folder.removeprefix("results/")
            problems.append(f"{name}: needs {size(need, used):.1f} GB of GPU memory, there are {gb:g}; {advice}")
    if problems:
        raise UserError(*problems)


def shared(settings: Experiment, stage: str, gpus: int) -> Experiment:
    """An experiment as one of several GPUs goes through it: with its part of the batch of a stage that trains."""
    where = "base.scratch" if stage == "base" else stage
    section = section_of(settings, stage)
    if gpus == 1 or stage not in TRAINERS or section is None:
        return settings
    part = max(1, section.batch_size // gpus)
    micro = section.micro_batch_size and min(section.micro_batch_size, part)
    return changed(settings, ((where, "batch_size", part), (where, "micro_batch_size", micro)))


def section_of(settings: Experiment, stage: str):
    """The settings with which a stage goes through its rows; None for a base that is not trained."""
    return settings.base.scratch if stage == "base" else getattr(settings, stage)


def size(need: Need, used: float = 1.0) -> float:
    """GB of a GPU that a stage takes. used: what past runs used of their prediction."""
    return sum(need.terms.values()) / GB * used + RESERVE


def remedies(plan: Plan, experiment: str, stage: str, policy: str, gb: float) -> Iterator[str]:
    """The fewest changes of settings with which a stage fits, each as it is written; several where several do."""
    settings = plan.experiments[experiment]
    ways = changes(settings, stage)
    for count in range(1, len(ways) + 1):
        found = [
            made
            for some in itertools.combinations(ways, count)
            if (made := fitting(plan, experiment, stage, policy, gb, some))
        ]
        if found:
            yield from found
            return


def changes(settings: Experiment, stage: str) -> list[list[tuple[str, str, object]]]:
    """What can be changed of a stage, in the order to try: for each, (section, key, value), the mildest value first."""
    section, where = section_of(settings, stage), "base.scratch" if stage == "base" else stage
    if not hasattr(section, "micro_batch_size"):
        return [[(where, "batch_size", size) for size in divisors(section.batch_size, section.batch_size)]]
    now = section.micro_batch_size or section.batch_size
    found = [[(where, "micro_batch_size", size) for size in divisors(section.batch_size, now)]]
    if getattr(section, "gradient_checkpointing", True) is False:
        found.append([(where, "gradient_checkpointing", True)])
    if stage == "longctx" and section.tuning in ("full", "lora"):
        found.append([(where, "tuning", "qlora")])
    elif stage != "base" and stage != "longctx" and settings.sft.method in ("full", "lora"):
        found.append([("sft", "method", "qlora")])
    if section.precision == "float32":
        found.append([(where, "precision", "bfloat16")])
    return [values for values in found if values]


def divisors(whole: int, under: int) -> list[int]:
    """Divisors of a number under another, the largest first."""
    return [size for size in range(under - 1, 0, -1) if whole % size == 0]


def fitting(plan: Plan, experiment: str, stage: str, policy: str, gb: float, ways: tuple) -> str:
    """A choice of one value for each way, the mildest that `posttrain check` lets through, with which a stage fits; ""
    for none."""
    settings = plan.experiments[experiment]
    wrong = set(contradictions(settings))
    for chosen in itertools.product(*ways):
        other = changed(settings, chosen)
        need = estimates.predicted(plan, experiment, stage, policy, other, gpu=True)
        if need and size(need) <= gb and set(contradictions(other)) <= wrong:
            return ", ".join(f"{where}.{key}: {str(value).lower()}" for where, key, value in chosen)
    return ""


def changed(settings: Experiment, chosen: tuple) -> Experiment:
    """An experiment with other values at some keys."""
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
