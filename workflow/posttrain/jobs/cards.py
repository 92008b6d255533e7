"""The GPUs of this machine: how many there are, and which of them a stage has for itself.

Snakemake counts GPUs and hands out none: two stages of one user would meet on the first.
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
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return []
    cards = found.stdout.split() if found.returncode == 0 else []
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return cards
    return [card.strip() for card in allowed.split(",") if card.strip()] if cards else []


def take(count: int) -> tuple[list[str], list[int]]:
    """`count` GPUs that no other stage on this machine has, and the open files that hold them; waits for them.

    A GPU is held as long as its file is open, so that a stage that was killed holds none. None where there are none.
    """
    cards, files, spoken = [], [], False
    there = present()
    while len(cards) < min(count, len(there)):
        for card in [card for card in there if card not in cards]:
            if len(cards) < count and (file := held(card)) is not None:
                cards.append(card)
                files.append(file)
        if len(cards) < min(count, len(there)):
            if not spoken:
                say(f"waiting for {count} of the GPUs {', '.join(there)}, which other stages have")
            spoken = True
            time.sleep(5)
    return cards, files


def held(card: str) -> int | None:
    """The open file that holds a GPU for this process; None where another has it."""
    folder = Path(tempfile.gettempdir(), f"posttrain-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    file = os.open(folder / f"gpu-{card}", os.O_RDWR | os.O_CREAT, 0o600)
    if lock(file) is False:
        os.close(file)
        return None
    return file
