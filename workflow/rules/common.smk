import hashlib
import os
import re
import sys
from pathlib import Path

from posttrain import campaign
from posttrain.errors import UserError
from posttrain.identity import canonical

# Neither `configfile:`, which would mix the default campaign into the one that --configfile names, nor `config`,
# which holds that file as YAML 1.1 has it (`on`, dates).
FILES = [*workflow.overwrite_configfiles] or ["config/config.yaml"]
try:
    if len(FILES) > 1:
        raise UserError(
            f"--configfile: found {' and '.join(map(str, FILES))}; name one campaign"
        )
    PLAN = campaign.load(FILES[0], dict(workflow.config_settings.config))
except UserError as mistakes:
    print(*mistakes.problems, sep="\n", file=sys.stderr)
    sys.exit(2)

# Jobs inherit the environment, and wandb reads its settings there by itself.
os.environ.update(
    WANDB_MODE=PLAN.campaign.wandb.mode, WANDB_PROJECT=PLAN.campaign.wandb.project
)


wildcard_constraints:
    experiment="|".join(map(re.escape, PLAN.experiments)),
    policy="[a-z]+",


def artifact(stage):
    """The manifest of the artifact that an experiment uses for a stage."""
    return lambda wildcards: f"{PLAN.folder(wildcards.experiment, stage)}/manifest.json"


def foundation(stage):
    """The manifest of the frozen weights that a stage's adapter rests on."""
    return (
        lambda wildcards: f"{PLAN.folder(wildcards.experiment, PLAN.foundation(wildcards.experiment, stage))}/manifest.json"
    )


def reward_model(wildcards):
    """The manifest of the reward model, where there is one."""
    learned = PLAN.has(wildcards.experiment, "reward")
    return artifact("reward")(wildcards) if learned else []


def ppo_reward(wildcards):
    """The manifest of the reward model that PPO learns from; none where a function written by hand rewards."""
    learned = PLAN.ppo_learns_from_model(wildcards.experiment)
    return artifact("reward")(wildcards) if learned else []


def sft_answers(wildcards):
    """The manifest of the SFT policy's own answers, for every other policy's comparison."""
    if wildcards.policy == "sft":
        return []
    return f"{PLAN.judgement(wildcards.experiment, 'compare', 'sft')}/manifest.json"


def fetched(stage):
    """The manifests of what a stage needs from the hub."""
    return lambda wildcards: PLAN.fetched(wildcards.experiment, stage)


def local_files(stage):
    """Local data, tokenizers, templates and models that a stage reads: changed, they rerun it."""
    return lambda wildcards: PLAN.local_files(wildcards.experiment, stage)


# The report is told of the campaign by a file under the name of its content, which a later edit cannot change.
CHOSEN = "" if FILES == ["config/config.yaml"] else str(FILES[0])
SUMMARY = canonical(PLAN.summary() | {"configfile": CHOSEN})
CAMPAIGN = (
    f".snakemake/campaigns/{hashlib.sha256(SUMMARY.encode()).hexdigest()[:16]}.json"
)
Path(CAMPAIGN).parent.mkdir(parents=True, exist_ok=True)
Path(f"{CAMPAIGN}.{os.getpid()}").write_text(SUMMARY)
Path(f"{CAMPAIGN}.{os.getpid()}").replace(CAMPAIGN)
