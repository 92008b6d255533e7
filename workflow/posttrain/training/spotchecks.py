"""Keep a training's state at some places, with what the next steps came to, so that others can replay these steps.

posttrain spotcheck tiny/sft

The idea is that of proof of learning (Jia et al. 2021, arXiv 2103.05633): who has trained keeps states of the way, and
who doubts it repeats the steps that follow some of them.
"""

import hashlib
import itertools
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from posttrain.config.sections import Optimisation
from posttrain.ground.errors import Interrupted
from posttrain.ground.files import manifest_of, write_json

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "spotchecks"  # beside the checkpoints, and then of the artifact
MANIFEST = f"{FOLDER}/states.json"  # of what it holds; a `manifest.json` would be that of an artifact
ONE_OF = 200  # of so many steps one is replayed from a place: 0.5 % of a training, about 1 % with its start
FIGURES = ("step", "loss", "grad_norm", "learning_rate")  # of a trainer's step; what else it logs depends on time
# Files of a checkpoint that no replay reads. The first is a pickle, and names the machine and its folders.
UNREAD = ("training_args.bin", "README.md", "manifest.json")

wanted = 0  # places of a training at which its state is kept; set by the command line


class Stretch(NamedTuple):
    """Steps of a training: those after the step `after`, up to the step `last`."""

    after: int
    last: int


replayed: Stretch | None = None  # the stretch after which a replay ends; set by `tools/spotcheck`


def length(steps: int) -> int:
    """How many steps are replayed from a place of a training with so many steps."""
    return max(1, round(steps / ONE_OF))


def stretches(section: Optimisation) -> list[Stretch]:
    """The steps to replay later. The training is divided into as many equal parts as places are wanted; a place is
    drawn in each, by the training's seed. A replay ends before the training's last step, after which a stage measures
    and publishes."""
    from posttrain.training import parallel

    if replayed:
        return [replayed]
    end = section.steps - length(section.steps) - 1
    count = 0 if parallel.sharded else min(wanted, max(0, end))
    draws = random.Random(f"spotchecks {section.seed}")
    edges = [end * part // count for part in range(count + 1)] if count else []
    places = [draws.randint(start + 1, stop) for start, stop in itertools.pairwise(edges)]
    return [Stretch(place, place + length(section.steps)) for place in places]


def due(section: Optimisation, step: int) -> bool:
    """Whether a checkpoint is needed after a step, since its state is to be kept."""
    return any(stretch.after == step for stretch in stretches(section))


def keep(section: Optimisation, checkpoints: Path) -> None:
    """Keep the states of the places of which there is a complete checkpoint. Called when a training begins, as it may
    have been killed before it kept its newest checkpoint, and after each checkpoint; the main process keeps for all."""
    from posttrain.training import checkpoint, parallel

    whole = [folder for folder in checkpoint.all_in(checkpoints) if (folder / "manifest.json").is_file()]
    for folder in whole if parallel.main() and not replayed else ():
        step = checkpoint.step_of(folder)
        target = checkpoints / FOLDER / name_of(step)
        if due(section, step) and not target.is_dir():
            making = target.with_name(f".{target.name}")
            shutil.rmtree(making, ignore_errors=True)
            shutil.copytree(folder, making, copy_function=link_or_copy, ignore=shutil.ignore_patterns(*UNREAD))
            making.replace(target)


def ended(section: Optimisation, step: int) -> Stretch | None:
    """The stretch whose last step this is; None for any other step."""
    return next((stretch for stretch in stretches(section) if stretch.last == step), None)


def record(
    stretch: Stretch, checkpoints: Path, figures: Iterable[dict], weights: Iterable[tuple[str, "Tensor"]], optimizer
) -> None:
    """Write what a stretch came to, when it has ended: the figures of its steps, and the digests of the trained weights
    and of the optimizer's state.

    figures: of each step of the training so far, with its number as `step`. weights: by name.
    Raises Interrupted where a replay ends here.
    """
    from posttrain.training import parallel

    if parallel.main():
        steps = [figure for figure in figures if stretch.after < figure["step"] <= stretch.last]
        (checkpoints / FOLDER).mkdir(parents=True, exist_ok=True)
        digests = {"weights": digest(weights), "optimizer": digest(tensors(optimizer.state_dict()))}
        content = stretch._asdict() | {"steps": steps, "sha256": digests}
        write_json(file_of(checkpoints, stretch), content)
    if replayed:
        raise Interrupted(f"replayed the steps {stretch.after + 1} to {stretch.last}")


def logged(entries: Iterable[dict]) -> list[dict]:
    """The figures of each step, of a trainer's log."""
    return [{key: entry[key] for key in FIGURES if key in entry} for entry in entries if "loss" in entry]


def digest(weights: Iterable[tuple[str, "Tensor"]]) -> str:
    """sha256 of tensors: of each its name, type, shape and bytes, in the order of names."""
    import torch

    whole = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        whole.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        whole.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def tensors(state: dict, name: str = "") -> Iterator[tuple[str, "Tensor"]]:
    """The tensors in an optimizer's state, which may be that of several, by name."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from tensors(value, f"{name}{key}.")
        elif hasattr(value, "dtype"):
            yield f"{name}{key}", value


def name_of(step: int) -> str:
    """The name of the folder with the state after a step."""
    return f"{step:06d}"


def file_of(checkpoints: Path, stretch: Stretch) -> Path:
    """The file with what a stretch came to."""
    return checkpoints / FOLDER / f"{name_of(stretch.after)}.json"


def link_or_copy(source: str, target: str) -> None:
    """A second name for a file, which takes no space; a copy where the file system has none. No file of a checkpoint is
    written in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def publish(checkpoints: Path, work: Path) -> None:
    """Add what was kept to the files of an artifact, with a manifest. The checkpoints stay until it is in place."""
    source, target = checkpoints / FOLDER, work / FOLDER
    if places := complete(source):
        target.mkdir()
        for name in map(name_of, places):
            shutil.copytree(source / name, target / name, copy_function=link_or_copy)
            link_or_copy(str(source / f"{name}.json"), str(target / f"{name}.json"))
        write_json(work / MANIFEST, manifest_of(target, [part.name for part in target.iterdir()]))


def complete(folder: Path) -> list[int]:
    """The places, in order, of which a folder has both the state and what followed."""
    return sorted(int(file.stem) for file in folder.glob("[0-9]*.json") if file.with_suffix("").is_dir())
