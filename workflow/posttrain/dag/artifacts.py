"""The name of an artifact, and the folders, files and words that follow from it."""

from pathlib import Path
from typing import NamedTuple


class Artifact(NamedTuple):
    """What one run of a stage makes: for an experiment, and where the stage judges, for one of its policies."""

    experiment: str
    stage: str
    policy: str = ""

    @property
    def name(self) -> str:
        """As a person writes it: `tiny/sft`, `tiny/evaluate/ppo`, `report`."""
        return "/".join(filter(None, self))

    @property
    def folder(self) -> str:
        """Where it lies."""
        return f"results/{self.name}"

    @property
    def manifest(self) -> str:
        """The file that lists its bytes, last to be written; the edge of the DAG."""
        return f"{self.folder}/manifest.json"

    @property
    def log(self) -> Path:
        """Where its stage reports."""
        return Path(f"results/logs/{self.name}.log")

    @property
    def exists(self) -> bool:
        """Whether a whole one lies in its folder."""
        return Path(self.manifest).is_file()


REPORT = Artifact("", "report")


def at(folder: str | Path) -> Artifact:
    """The artifact that lies in a folder, or whose file is named: `results/tiny/evaluate/ppo[/manifest.json]`."""
    parts = Path(folder).parts
    parts = parts[parts.index("results") + 1 :]
    parts = parts[:-1] if parts[-1].endswith(".json") else parts
    return REPORT if parts[0] == "report" else Artifact(*parts[:3])
