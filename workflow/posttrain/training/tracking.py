"""Weights & Biases: stages write runs offline, and only `sync` sends them.

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
    """Tell wandb, which reads its environment, what run this is. The id follows from what is run, so that a
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
    """A step's numbers of a loop of our own, where the campaign wants them; trainers speak to wandb themselves."""
    if os.environ.get("WANDB_MODE", "disabled") == "offline":
        import wandb

        run = wandb.run or wandb.init(id=os.environ["WANDB_RUN_ID"], name=os.environ["WANDB_NAME"])
        run.log({f"train/{key}": value for key, value in numbers.items()}, step=step)


def sync() -> None:
    """Send every offline run, oldest first. Raises UserError when there is none."""
    runs = sorted((FOLDER / "wandb").glob("offline-run-*"))
    if not runs:
        raise UserError(f"{FOLDER}: no offline runs; set `wandb: {{mode: offline}}` in the campaign")
    say(f"sending {len(runs)} runs")
    done = subprocess.run([shutil.which("wandb") or "wandb", "sync", *map(str, runs)])
    if done.returncode:
        raise UserError("wandb sync failed; see its message above (is WANDB_API_KEY set?)")
