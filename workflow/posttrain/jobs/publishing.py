"""Move the finished files of a stage to their place: an artifact is complete or not there at all."""

import os
import shutil
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import permit
from posttrain.ground.identity import DAMAGED

FOLDERS = ("data", "model", "snapshots", "spotchecks")  # of an artifact


def refuse_foreign_folders(output: Path) -> None:
    """Raise UserError unless `output` is a manifest.json and publishing replaces no folder of the user's."""
    if output.name != "manifest.json":
        raise UserError(f"--output {output}: must be called manifest.json, in the folder for the artifact")
    ours = any(any(output.parent.glob(sign)) for sign in ("manifest.json", "provenance.json", ".making-*"))
    for folder in (output.parent / part for part in FOLDERS):
        if folder.exists() and not ours:
            raise UserError(f"--output {output}: {folder} is no artifact and would be replaced; name another folder")


def publish(work: Path, home: Path) -> list[str]:
    """Move the contents of `work` to `home`, the manifest last. Returns the names.

    A link in the place of a folder is replaced; what it links to stays. A folder that the new artifact lacks is
    deleted.
    """
    permit(work)
    parts = sorted(part.name for part in work.iterdir() if not part.name.startswith("."))
    for part in [*(folder for folder in FOLDERS if folder not in parts), *sorted(parts, key="manifest.json".__eq__)]:
        target = home / part
        if target.is_symlink():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        if part in parts:
            os.replace(work / part, target)
    shutil.rmtree(work)
    (home / DAMAGED).unlink(missing_ok=True)
    return parts
