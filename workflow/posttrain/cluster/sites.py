"""One SLURM site: its settings in `slurm/site.yaml`, and what they ask of Snakemake and SLURM for each job.

snakemake --profile slurm
"""

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from posttrain.cluster import states
from posttrain.config import reader
from posttrain.config.sections import Count, Section, Text
from posttrain.config.stages import SHARDED, STAGES, TRAINERS
from posttrain.config.validation import validated
from posttrain.dag.artifacts import Artifact
from posttrain.dag.plan import Plan
from posttrain.engine import executor
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say
from posttrain.jobs import cards, node, slurm
from posttrain.resources import estimates

FILE = Path("slurm/site.yaml")
OVERHEAD = 400  # MB that a job needs beside its stage: Snakemake's executor runs itself twice in it
Megabytes = Annotated[int, Field(ge=100)]
Resources = dict[str, int | str]


class Request(Section):
    """What a stage asks for, where the estimate of `posttrain plan` is not wanted."""

    gpu: Annotated[int, Field(ge=0)] | None = None
    """GPUs, on all its nodes together."""
    nodes: Count = 1
    """Nodes, each with as many of its GPUs: stages that train."""
    mem_mb: Megabytes | None = None
    """Memory on each node, in MB."""
    runtime: Count | None = None
    """Time limit, in minutes; a stage that needs longer is continued."""
    shard: bool = False
    """Share the weights out among its GPUs (FSDP), where one GPU cannot hold them; not every stage can."""


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
    gpu_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU; a stage that does not fit into it is refused before anything runs, with what would fit."""
    constraint: Text | None = None
    """Features that a node must have."""
    modules: list[Text] = Field(default=[])
    """Environment modules that a job loads before a stage."""
    container: Text | None = None
    """Apptainer image in which stages run; it holds this environment (`envs/posttrain.def`)."""
    scratch: Text | None = None
    """Folder for checkpoints, which every node sees; beside the results where it is left out."""
    max_runtime: Count | None = None
    """Most minutes that an estimate asks for; the partition's own limit where it is left out."""
    jobs: Count = 32
    """Most jobs in the queue at once."""
    cpu_only: bool = False
    """Ask for no GPU, on a cluster that has none."""
    stages: dict[str, Request] = Field(default={})
    """Stage -> what it asks for instead of the estimate."""

    def gpus(self, count: int) -> str:
        """The value of SLURM's options `--gpus` for so many of the site's GPUs."""
        return f"{self.gpu_type}:{count}" if self.gpu_type else str(count)


def read(file: Path = FILE) -> Site:
    """The site's settings; the defaults where there is no file. Raises UserError that names every mistake."""
    if not file.is_file():
        return Site()
    values = reader.read_settings(file)
    problems: list[str] = []
    site = validated(Site, values, values.places, problems)
    stages = [*STAGES, "fetch", "report"]
    requests = values["stages"] if isinstance(values.get("stages"), dict) else {}
    problems += [
        f"{values.places[f'stages.{stage}']}: stages.{stage}: no such stage; known: {', '.join(stages)}"
        for stage in requests
        if stage not in stages
    ]
    problems += [f"{values.places.get(key)}: {key}: {problem}" for key, problem in contradictions(site or Site())]
    if problems or site is None:
        raise UserError(*problems)
    return site


def contradictions(site: Site) -> Iterator[tuple[str, str]]:
    """The (key, problem) of each setting that its type allows and that cannot work."""
    if site.gpu_type and not re.fullmatch(r"[A-Za-z0-9_.]+", site.gpu_type):
        allowed = "Snakemake's SLURM plugin takes letters, digits, _ and . alone"
        yield "gpu_type", f"{allowed}, not {site.gpu_type!r}: leave it out, and choose by partition or constraint"
    try:
        node.scratch(site.scratch)
    except UserError as error:
        yield "scratch", str(error)
    for stage, request in site.stages.items():
        if request.shard and stage not in SHARDED:
            yield f"stages.{stage}.shard", f"only {' and '.join(SHARDED)} can"
        gpus, key = request.gpu or 0, f"stages.{stage}.nodes"
        if request.nodes > 1 and stage not in TRAINERS:
            yield key, f"only {', '.join(TRAINERS)} can share work out among nodes"
        elif request.nodes > 1 and (gpus < request.nodes or gpus % request.nodes):
            todo = f"set stages.{stage}.gpu to a multiple of {request.nodes}"
            yield key, f"{request.nodes} nodes cannot have as many of {gpus} GPUs each; {todo}"


def read_for_profile(works: bool) -> Site:
    """The site's settings, for Snakemake's profile: a mistake ends Snakemake, in words.

    works: whether Snakemake will run jobs. Then this waits until SLURM answers, which is asked next for how long it
    remembers jobs and lets one run: a job that asks for more time than its partition has would wait without an end.
    """
    try:
        site = read()
        if works:
            slurm.wait_until_reachable("nothing is planned until it does")
        return site
    except UserError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
    except KeyboardInterrupt:
        say("interrupted; nothing was started")
    sys.exit(2)


def enter(workflow) -> Site | None:
    """Prepare a Snakemake for where its jobs run; returns the site, None on this machine.

    workflow: Snakemake's. Inside a job this is the site as it was when the run began. On this machine GPUs become a
    resource, so that no two stages share one unless told to.
    """
    if not workflow.is_main_process:
        return of_job()
    os.environ.pop(slurm.SITE, None)
    if workflow.resource_settings.nodes is None:
        if "gpu" not in workflow.global_resources:
            workflow.register_resource("gpu", len(cards.present()))
        return None
    for name in [name for name in os.environ if name.startswith("SQUEUE_") or name in ("SBATCH_WAIT", "SBATCH_SIGNAL")]:
        del os.environ[name]  # the user's own, which would hide jobs, or end them
    site = limited(read())
    os.environ[slurm.SITE] = site.model_dump_json(exclude_none=True)
    expect_device(site)
    executor.report_states(states.settle)
    executor.submit_when_slurm_answers()
    return site


def limited(site: Site) -> Site:
    """A site with its partition's time limit: SLURM lets a job over it wait without an end."""
    limit = site.max_runtime or slurm.time_limit(site.partition)
    return site.model_copy(update={"max_runtime": limit}) if limit else site


def expect_device(site: Site) -> None:
    """Let estimates be for the site's compute nodes, whatever this machine has."""
    os.environ["POSTTRAIN_DEVICE"] = "cpu" if site.cpu_only else "gpu"


def of_job() -> Site | None:
    """The site that this process is a job of; None outside of one."""
    return Site.model_validate_json(os.environ[slurm.SITE]) if slurm.SITE in os.environ else None


def default_resources(site: Site) -> Resources:
    """Snakemake's resources of every job at this site, by the executor plugin's names."""
    values = {
        "slurm_partition": site.partition,
        "slurm_account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "gpu_model": site.gpu_type,
        "nodes": 1,  # all GPUs of a job in one place, unless its stage is spread
        "slurm_extra": sbatch_options(),
    }
    # Snakemake reads a text as Python: `all`, 12_34 and what has a hyphen would be something else.
    return {key: repr(value) if isinstance(value, str) else value for key, value in values.items() if value}


def stage_resources(site: Site) -> dict[str, Resources]:
    """Stage -> Snakemake's resources of one with several GPUs: two cores for each, and its nodes.

    `gpu` is what the executor plugin asks of SLURM for the whole job, `gpus` what it gives Snakemake on the first node.
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
    """Options of sbatch, for the executor plugin; the log of a requeued job keeps what came before."""
    return " ".join(["--open-mode=append", *options])


def request(site: Site | None, plan: Plan, artifact: Artifact) -> dict[str, int]:
    """What an artifact's job asks for: `gpu`, `mem_mb`, `disk_mb`, and `runtime` in minutes.

    site: None on this machine.
    """
    if site is None:
        estimate = estimates.request(plan, artifact)
        return estimate | {"gpu": min(estimate["gpu"], len(cards.present()))}
    own = site.stages.get(artifact.stage, Request())
    values = own.model_dump(exclude_none=True, exclude={"shard", "nodes"})
    processes = max(1, (own.gpu or 1) // own.nodes) if artifact.stage in TRAINERS else 1
    estimate = estimates.request(plan, artifact, processes)
    estimate["mem_mb"] += OVERHEAD
    estimate["runtime"] = min(estimate["runtime"], site.max_runtime or estimate["runtime"])
    exhausted = estimates.exhausted_mb(plan, artifact) if "mem_mb" in values else 0
    if exhausted and exhausted / values["mem_mb"] in (1, 2, 4, 8):  # just that was too little, or what it was raised to
        values["mem_mb"] = 2 * exhausted
    return estimate | ({"gpu": 0} if site.cpu_only else {}) | values


def pass_on_sigterm() -> None:
    """Pass SIGTERM on to the stage: SLURM sends it to a task's first process alone, which is Snakemake.

    Snakemake keeps its own handler; a thread learns of the signal beside it, and signals the whole process group once.
    """
    if "SLURM_STEP_ID" not in os.environ:  # not the process that runs the stage, but the one that submits it
        return
    received, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def listen() -> None:
        while signal.SIGTERM not in os.read(received, 64):
            pass
        os.killpg(0, signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()


def shell_prefix(site: Site) -> str:
    """What the shell of a job does before its stage: it ignores SIGTERM and loads modules.

    A shell or `tee` that died of SIGTERM would end the stage while it saves.
    """
    modules = " ".join(map(shlex.quote, site.modules))
    load = f"type module > /dev/null 2>&1 || . /etc/profile; module load {modules}; " if modules else ""
    return f"set -euo pipefail; trap '' TERM; {load}"
