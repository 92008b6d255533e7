"""Weights & Biases: stages write runs offline; only `sync` uploads them.

posttrain wandb-sync
"""

import os
import shutil
import subprocess
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.progress import say

FOLDER = Path("results/wandb")


def describe(experiment: str, stage: str, identity: str) -> None:
    """Set wandb's environment variables for a run. The run's id follows from the artifact's identity, so that a
    restarted job continues its run."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        WANDB_DIR=str(FOLDER),
        WANDB_CACHE_DIR=str(FOLDER / "cache"),
        WANDB_CONFIG_DIR=str(FOLDER / "config"),
        WANDB_DATA_DIR=str(FOLDER / "data"),
        WANDB_RUN_ID=f"{stage}-{identity}",
        WANDB_NAME=f"{experiment}/{stage}",
        WANDB_RUN_GROUP=experiment,
        WANDB_JOB_TYPE=stage,
        WANDB_RESUME="allow",
        WANDB_SILENT="true",
        WANDB_CONSOLE="off",
        WANDB_DISABLE_GIT="true",
        WANDB_DISABLE_CODE="true",
    )


def log(numbers: dict[str, float], step: int) -> None:
    """Log the numbers of a step of PPO's loop, where wandb is on; trainers log to wandb themselves."""
    if os.environ.get("WANDB_MODE", "disabled") == "offline":
        import wandb

        run = wandb.run or wandb.init(id=os.environ["WANDB_RUN_ID"], name=os.environ["WANDB_NAME"])
        run.log({f"train/{key}": value for key, value in numbers.items()}, step=step)


def sync() -> None:
    """Upload every offline run, oldest first. Raises UserError where there is none."""
    runs = sorted((FOLDER / "wandb").glob("offline-run-*"))
    if not runs:
        raise UserError(f"{FOLDER}: no offline runs; set `wandb: {{mode: offline}}` in the campaign")
    say(f"uploading {len(runs)} runs")
    done = subprocess.run([shutil.which("wandb") or "wandb", "sync", *map(str, runs)])
    if done.returncode:
        raise UserError("wandb sync failed; see its message above (is WANDB_API_KEY set?)")
