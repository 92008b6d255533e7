"""The settings of a SLURM site, `slurm/site.yaml`, and the resources that each job requests.

snakemake --profile slurm
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from posttrain.cluster import states
from posttrain.config.mistakes import checked, nearest, place_of
from posttrain.config.sections import LARGEST, Count, Positive, Section, Text
from posttrain.config.settings import read_settings
from posttrain.config.stages import SHARDED, STAGES, TRAINERS
from posttrain.dag.artifacts import Artifact
from posttrain.dag.plan import Plan
from posttrain.engine import executor, versions
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say
from posttrain.jobs import cards, launch, slurm
from posttrain.resources import estimates

FILE = Path("slurm/site.yaml")
OVERHEAD = 400  # MB that a job needs in addition to its stage: Snakemake's executor runs twice in it
Megabytes = Annotated[int, Field(ge=100, le=LARGEST)]
Resources = dict[str, int | str]


class Request(Section):
    """A stage's requests that replace the estimates of `posttrain plan`."""

    gpu: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    """GPUs on all nodes together."""
    nodes: Count = 1
    """Nodes, with equal numbers of GPUs; for stages that train."""
    mem_mb: Megabytes | None = None
    """Memory on each node, in MB."""
    runtime: Count | None = None
    """Time limit, in minutes; a stage that needs longer continues in a new job."""
    shard: bool = False
    """Shard the weights over the GPUs (FSDP), where one GPU cannot hold them; only some stages can."""


class Site(Section):
    """One SLURM site. Nothing here changes a result."""

    partition: Text | None = None
    """Partition; the site's default where it is left out."""
    account: Text | None = None
    """Account that is charged."""
    qos: Text | None = None
    """Quality of service."""
    gpu_type: Text | None = None
    """Type of GPU, as `sinfo -o %G` names it."""
    gpu_memory_gb: Positive | None = None
    """Memory of one GPU, in GB; a stage that does not fit is refused at start, with settings that would fit."""
    constraint: Text | None = None
    """Features that a node must have."""
    modules: list[Text] = Field(default=[])
    """Environment modules that a job loads before a stage."""
    container: Text | None = None
    """Apptainer image with this environment (`envs/posttrain.def`), in which stages run."""
    scratch: Text | None = None
    """Folder for checkpoints, which every node must see. Default: beside the results."""
    max_runtime: Count | None = None
    """Upper limit of estimated run times, in minutes. Default: the partition's own limit."""
    jobs: Count = 32
    """Upper limit of jobs in the queue at once."""
    cpu_only: bool = False
    """Request no GPU, on a cluster that has none."""
    stages: dict[str, Request] = Field(default={})
    """Stage -> requests that replace its estimates."""

    def gpus(self, count: int) -> str:
        """The value of SLURM's option `--gpus` for `count` GPUs of the site."""
        return f"{self.gpu_type}:{count}" if self.gpu_type else str(count)


def read(file: Path = FILE) -> Site:
    """The site's settings, or the defaults where there is no file. Raises UserError with every mistake."""
    if not file.is_file():
        return Site()
    values = read_settings(file)
    site, mistakes = checked(Site, values)
    requests = values["stages"] if isinstance(values.get("stages"), dict) else {}
    for stage in [name for name in requests if name not in STAGES]:
        known = f"known: {', '.join(STAGES)}; fetch and report run where Snakemake does"
        mistakes = {key: text for key, text in mistakes.items() if not f"{key}.".startswith(f"stages.{stage}.")}
        mistakes[f"stages.{stage}"] = f"no such stage{nearest(stage, list(STAGES))}; {known}"
    problems = [f"{place_of(values.places, key)}: {key}: {text}" for key, text in mistakes.items()]
    problems += [f"{place_of(values.places, key)}: {key}: {problem}" for key, problem in contradictions(site or Site())]
    if problems or site is None:
        raise UserError(*problems)
    return site


def contradictions(site: Site) -> Iterator[tuple[str, str]]:
    """(key, problem) of each setting that is of the right type but cannot work."""
    if site.gpu_type and not re.fullmatch(r"[A-Za-z0-9_.]+", site.gpu_type):
        allowed = "Snakemake's SLURM plugin takes only letters, digits, _ and ."
        yield "gpu_type", f"{allowed}, not {site.gpu_type!r}: leave it out, and choose by partition or constraint"
    try:
        launch.scratch(site.scratch)
    except UserError as error:
        yield "scratch", str(error)
    for stage, request in site.stages.items():
        if request.shard and stage not in SHARDED:
            yield f"stages.{stage}.shard", f"only {', '.join(SHARDED)} can"
        gpus, key = request.gpu or 0, f"stages.{stage}.nodes"
        if request.nodes > 1 and stage not in TRAINERS:
            yield key, f"only {', '.join(TRAINERS)} can run on several nodes"
        elif request.nodes > 1 and (gpus < request.nodes or gpus % request.nodes):
            todo = f"set stages.{stage}.gpu to a multiple of {request.nodes}"
            yield key, f"{gpus} GPUs cannot be divided evenly over {request.nodes} nodes; {todo}"


def read_for_profile(works: bool) -> Site:
    """The site's settings, for Snakemake's profile. A mistake is printed and ends Snakemake.

    works: whether Snakemake will run jobs. If so, this waits until SLURM answers, since its configuration and time
    limits are read next.
    """
    try:
        site = read()
        if works and (absent := slurm.absent()):
            raise UserError(f"SLURM: no {', '.join(absent)} on PATH: {slurm.TODO}, or run on this machine: snakemake")
        if works:
            slurm.wait_until_reachable("nothing is planned until it does")
        return site
    except UserError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
    except KeyboardInterrupt:
        say("interrupted; nothing was started")
    sys.exit(2)


def enter(workflow) -> Site | None:
    """Set up a Snakemake for the place where its jobs run; returns the site, None for this machine.

    workflow: Snakemake's. Inside a job, the site is that of the start of the run. On this machine, GPUs become a
    resource, so that two stages do not share one. Raises UserError for another SLURM executor than the one
    that is patched here.
    """
    if not workflow.is_main_process:
        return of_job()
    os.environ.pop(slurm.SITE, None)
    if workflow.resource_settings.nodes is None:
        if "gpu" not in workflow.global_resources:
            workflow.register_resource("gpu", len(cards.present()))
        return None
    for name in [name for name in os.environ if name.startswith("SQUEUE_") or name in ("SBATCH_WAIT", "SBATCH_SIGNAL")]:
        del os.environ[name]  # the user's own settings, which would hide jobs or end them
    versions.check_slurm_executor()
    site = limited(read())
    os.environ[slurm.SITE] = site.model_dump_json(exclude_none=True)
    expect_device(site)
    executor.report_states(states.settle)
    executor.submit_when_slurm_answers()
    return site


def limited(site: Site) -> Site:
    """The site with its partition's time limit: SLURM never starts a job that requests more."""
    limit = site.max_runtime or slurm.time_limit(site.partition)
    return site.model_copy(update={"max_runtime": limit}) if limit else site


def expect_device(site: Site) -> None:
    """Make estimates for the site's compute nodes instead of this machine."""
    estimates.expect_device("cpu" if site.cpu_only else "gpu", site.gpu_memory_gb)


def of_job() -> Site | None:
    """The site that this process is a job of; None outside of one."""
    return Site.model_validate_json(os.environ[slurm.SITE]) if slurm.SITE in os.environ else None


def default_resources(site: Site) -> Resources:
    """Snakemake's resources of every job at this site, under the executor plugin's names."""
    values = {
        "slurm_partition": site.partition,
        "slurm_account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "gpu_model": site.gpu_type,
        "nodes": 1,  # unless a stage requests several
        "slurm_extra": sbatch_options(),
    }
    # Snakemake evaluates texts as Python: `all`, 12_34 and names with a hyphen would become something else.
    return {key: repr(value) if isinstance(value, str) else value for key, value in values.items() if value}


def stage_resources(site: Site) -> dict[str, Resources]:
    """Stage with several GPUs -> Snakemake's resources: two cores for each GPU, and the nodes.

    The executor plugin requests `gpu` GPUs for the whole job, and gives Snakemake `gpus` of them on the first node.
    """
    resources: dict[str, Resources] = {}
    for stage, request in site.stages.items():
        gpus = request.gpu or 0
        if stage in TRAINERS and gpus > 1:
            each = gpus // request.nodes
            resources[stage] = {"cpus_per_task": 2 * each}
            if request.nodes > 1:
                evenly = repr(sbatch_options(f"--gpus-per-node={site.gpus(each)}"))
                resources[stage] |= {"nodes": request.nodes, "gpus": each, "slurm_extra": evenly}
    return resources


def sbatch_options(*options: str) -> str:
    """Options of sbatch for the executor plugin. A requeued job appends to its log."""
    return " ".join(["--open-mode=append", *options])


def request(site: Site | None, plan: Plan, artifact: Artifact) -> dict[str, int]:
    """The resources that an artifact's job requests: `gpu`, `mem_mb`, `disk_mb`, and `runtime` in minutes.

    site: None for this machine.
    """
    if site is None:
        estimate = estimates.request(plan, artifact)
        return estimate | {"gpu": min(estimate["gpu"], len(cards.present()))}
    replaced = site.stages.get(artifact.stage, Request())
    values = replaced.model_dump(exclude_none=True, exclude={"shard", "nodes"})
    processes = max(1, (replaced.gpu or 1) // replaced.nodes) if artifact.stage in TRAINERS else 1
    estimate = estimates.request(plan, artifact, processes)
    estimate["mem_mb"] += OVERHEAD
    estimate["runtime"] = min(estimate["runtime"], site.max_runtime or estimate["runtime"])
    exhausted = estimates.exhausted_mb(plan, artifact) if "mem_mb" in values else 0
    if exhausted and exhausted / values["mem_mb"] in (1, 2, 4, 8):  # this request, or a doubling of it, was too little
        values["mem_mb"] = 2 * exhausted
    return estimate | ({"gpu": 0} if site.cpu_only else {}) | values


def shell_prefix(site: Site) -> str:
    """The commands of a job's shell before its stage: ignore SIGTERM and load modules.

    A shell or `tee` killed by SIGTERM would end the stage while it saves.
    """
    modules = " ".join(map(shlex.quote, site.modules))
    load = f"type module > /dev/null 2>&1 || . /etc/profile; module load {modules}; " if modules else ""
    return f"set -euo pipefail; trap '' TERM; {load}"
