"""Checkpoints: the folders `checkpoint-STEP` from which an interrupted stage continues; the newest two are kept.

A checkpoint is valid when it has a manifest, which is written last and by rename, and its bytes match the manifest.
"""

import json
import shutil
from pathlib import Path

import torch

from posttrain.ground.errors import Unreadable, UserError
from posttrain.ground.files import manifest_of, permit, verify, write_json
from posttrain.ground.progress import say
from posttrain.training import parallel

KEPT = 2


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(folder.name.rpartition("-")[2])


def all_in(checkpoints: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    return sorted(checkpoints.glob("checkpoint-*"), key=step_of)


def seal(folder: Path) -> None:
    """Write a checkpoint's manifest, and delete all checkpoints but the newest two; the main process does both."""
    parallel.barrier()  # each process writes a part of the checkpoint
    if parallel.main():
        parts = [part.name for part in folder.iterdir() if part.name != "manifest.json"]
        permit(folder)  # another user of the group may continue the run
        write_json(folder / "manifest.json", manifest_of(folder, parts))
        for old in all_in(folder.parent)[:-KEPT]:
            shutil.rmtree(old)


def newest(checkpoints: Path) -> Path | None:
    """The newest valid checkpoint, or None. Newer ones, which are incomplete or damaged, are deleted.

    Raises Unreadable and OSError where the file system cannot read one now: it may be valid, so it is not deleted.
    """
    for folder in reversed(all_in(checkpoints)) if parallel.main() else ():
        try:
            verify(folder / "manifest.json")
            break
        except Unreadable:
            raise
        except UserError as error:
            say(f"deleting {folder.name}, which is incomplete or damaged: {error.problems[0]}")
            shutil.rmtree(folder)
    parallel.barrier()
    return max(all_in(checkpoints), key=step_of, default=None)


def write(folder: Path, tensors: dict, state: dict) -> None:
    """Write a checkpoint of PPO's training loop, in the main process.

    tensors: nested dicts of tensors and numbers; state: JSON values.
    """
    if parallel.main():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        torch.save(tensors, folder / "tensors.pt")
        write_json(folder / "state.json", state)
    seal(folder)


def read(checkpoints: Path) -> tuple[dict, dict] | None:
    """The newest valid checkpoint of `write`, as `(tensors, state)`, or None."""
    folder = newest(checkpoints)
    if folder is None:
        return None
    tensors = torch.load(folder / "tensors.pt", weights_only=True, map_location="cpu")
    return tensors, json.loads((folder / "state.json").read_text())
