"""Short runs of trainers, in as many processes as torchrun starts: `processes.py RUNS.json FOLDER [WRONG]`."""

import json
import os
import sys
from pathlib import Path

from tiny import make

from posttrain import config, kept, training


def main(runs: dict, folder: Path, wrong: str = "") -> None:
    """Make each run's artifact in a folder of its own. runs: name -> stage, its section, its inputs."""
    spoil(wrong)
    for name, (stage, section, inputs) in runs.items():
        schema = getattr(config, stage.capitalize())
        inputs = {role: Path(path) for role, path in inputs.items()}
        output, keep_gb = folder / name / "manifest.json", float(wrong == "unseen")
        make(stage, schema.model_validate(section), output, **inputs, keep_gb=keep_gb)


def spoil(wrong: str) -> None:
    """Go through the batch in a way that is wrong: controls that must be seen. Or see other files than the first."""
    if wrong == "unseen" and os.environ["RANK"] != "0":
        kept.find = lambda *_: None
    split, arguments = training.split, training.arguments
    if wrong == "accumulation":  # as if there were one process
        training.split = lambda batch, micro, processes: split(batch, micro, 1)
    if wrong == "average":  # each process over its own tokens
        training.arguments = lambda *given: arguments(*given) | {"average_tokens_across_devices": False}
    if wrong == "evaluation":  # shared as accelerate shares it
        training.evaluate_whole = lambda trainer, *given, **named: type(trainer).evaluation_loop(
            trainer, *given, **named
        )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), *sys.argv[3:])
