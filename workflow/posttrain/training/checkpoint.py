"""Checkpoints: the folders `checkpoint-STEP` that an interrupted stage continues from, the newest two of them.

One counts when its manifest is in it, which is written last and by rename, and only as long as its bytes are those that
the manifest says.
"""

import json
import shutil
from pathlib import Path

import torch

from posttrain.ground.errors import Unreadable, UserError
from posttrain.ground.files import manifest_of, verify, write_json
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
    """Mark a checkpoint as whole by its manifest, and delete all but the newest two; the main process does both."""
    parallel.barrier()  # each of several processes writes a part of its own
    if parallel.main():
        parts = [part.name for part in folder.iterdir() if part.name != "manifest.json"]
        write_json(folder / "manifest.json", manifest_of(folder, parts))
        for old in all_in(folder.parent)[:-KEPT]:
            shutil.rmtree(old)


def newest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none. Newer ones are deleted: half written, or damaged since.

    Raises Unreadable and OSError where the file system does not give its bytes now: it may be whole, so it is kept.
    """
    for folder in reversed(all_in(checkpoints)) if parallel.main() else ():
        try:
            verify(folder / "manifest.json")
            break
        except Unreadable:
            raise
        except UserError as error:
            say(f"{folder.name} is not whole and deleted: {error.problems[0]}")
            shutil.rmtree(folder)
    parallel.barrier()
    return max(all_in(checkpoints), key=step_of, default=None)


def write(folder: Path, tensors: dict, state: dict) -> None:
    """Write a checkpoint of a training loop that is not a trainer's (PPO's), in the main process.

    tensors: nested dicts of tensors and numbers; state: what JSON holds.
    """
    if parallel.main():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        torch.save(tensors, folder / "tensors.pt")
        write_json(folder / "state.json", state)
    seal(folder)


def read(checkpoints: Path) -> tuple[dict, dict] | None:
    """The newest whole checkpoint that `write` wrote, as `(tensors, state)`; None where there is none."""
    folder = newest(checkpoints)
    if folder is None:
        return None
    tensors = torch.load(folder / "tensors.pt", weights_only=True, map_location="cpu")
    return tensors, json.loads((folder / "state.json").read_text())
