"""What this SLURM site needs to be told, from `slurm/site.yaml`, as `slurm/profile.yaml` reads it.

snakemake --profile slurm
"""

import os
import re
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

from pydantic import Field

from posttrain.cluster import states
from posttrain.config import reader
from posttrain.config.sections import Count, Section, Text
from posttrain.config.stages import SHARDED, STAGES, TRAINERS
from posttrain.dag import campaign
from posttrain.engine import executor
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say
from posttrain.jobs import attempt, cards, slurm
from posttrain.resources import estimates

FILE = Path("slurm/site.yaml")
TOLD = "POSTTRAIN_SITE"  # the site as it was when a run began, for its jobs
AROUND = 400  # MB that a job needs beside its stage: Snakemake's executor runs itself twice in it
Megabytes = Annotated[int, Field(ge=100)]


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
    """Share the weights out among its GPUs (FSDP), where one GPU cannot hold them: `sft` and `dpo`."""


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


def site(file: Path = FILE) -> Site:
    """The site's settings; the defaults where there is no file. Raises UserError that names every mistake."""
    if not file.is_file():
        return Site()
    values, problems = reader.read(file), []
    made = campaign.validated(Site, values, values.places, problems)
    known = [*STAGES, "fetch", "report"]
    asked = values["stages"] if isinstance(values.get("stages"), dict) else {}
    problems += [
        f"{values.places[f'stages.{stage}']}: stages.{stage}: no such stage; known: {', '.join(known)}"
        for stage in asked
        if stage not in known
    ]
    if made and made.gpu_type and not re.fullmatch(r"[A-Za-z0-9_.]+", made.gpu_type):
        problems.append(
            f"{values.places['gpu_type']}: gpu_type: Snakemake's SLURM plugin takes letters, digits, _ and . alone, "
            f"not {made.gpu_type!r}: leave it out, and choose by partition or constraint"
        )
    try:
        attempt.scratch(made.scratch if made else None)
    except UserError as error:
        problems.append(f"{values.places['scratch']}: scratch: {error}")
    for stage, request in (made.stages if made else {}).items():
        at = {key: f"{values.places.get(f'stages.{stage}.{key}')}: stages.{stage}.{key}" for key in ("shard", "nodes")}
        if request.shard and stage not in SHARDED:
            problems.append(f"{at['shard']}: only {' and '.join(SHARDED)} can")
        if request.nodes > 1 and stage not in TRAINERS:
            problems.append(f"{at['nodes']}: only {', '.join(TRAINERS)} can share work out among nodes")
        elif request.nodes > 1 and ((request.gpu or 0) < request.nodes or request.gpu % request.nodes):
            problems.append(
                f"{at['nodes']}: {request.nodes} nodes cannot have as many of {request.gpu or 0} GPUs each; "
                f"set stages.{stage}.gpu to a multiple of {request.nodes}"
            )
    if problems:
        raise UserError(*problems)
    return made


def profile(works: bool) -> Site:
    """`site`, for the profile: a mistake is told in words and ends Snakemake. SLURM is asked next what remembers jobs,
    and how long a partition lets one run: one that asks for more time waits for ever. So this waits until it answers.

    works: whether Snakemake will run jobs, and does not only look.
    """
    try:
        found = site()
        if works:
            slurm.wait("nothing is planned until it does")
        return found
    except UserError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
    except KeyboardInterrupt:
        say("interrupted; nothing was started")
    sys.exit(2)


def begin(workflow) -> Site | None:
    """The site whose jobs a Snakemake starts, or, in a job of its, the site it was started for; None on this machine.

    workflow: Snakemake's. Locally, GPUs are counted, so that no two stages share one unless told to.
    """
    if not workflow.is_main_process:
        return current()
    os.environ.pop(TOLD, None)
    if workflow.resource_settings.nodes is None:
        if "gpu" not in workflow.global_resources:
            workflow.register_resource("gpu", len(cards.present()))
        return None
    for name in [name for name in os.environ if name.startswith("SQUEUE_") or name in ("SBATCH_WAIT", "SBATCH_SIGNAL")]:
        del os.environ[name]  # the user's own, which would hide jobs, or end them
    found = limited(site())
    os.environ[TOLD] = found.model_dump_json(exclude_none=True)
    expect_device(found)
    executor.report_states(states.settle)
    executor.submit_when_slurm_answers()
    return found


def limited(found: Site) -> Site:
    """A site with its partition's time limit: SLURM lets a job over it wait for ever."""
    limit = found.max_runtime or slurm.longest(found.partition)
    return found.model_copy(update={"max_runtime": limit}) if limit else found


def expect_device(found: Site) -> None:
    """Let requests be those of the site's compute nodes, whatever this one has."""
    os.environ["POSTTRAIN_DEVICE"] = "cpu" if found.cpu_only else "gpu"


def current() -> Site | None:
    """The site that this process is a job of; None outside of one."""
    return Site.model_validate_json(os.environ[TOLD]) if TOLD in os.environ else None


def resources(found: Site) -> dict[str, int | str]:
    """Snakemake's resources of every job at this site, by the executor plugin's names."""
    named = {
        "slurm_partition": found.partition,
        "slurm_account": found.account,
        "qos": found.qos,
        "constraint": found.constraint,
        "gpu_model": found.gpu_type,
        "nodes": 1,  # all GPUs of a job in one place, unless its stage is spread
        "slurm_extra": extra(),
    }
    # Snakemake reads a text as Python: `all`, 12_34 and what has a hyphen would be something else.
    return {key: repr(value) if isinstance(value, str) else value for key, value in named.items() if value}


def spread(found: Site) -> dict[str, dict[str, int | str]]:
    """Stage -> Snakemake's resources of one with several GPUs: two cores for each, and its nodes.

    `gpu` is what the executor plugin asks of SLURM for the whole job, `gpus` what it gives Snakemake on the first node.
    """
    several = {}
    for stage, asked in found.stages.items():
        if stage in TRAINERS and (asked.gpu or 0) > 1:
            each = asked.gpu // asked.nodes
            several[stage] = {"cpus_per_task": 2 * each}
            if asked.nodes > 1:
                evenly = f"--gpus-per-node={found.gpu_type + ':' if found.gpu_type else ''}{each}"
                several[stage] |= {"nodes": asked.nodes, "gpus": each, "slurm_extra": repr(extra(evenly))}
    return several


def extra(*options: str) -> str:
    """Options of sbatch, for the executor plugin; the log of a job that is run again keeps what came before."""
    return " ".join(["--open-mode=append", *options])


def request(found: Site | None, plan, experiment: str, stage: str, policy: str = "") -> dict[str, int]:
    """What a stage asks for: `gpu`, `mem_mb`, `disk_mb`, and `runtime` in minutes. found: None on this machine."""
    if found is None:
        estimate = estimates.request(plan, experiment, stage, policy)
        return estimate | {"gpu": min(estimate["gpu"], len(cards.present()))}
    own = found.stages.get(stage, Request())
    asked = own.model_dump(exclude_none=True, exclude={"shard", "nodes"})
    processes = max(1, (own.gpu or 1) // own.nodes) if stage in TRAINERS else 1
    estimate = estimates.request(plan, experiment, stage, policy, processes)
    estimate["mem_mb"] += AROUND
    estimate["runtime"] = min(estimate["runtime"], found.max_runtime or estimate["runtime"])
    out = estimates.ran_out(plan, experiment, stage, policy) if "mem_mb" in asked else 0
    if out and out / asked["mem_mb"] in (1, 2, 4, 8):  # a run was out of just that, or of what it was raised to
        asked["mem_mb"] = 2 * out
    return estimate | ({"gpu": 0} if found.cpu_only else {}) | asked


def pass_on_sigterm() -> None:
    """Let the stage hear of a SIGTERM that SLURM sends to a task's first process alone, which is Snakemake.

    It keeps its own handler; a thread learns of the signal beside it, and tells the whole process group once.
    """
    if "SLURM_STEP_ID" not in os.environ:  # not the process that runs the stage, but the one that submits it
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def listen() -> None:
        while signal.SIGTERM not in os.read(heard, 64):
            pass
        os.killpg(0, signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()


def prefix(found: Site) -> str:
    """What the shell of a job does before its stage: it leaves SIGTERM to the stage, and loads modules.

    A shell or `tee` that died of it would take the stage along in the middle of saving.
    """
    modules = " ".join(map(shlex.quote, found.modules))
    load = f"type module > /dev/null 2>&1 || . /etc/profile; module load {modules}; " if modules else ""
    return f"set -euo pipefail; trap '' TERM; {load}"
