"""The site's settings on a compute node: container, folder for checkpoints, GPUs and nodes of each stage.

`cluster.sites` writes them into the environment of every job of `snakemake --profile slurm`.
"""

import json
import os
import sys
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.jobs.slurm import SITE


def site() -> dict:
    """The site's settings (`cluster.sites.Site`); empty outside of such a job."""
    return json.loads(os.environ.get(SITE, "{}"))


def request(stage: str) -> dict:
    """The site's own request for a stage (`cluster.sites.Request`); empty where it has none."""
    return site().get("stages", {}).get(stage, {})


def scratch(text: str | None) -> Path | None:
    """The site's folder for checkpoints, with ~ and variables filled in. Raises UserError where it is not absolute."""
    if text is None:
        return None
    folder = os.path.expandvars(os.path.expanduser(text))
    if "$" in folder or not os.path.isabs(folder):
        raise UserError(f"{text!r} is {folder!r}: give a folder from / on, with variables that are set")
    return Path(folder)


def python(container: str | None, folder: str | None) -> list[str]:
    """The command that starts Python on a node, in the site's container where it has one. folder: scratch to bind."""
    if container is None:
        return [sys.executable]
    return ["apptainer", "exec", "--nv", *(["--bind", str(scratch(folder))] if folder else []), container, "python"]
