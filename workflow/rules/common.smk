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
from posttrain.engine import controller, records, versions
from posttrain.ground import credentials
from posttrain.ground.code import remember
from posttrain.ground.errors import UserError
from posttrain.ground.identity import canonical, named, write_named
from posttrain.reporting.summary import last_lines, outdated
from posttrain.tools import budget, status, why

# Planning makes no garbage to speak of: to look for it is a fifth of the time of a large plan. `onstart` turns it on again.
gc.disable()

# Neither `configfile:`, which would mix the default campaign into the one that --configfile names, nor `config`,
# which holds that file as YAML 1.1 has it (`on`, dates).
FILES = [*workflow.overwrite_configfiles] or [campaign.DEFAULT]
FROZEN = "POSTTRAIN_CAMPAIGN"  # names the file that holds the plan of the run that a job belongs to
try:
    SITE = sites.enter(workflow)
    if workflow.is_main_process:
        versions.check(on_slurm=SITE is not None)
        controller.take_over(SITE is not None, sys.argv)
    if len(FILES) > 1:
        raise UserError(
            f"--configfile: found {' and '.join(map(str, FILES))}; name one campaign"
        )
    if workflow.is_main_process:
        PLAN = campaign.load(FILES[0], dict(workflow.config_settings.config))
        if SITE and SITE.gpu_memory_gb:
            gpus = {name: asked.gpu or 1 for name, asked in SITE.stages.items()}
            sharded = {name for name, asked in SITE.stages.items() if asked.shard}
            budget.refuse_too_large(
                PLAN, SITE.gpu_memory_gb, gpus=gpus, sharded=sharded
            )
    elif (
        FROZEN in os.environ
    ):  # a job on a cluster, which may start long after the config was edited
        PLAN = thaw(Path(os.environ[FROZEN]).read_text(encoding="utf-8"))
    else:
        raise UserError(f"{FROZEN} is not set: a job needs the environment of its run")
except UserError as mistakes:
    print(*mistakes.problems, sep="\n", file=sys.stderr)
    sys.exit(2)

# Jobs inherit the environment: what must not change a result. wandb reads its settings there by itself.
os.environ.update(
    WANDB_MODE=PLAN.campaign.wandb.mode,
    WANDB_PROJECT=PLAN.campaign.wandb.project,
    POSTTRAIN_KEEP_GB=str(PLAN.campaign.keep_gb),
)
# The report is told of the campaign by a file under the name of its content, which a later edit cannot change.
SUMMARY = canonical(summary(PLAN))
CAMPAIGN = named(SUMMARY)
LINEAGE = PLAN.lineage("", "report")
if workflow.is_main_process:
    credentials.hide()
    remember()
    records.sync(PLAN.folders())
elif SITE:
    shell.prefix(sites.shell_prefix(SITE))
    sites.pass_on_sigterm()


wildcard_constraints:
    experiment=PLAN.pattern(),
    policy="[a-z]+",


def inputs(stage):
    """What a stage is built on: the manifests of its inputs, and the user's own files that it reads."""
    return lambda wildcards: flat(PLAN.inputs(*artifact(wildcards, stage)))


def arguments(stage):
    """All that a stage depends on and all that it reads, as its command takes it: `--config SECTION --code ...`."""
    return lambda wildcards: PLAN.arguments(*artifact(wildcards, stage))


def artifact(wildcards, stage):
    """The artifact that a job makes."""
    return Artifact(wildcards.experiment, stage, wildcards.get("policy", ""))


@cache
def requested(made):
    """All that an artifact's job asks for."""
    return sites.request(SITE, PLAN, made)


def need(stage, what):
    """How much of a resource a stage asks for: `gpu`, `mem_mb`, `disk_mb`, or `runtime` in minutes."""
    return lambda wildcards: requested(artifact(wildcards, stage))[what]
