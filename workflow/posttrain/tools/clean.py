"""List or delete what no campaign needs under results/: unused artifacts, abandoned checkpoints, kept artifacts.

posttrain clean [--delete]
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from posttrain.dag.campaign import load
from posttrain.dag.plan import RESERVED, Plan
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_object
from posttrain.ground.identity import named
from posttrain.jobs import kept

ALIVE = 3600  # seconds without a change after which a folder counts as unused by any process


def clean_campaigns(campaigns: list[Path], delete: bool) -> str:
    """What no campaign needs; campaigns: empty for `campaigns_here`. Raises UserError where there is none."""
    files = campaigns or campaigns_here()
    if not files:
        raise UserError("clean: there is no campaign in config/; name the campaigns whose artifacts to keep")
    return f"kept: the artifacts of {', '.join(map(str, files))}\n{clean([load(file) for file in files], delete)}"


def campaigns_here() -> list[Path]:
    """The campaigns in `config`, and those elsewhere that ran in this folder."""
    plans = map(read_object, Path(named("")).parent.glob("*.json"))
    ran = [Path(plan["configfile"]) for plan in plans if plan.get("configfile")]
    return sorted({*Path("config").glob("*.yaml"), *(file for file in ran if file.is_file())})


def clean(plans: list[Plan], delete: bool = False) -> str:
    """A line with the size of each folder that is not needed; deletes these folders where `delete` is set."""
    needed = {Path(folder) for plan in plans for folder in plan.folders()}
    unneeded = [*orphans(needed), *checkpoints(needed)]
    unneeded += [(folder, "earlier artifact, kept for reuse") for folder in kept.sizes()]
    if not unneeded:
        return "Nothing to clean."
    sizes = [size(folder) / 1e6 for folder, _ in unneeded]
    lines = [f"{mb:10.1f} MB  {folder}  ({why})" for mb, (folder, why) in zip(sizes, unneeded, strict=True)]
    if not delete:
        return "\n".join(
            [*lines, f"{sum(sizes):10.1f} MB in all; nothing was deleted: posttrain clean --delete does it"]
        )
    for folder, _ in unneeded:
        shutil.rmtree(folder, ignore_errors=True)
    return "\n".join([*lines, "deleted"])


def size(folder: Path) -> int:
    """Bytes that deleting a folder frees: a file with a second hard link frees none."""
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(file.st_size for file in files if file.st_nlink == 1 or not folder.is_relative_to(kept.KEPT))


def orphans(needed: set[Path]) -> Iterator[tuple[Path, str]]:
    """Finished artifacts that no campaign uses."""
    for manifest in sorted(Path("results").glob("**/manifest.json")):
        folder = manifest.parent
        hidden = any(part.startswith(".") for part in folder.parts)
        ours = (folder / "provenance.json").is_file() and folder.parts[1] not in RESERVED
        if ours and not hidden and folder not in needed:
            yield folder, "no campaign uses it"


def checkpoints(needed: set[Path]) -> Iterator[tuple[Path, str]]:
    """Checkpoints and incomplete artifacts from which no run will continue."""
    for folder in sorted(Path("results").glob("**/checkpoints/*")):
        home = folder.parents[1]
        if in_use(folder):
            continue
        if home not in needed:
            yield folder, "checkpoints of an artifact that no campaign uses"
        elif (home / "manifest.json").is_file():
            yield folder, "checkpoints of other settings than the finished artifact's"
    for folder in sorted(Path("results").glob("**/.making-*")):
        if not in_use(folder):
            yield folder, "left by a run that was killed"


def in_use(folder: Path) -> bool:
    """Whether a process may be writing into a folder."""
    return time.time() - max(file.stat().st_mtime for file in [folder, *folder.rglob("*")]) < ALIVE
