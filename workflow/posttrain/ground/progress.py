"""What is printed: progress lines on standard error, each with the stage's name."""

import io
import sys
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json

name = "posttrain"  # the command line sets it to experiment/stage


def say(message: str) -> None:
    """Print a line to standard error."""
    print(f"[{name}] {message}", file=sys.stderr, flush=True)


def print_any_text() -> None:
    """Print `?` for what a terminal's encoding lacks, such as ± in ASCII; Python would end with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def spent(checkpoints: Path) -> float:
    """Training seconds of earlier attempts, by their last `trainers.Heartbeat`; 0 without a record."""
    try:
        return float(read_json(checkpoints / "progress.json")["seconds"])
    except (KeyError, TypeError, ValueError, UserError):
        return 0.0
