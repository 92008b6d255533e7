"""A copy of the project as a clone would have it, and its commands as a person types them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def copy_of(root: Path, folder: Path) -> Path:
    """The project's files as a clone would have them, edits included."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    for name in listed.stdout.split("\n"):
        if name and (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)
    return folder


def environment(**more: str) -> dict[str, str]:
    """The environment of these tests, active. A copy of the project uses its own package, as with one of its own."""
    own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": "workflow"}
    return os.environ | own | more


def snakemake(project: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    """`snakemake` as a person types it, with the environment of these tests active."""
    return subprocess.run(
        ["snakemake", *arguments], cwd=project, capture_output=True, text=True, env=environment(**more)
    )


def commit_of(folder: Path) -> str:
    """Make a folder a repository with one commit; returns that."""
    who = ["-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()
