"""The GPUs of this machine, and locks that reserve them for a stage.

Snakemake only counts GPUs: without locks, two stages of one user would both use the first.
"""

import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from posttrain.ground.files import lock
from posttrain.ground.progress import say

PATIENCE = 60.0  # seconds for nvidia-smi, which a hung driver blocks, to name a GPU


@functools.cache
def present() -> list[str]:
    """The GPUs that a process started here may use, by their names in CUDA_VISIBLE_DEVICES."""
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


@functools.cache
def memory_gb() -> float | None:
    """Memory of the smallest of these GPUs, in GB; None where there is none or it is not told."""
    query = ["nvidia-smi", "-i", ",".join(present()), "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if not present():
        return None
    listing = subprocess.run(query, capture_output=True, text=True)
    sizes = [float(size) for size in listing.stdout.split() if size.isdecimal()]  # in MiB
    return min(sizes) * 2**20 / 1e9 if sizes and listing.returncode == 0 else None


def given(environment: Mapping[str, str]) -> dict:
    """The GPUs that an environment gives to a stage: their number as `gpus`, and the name of the first as `gpu`, None
    where nvidia-smi does not tell it."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return {"gpus": int(environment.get("SLURM_GPUS_ON_NODE") or 0), "gpu": None}
    cards = [card for card in visible.split(",") if card not in ("", "-1", "NoDevFiles")]
    if not cards:
        return {"gpus": 0, "gpu": None}
    query = ["nvidia-smi", "-i", cards[0], "--query-gpu=name", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return {"gpus": len(cards), "gpu": None}
    return {"gpus": len(cards), "gpu": listing.stdout.strip() if listing.returncode == 0 else None}


def take(count: int) -> tuple[list[str], list[int]]:
    """Wait for `count` GPUs (at most all) that no other stage on this machine has; returns them and their open lock
    files. A GPU is reserved while its file is open, so that a killed stage keeps none."""
    taken: dict[str, int] = {}
    cards, reported = present(), False
    while len(taken) < min(count, len(cards)):
        for card in cards:
            if len(taken) < count and card not in taken and (file := lock_card(card)) is not None:
                taken[card] = file
        if len(taken) < min(count, len(cards)):
            if not reported:
                say(f"waiting for {count} of the GPUs {', '.join(cards)}, which other stages have")
            reported = True
            time.sleep(5)
    return list(taken), list(taken.values())


def lock_card(card: str) -> int | None:
    """Reserve a GPU for this process; returns its open lock file, None where another process has the GPU."""
    folder = Path(tempfile.gettempdir(), f"posttrain-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    file = os.open(folder / f"gpu-{card}", os.O_RDWR | os.O_CREAT, 0o600)
    if lock(file) is False:
        os.close(file)
        return None
    return file
