"""The threads that a stage's job asks for."""

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
    files = [file for _, file in own_files(artifact.stage, section) if file.is_file()]
    return min(MOST, 1 + int(sum(file.stat().st_size for file in files) // EACH))
