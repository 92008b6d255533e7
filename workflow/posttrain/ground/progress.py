"""What a stage says while it runs: short lines on standard error, each with the stage's name."""

import sys
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json

name = "posttrain"  # set once by the command line to experiment/stage


def say(message: str) -> None:
    """Print one line for the person who watches."""
    print(f"[{name}] {message}", file=sys.stderr, flush=True)


def spent(checkpoints: Path) -> float:
    """Seconds for which earlier attempts have trained, by the last word of theirs (`training.Heartbeat`)."""
    try:
        return float(read_json(checkpoints / "progress.json")["seconds"])
    except (KeyError, TypeError, ValueError, UserError):
        return 0.0
