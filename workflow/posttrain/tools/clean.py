"""What lies under results/ that no campaign needs: orphaned artifacts, abandoned checkpoints, earlier artifacts.

posttrain clean [--delete]
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from posttrain.dag.plan import RESERVED, Plan
from posttrain.jobs import kept

ALIVE = 3600  # seconds without a change after which nothing writes there any more


def clean(plans: list[Plan], delete: bool = False) -> str:
    """A line for each thing that is not needed, with its size; deletes them only when told."""
    used = {Path(folder) for plan in plans for folder in plan.folders()}
    found = [*orphans(used), *checkpoints(used), *earlier()]
    lines = [f"{size(folder) / 1e6:10.1f} MB  {folder}  ({what})" for folder, what in found]
    if delete:
        for folder, _ in found:
            shutil.rmtree(folder, ignore_errors=True)
    sum_ = sum(size(folder) for folder, _ in found) / 1e6 if not delete else None
    if not lines:
        return "Nothing to clean."
    last = "deleted" if delete else f"{sum_:10.1f} MB in all; nothing was deleted: posttrain clean --delete does it"
    return "\n".join([*lines, last])


def size(folder: Path) -> int:
    """Bytes that would be free again: files that have no second name elsewhere."""
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(file.st_size for file in files if file.st_nlink == 1 or not folder.is_relative_to(kept.KEPT))


def orphans(used: set[Path]) -> Iterator[tuple[Path, str]]:
    """Finished artifacts that no campaign uses."""
    for manifest in sorted(Path("results").glob("**/manifest.json")):
        folder = manifest.parent
        hidden = any(part.startswith(".") for part in folder.parts)
        ours = (folder / "provenance.json").is_file() and folder.parts[1] not in RESERVED
        if ours and not hidden and folder not in used:
            yield folder, "no campaign uses it"


def checkpoints(used: set[Path]) -> Iterator[tuple[Path, str]]:
    """Checkpoints and half-made artifacts that no run will continue from."""
    for folder in sorted(Path("results").glob("**/checkpoints/*")):
        home = folder.parents[1]
        if still(folder):
            continue
        if home not in used:
            yield folder, "checkpoints of an artifact that no campaign uses"
        elif (home / "manifest.json").is_file():
            yield folder, "checkpoints of other settings than the finished artifact's"
    for folder in sorted(Path("results").glob("**/.making-*")):
        if not still(folder):
            yield folder, "left by a run that was killed"


def still(folder: Path) -> bool:
    """Whether something may be writing there."""
    return time.time() - max(file.stat().st_mtime for file in [folder, *folder.rglob("*")]) < ALIVE


def earlier() -> Iterator[tuple[Path, str]]:
    """Earlier artifacts that are kept in case that a stage comes to the same settings again."""
    for folder in kept.sizes():
        yield folder, "earlier artifact, kept for another time"
