"""The name of an artifact, and the files that follow from it."""

from pathlib import Path
from typing import NamedTuple


class Artifact(NamedTuple):
    """The output of one run of a stage, for an experiment and, where the stage judges, for one of its policies."""

    experiment: str
    stage: str
    policy: str = ""

    @property
    def name(self) -> str:
        """Its name on command lines and in messages: `tiny/sft`, `tiny/evaluate/ppo`, `report`."""
        return "/".join(filter(None, self))

    @property
    def folder(self) -> str:
        """The folder that holds it."""
        return f"results/{self.name}"

    @property
    def manifest(self) -> str:
        """The list of its files with their checksums; it is written last, and other stages depend on it."""
        return f"{self.folder}/manifest.json"

    @property
    def log(self) -> Path:
        """The log of its stage."""
        return Path(f"results/logs/{self.name}.log")

    @property
    def exists(self) -> bool:
        """Whether it is complete: the manifest is there."""
        return Path(self.manifest).is_file()


REPORT = Artifact("", "report")


def at(folder: str | Path) -> Artifact:
    """The artifact of a folder or of a JSON file in it: `results/tiny/evaluate/ppo[/manifest.json]`."""
    parts = str(folder).split("/")  # Path is ten times slower, and a plan has thousands
    parts = parts[parts.index("results") + 1 :]
    parts = parts[:-1] if parts[-1].endswith(".json") else parts
    return REPORT if parts[0] == "report" else Artifact(*parts[:3])


def flat(inputs: dict) -> list:
    """All files of a stage's inputs."""
    return [file for files in inputs.values() for file in ([files] if isinstance(files, str | Path) else files)]
