"""The parameters with which an artifact is planned: the code of its stage, and the arguments of its command."""

import shlex
from pathlib import Path

from posttrain.config.stages import STAGES
from posttrain.dag.artifacts import flat
from posttrain.ground.accepted import standing
from posttrain.ground.errors import UserError
from posttrain.ground.files import sha256

LOCK = Path("envs/requirements.txt")


def planned_code(strict: bool) -> dict[str, str]:
    """Stage -> fingerprint that its code counts as, with that of the pinned versions appended where `strict`."""
    if strict and not LOCK.is_file():
        raise UserError(f"strict: there is no {LOCK}, whose versions it counts")
    lock = f"+{sha256(LOCK)[:8]}" if strict else ""
    return {stage: standing(stage) + lock for stage in [*STAGES, "report"]}


def arguments(stage: str, params: list[str], inputs: dict) -> str:
    """A stage's command: `STAGE --threads 1 --config SECTION --code FINGERPRINT --lineage DIGEST --data MANIFEST ...`,
    without threads where any number of them makes the same artifact.

    params: the section, the fingerprint of the code, the lineage. inputs: files by role; those of the role `files` are
    left out, since the section names them.
    """
    section, code, lineage = params
    threads = "" if STAGES[stage].any_threads else f" --threads {STAGES[stage].threads}"
    text = f"{stage}{threads} --config {shlex.quote(section)} --code {code} --lineage {lineage}"
    for role in sorted(inputs):
        if (files := flat({role: inputs[role]})) and role != "files":
            text += f" --{role} {' '.join(files)}"
    return text
