"""The GPUs of this machine, and which of them a stage has for itself.

Snakemake counts GPUs and hands out none: two stages of one user would both take the first.
"""

import functools
import os
import subprocess
import tempfile
import time
from pathlib import Path

from posttrain.ground.files import lock
from posttrain.ground.progress import say


@functools.cache
def present() -> list[str]:
    """The GPUs that a process started here may use, as CUDA_VISIBLE_DEVICES names them."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return []
    cards = listing.stdout.split() if listing.returncode == 0 else []
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return cards
    return [card.strip() for card in allowed.split(",") if card.strip()] if cards else []


def take(count: int) -> tuple[list[str], list[int]]:
    """Wait for `count` GPUs (at most all) that no other stage on this machine has; returns them and their open lock
    files. A GPU is taken as long as its file is open, so that a stage that was killed keeps none."""
    taken: dict[str, int] = {}
    cards, told = present(), False
    while len(taken) < min(count, len(cards)):
        for card in cards:
            if len(taken) < count and card not in taken and (file := lock_card(card)) is not None:
                taken[card] = file
        if len(taken) < min(count, len(cards)):
            if not told:
                say(f"waiting for {count} of the GPUs {', '.join(cards)}, which other stages have")
            told = True
            time.sleep(5)
    return list(taken), list(taken.values())


def lock_card(card: str) -> int | None:
    """Take a GPU for this process; returns the open file that holds it, None where another process has it."""
    folder = Path(tempfile.gettempdir(), f"posttrain-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    file = os.open(folder / f"gpu-{card}", os.O_RDWR | os.O_CREAT, 0o600)
    if lock(file) is False:
        os.close(file)
        return None
    return file
