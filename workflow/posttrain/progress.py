"""What a stage says while it runs: short lines on standard error, each with the stage's name."""

import sys

name = "posttrain"  # set once by the command line to experiment/stage


def say(message: str) -> None:
    """Print one line for the person who watches."""
    print(f"[{name}] {message}", file=sys.stderr, flush=True)
