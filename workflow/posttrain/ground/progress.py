"""What is printed: progress lines on standard error, each with the stage's name."""

import io
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json

EVERY = 30  # seconds between the lines of `counted`
name = "posttrain"  # the command line sets it to experiment/stage


def say(message: str) -> None:
    """Print a line to standard error."""
    print(f"[{name}] {message}", file=sys.stderr, flush=True)


def counted(items: Iterable, what: str, total: int = 0) -> Iterator:
    """The items of a long job. Every EVERY seconds a line tells how many are done, how many a second and, with a total,
    the minutes that are left."""
    begun = told = time.monotonic()
    for number, item in enumerate(items):
        if (now := time.monotonic()) - told >= EVERY:
            told, speed = now, number / (now - begun)
            left = f" of {total:,}" if total else ""
            left += f", {speed:,.1f} a second" + (f", {(total - number) / speed / 60:.0f} min left" if total else "")
            say(f"{what}: {number:,} rows{left}")
        yield item


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
