"""The arguments of a stage's command, from what its artifact is made from."""

import shlex
from pathlib import Path


def arguments(params: list[str], inputs: dict) -> str:
    """`--config SECTION --code FINGERPRINT --lineage DIGEST --data MANIFEST ...`.

    params: the section, the fingerprint of the code, the lineage. inputs: files by role; the user's own files are named
    in the section.
    """
    section, code, lineage = params
    text = f"--config {shlex.quote(section)} --code {code} --lineage {lineage}"
    for role in sorted(inputs):
        if (files := flat({role: inputs[role]})) and role != "files":
            text += f" --{role} {' '.join(files)}"
    return text


def flat(inputs: dict) -> list:
    """All files of a stage's inputs."""
    return [file for files in inputs.values() for file in ([files] if isinstance(files, str | Path) else files)]
