"""The conda environment of the jobs (`snakemake --sdm conda`, `--containerize`), with its pins in the file itself.

Snakemake copies the environment's file alone, so that a list of pins beside it would be missing where it is installed.
"""

from pathlib import Path

import yaml

from posttrain.ground.files import write_text

FILE = Path(".snakemake/environment.yaml")


def conda_environment(envs: Path) -> str:
    """Write `environment.yaml` of the folder `envs` with the pins of `requirements.txt`; returns the path."""
    environment = yaml.safe_load((envs / "environment.yaml").read_text(encoding="utf-8"))
    lines = (line.partition("#")[0].strip() for line in (envs / "requirements.txt").read_text("utf-8").splitlines())
    environment["dependencies"][-1]["pip"] = [pin for pin in lines if pin]
    text = yaml.safe_dump(environment, sort_keys=False)
    if not FILE.is_file() or FILE.read_text(encoding="utf-8") != text:
        FILE.parent.mkdir(exist_ok=True)
        write_text(FILE, text)
    return str(FILE.absolute())
