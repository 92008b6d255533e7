"""The threads that a stage's job asks for, and the bytes of the data files that it reads."""

from posttrain.config.sections import SOURCES
from posttrain.config.sources import own_files
from posttrain.config.stages import STAGES
from posttrain.dag.artifacts import Artifact
from posttrain.dag.plan import Plan

EACH = 16e6  # bytes of data files for each thread of `prepare`: minutes of work
MOST = 4


def threads(plan: Plan, artifact: Artifact) -> int:
    """Those of the table; where any number makes the same artifact, as many as the files are worth that the section
    names, and MOST with a data set from the hub."""
    stage, section = STAGES[artifact.stage], getattr(plan.experiments[artifact.experiment], artifact.stage)
    if not stage.any_threads:
        return stage.threads
    if any(source.dataset for kind in SOURCES for source in getattr(section, kind)):
        return MOST
    return min(MOST, 1 + int(bytes_of_files(plan, artifact) // EACH))


def bytes_of_files(plan: Plan, artifact: Artifact) -> int:
    """Bytes of the user's own files that a stage reads; without those that are not there, and the hub's."""
    section = getattr(plan.experiments[artifact.experiment], artifact.stage)
    return sum(file.stat().st_size for _, file in own_files(artifact.stage, section) if file.is_file())
