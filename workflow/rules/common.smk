import gc
import os
import sys
from functools import cache
from pathlib import Path

from posttrain.cluster import sites
from posttrain.config.stages import STAGES
from posttrain.dag import campaign
from posttrain.dag.artifacts import Artifact
from posttrain.dag.artifacts import flat
from posttrain.dag.frozen import freeze, summary, thaw
from posttrain.engine import (
    command,
    controller,
    environment,
    hooks,
    records,
    versions,
)
from posttrain.ground import credentials
from posttrain.ground.code import let_jobs_import, refuse_other_package, remember
from posttrain.ground.errors import UserError
from posttrain.ground.identity import canonical, named, write_named
from posttrain.ground.progress import print_any_text
from posttrain.jobs import kept, slurm
from posttrain.reporting.summary import last_lines, last_lines_of_run, outdated
from posttrain.resources.threads import threads
from posttrain.tools import budget, ledger, status, why

# Garbage collection would take a fifth of the time of a large plan and free almost nothing. `onstart` enables it again.
gc.disable()
print_any_text()

FROZEN = "POSTTRAIN_CAMPAIGN"  # environment variable with the file that holds the plan of a job's run
try:
    versions.check_snakemake()
    # `configfile:` is not used: it would merge the default campaign into that of --configfile. Nor is `config`, which
    # is read as YAML 1.1 (`on`, dates).
    FILES = [*workflow.overwrite_configfiles] or [campaign.DEFAULT]
    HERE = Path(workflow.current_basedir).parent
    let_jobs_import(HERE)
    hooks.run_in_modules(workflow)
    refuse_other_package(HERE)
    deployed = workflow.deployment_settings.deployment_method  # with --sdm
    POSTTRAIN = "python -m posttrain" if deployed else "posttrain"
    SITE = sites.enter(workflow)
    if workflow.is_main_process:
        controller.refuse_reader()
        controller.take_over(SITE is not None, sys.argv)
    CONDA = environment.conda_environment(HERE.parent / "envs")
    if len(FILES) > 1:
        raise UserError(
            f"--configfile: found {' and '.join(map(str, FILES))}; name one campaign"
        )
    if workflow.is_main_process:
        OVERRIDES = command.overrides(sys.argv, dict(workflow.config_settings.config))
        PLAN = campaign.load(FILES[0], OVERRIDES)
        PLAN.verifying = command.is_target(sys.argv, "verify")
        LOOKING = controller.is_read_only(sys.argv)
        LACKS = "" if LOOKING else ledger.keep_up(PLAN, overridden=bool(OVERRIDES))
        if SITE and SITE.gpu_memory_gb:
            gpus = {name: request.gpu or 1 for name, request in SITE.stages.items()}
            sharded = {name for name, request in SITE.stages.items() if request.shard}
            budget.refuse_too_large(
                PLAN, SITE.gpu_memory_gb, gpus=gpus, sharded=sharded
            )
        if "DVC_STAGE" in os.environ and not LOOKING:
            records.verify(PLAN.folders())
        records.sync(PLAN.folders(), LOOKING)
    elif (
        FROZEN in os.environ
    ):  # a job on a cluster, which may start long after the config was edited
        PLAN = thaw(Path(os.environ[FROZEN]).read_text(encoding="utf-8"))
    else:
        raise UserError(f"{FROZEN} is not set; a job needs the environment of its run")
except UserError as mistakes:
    print(*mistakes.problems, sep="\n", file=sys.stderr)
    sys.exit(2)

# Jobs inherit these variables, which do not change a result. wandb reads its own.
os.environ.update(
    WANDB_MODE=PLAN.campaign.wandb.mode,
    WANDB_PROJECT=PLAN.campaign.wandb.project,
    POSTTRAIN_KEEP_GB=str(PLAN.campaign.keep_gb),
    POSTTRAIN_SPOTCHECKS=str(PLAN.campaign.spotchecks),
)
# The report reads the campaign from a file named by its content, which a later edit does not change.
SUMMARY = canonical(summary(PLAN))
CAMPAIGN = named(SUMMARY)
LINEAGE = PLAN.lineage("", "report")
if workflow.is_main_process:
    credentials.hide()
    remember()
elif SITE:
    shell.prefix(sites.shell_prefix(SITE))
    slurm.pass_on_sigterm()


wildcard_constraints:
    experiment=PLAN.pattern(),
    policy="[a-z]+",


def inputs(stage):
    """The input files of a stage: manifests, and the user's own files."""
    return lambda wildcards: flat(PLAN.inputs(*artifact(wildcards, stage)))


def arguments(stage):
    """The arguments of a stage's command, which cover all that it depends on: `--config SECTION --code ...`."""
    return lambda wildcards: PLAN.arguments(*artifact(wildcards, stage))


def artifact(wildcards, stage):
    """The artifact that a job makes."""
    return Artifact(wildcards.experiment, stage, wildcards.get("policy", ""))


@cache
def job_resources(target):
    """The resources that the job of an artifact requests."""
    return sites.request(SITE, PLAN, target)


def wanted_threads(stage):
    """The threads that a stage's job gets, where Snakemake has as many."""
    return lambda wildcards: threads(PLAN, artifact(wildcards, stage))


def need(stage, what):
    """The amount of one resource: `gpu`, `mem_mb`, `disk_mb`, `runtime` in minutes, or rows at once (`batch_size`)."""
    return lambda wildcards: job_resources(artifact(wildcards, stage))[what]
