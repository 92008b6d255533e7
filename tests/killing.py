"""Kill a stage with SIGKILL, in training and inside the save, and continue it; drop a piece of what it continues from.

Every attempt is a process of its own, forked from one that has only imported the libraries, and runs the command line.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import tiny

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "transformers.trainer", "trl.trainer.sft_trainer", "trl.trainer.reward_trainer",
             "trl.trainer.dpo_trainer", "peft", "bitsandbytes", "datasets", "posttrain.training.trainers")  # fmt: skip
PROCESSES = get_context("forkserver")
AIMS = ("training", "save", "anywhere")  # where a kill is meant to fall; anywhere: loading and ending too
SAVE = 0.03  # seconds that a save of the tiny models takes, at most
PIECES = {  # of the state that a trainer continues from
    "base": ("optimiser", "schedule", "data position"),
    "sft": ("optimiser", "schedule", "data position", "random numbers"),
    "reward": ("optimiser", "schedule", "data position", "random numbers"),
    "dpo": ("optimiser", "schedule", "data position", "random numbers"),
    "ppo": ("optimiser", "schedule", "KL coefficient"),  # each iteration's prompts and answers follow from its number
    "longctx": ("optimiser", "schedule", "data position"),
}


def prepare() -> None:
    """Set what the processes find in their environment, before the first of them."""
    from posttrain.__main__ import quiet_libraries

    os.environ["PYTHONWARNINGS"] = "ignore"  # else it is told in the end that killed processes left semaphores

    paths = [str(ROOT / "workflow"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    quiet_libraries("certify")
    PROCESSES.set_forkserver_preload(list(LIBRARIES))


def start(stage: str, section, output: Path, inputs: dict[str, Path], without: str = ""):
    """Begin or continue a stage in a process of its own, which forgets a piece of the state (`PIECES`)."""
    command = tiny.command(stage, section, output, inputs)
    process = PROCESSES.Process(target=run, args=(command, output.parent / "said", without))
    process.start()
    return process


def run(command: list[str], said: Path, without: str) -> None:
    """The command line, in the forked process; what it says is left in a file."""
    from posttrain.__main__ import main

    with open(said, "a", buffering=1) as sys.stderr:
        sys.stdout = sys.stderr
        forget(without)
        code = main(command)
    os._exit(code)


def forget(piece: str) -> None:
    """Let a piece of a checkpoint's state be left out when a stage continues: a control, which must be another run."""
    import torch
    import transformers.trainer

    from posttrain.training import checkpoint

    def nothing(self, *_):
        pass

    def without_coefficient(read: Callable):
        def changed(checkpoints):
            tensors, state = read(checkpoints)
            return tensors, state | {"kl_coefficient": 0.05}

        return changed

    if piece == "optimiser":
        torch.optim.AdamW.load_state_dict = nothing
    elif piece == "schedule":
        torch.optim.lr_scheduler.LambdaLR.load_state_dict = nothing
    elif piece == "random numbers":
        transformers.trainer.Trainer._load_rng_state = nothing
    elif piece == "data position":
        transformers.trainer.skip_first_batches = lambda loader, batches: loader
    elif piece == "KL coefficient":
        checkpoint.read = without_coefficient(checkpoint.read)


def finish(stage: str, section, output: Path, inputs: dict[str, Path], without: str = "") -> dict:
    """Let a stage come to its end; returns the files of its artifact. Raises RuntimeError with what it said."""
    process = start(stage, section, output, inputs, without)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{stage}: exit code {process.exitcode}: {(output.parent / 'said').read_text()[-3000:]}")
    return read_json(output)["files"]


def kill(
    stage: str, section, output: Path, inputs: dict[str, Path], aim: str, chance: random.Random, seconds: float
) -> str:
    """Start a stage and kill it within so many seconds of training; returns where, "" where it had ended before.

    In a save: of one that is not its first, so that it comes forward. Where it was is read off what then lies there: in
    a save, there is a checkpoint without its manifest.
    """
    begun, process = time.time(), start(stage, section, output, inputs)
    if aim == "training":
        wait(process, lambda: trained_since(begun, output))
    if aim == "save":
        wait(process, lambda: saved_since(begun, output))
    time.sleep(chance.uniform(0, seconds))
    if aim == "save":
        wait(process, lambda: saving(output))
        time.sleep(SAVE * chance.random() ** 3)  # most of them soon: PPO saves in 6 ms
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        return ""
    training = trained_since(begun, output)
    return "save" if training and saving(output) else "training" if training else "anywhere"


def wait(process, sign: Callable[[], bool]) -> None:
    """Until there is a sign, or the process has ended."""
    while process.is_alive() and not sign():
        time.sleep(0.001)


def continue_without(piece: str, stage: str, section, output: Path, inputs: dict[str, Path]) -> dict:
    """Kill a stage when it has saved after its fifth step, by when every piece has moved, and let it come to its end
    without one of them."""
    process = start(stage, section, output, inputs)
    wait(process, lambda: any(int(file.parent.name[11:]) > 4 for file in seals(output)))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"{stage}: came to its end before it could be killed"
    return finish(stage, section, output, inputs, without=piece)


def trained_since(begun: float, output: Path) -> bool:
    """Whether a stage that was started then has made a step, but not its last."""
    for file in output.parent.glob("checkpoints/*/progress.json"):
        with suppress(OSError, UserError):  # it has gone with the end of the stage
            beat = read_json(file)
            return file.stat().st_mtime > begun and beat["step"] < beat["steps"]
    return False


def saved_since(begun: float, output: Path) -> bool:
    """Whether a stage that was started then has saved."""
    for seal in seals(output):
        with suppress(FileNotFoundError):  # newer ones have come
            if seal.stat().st_mtime > begun:
                return True
    return False


def seals(output: Path) -> list[Path]:
    """The manifests of whole checkpoints."""
    return list(output.parent.glob("checkpoints/*/checkpoint-*/manifest.json"))


def saving(output: Path) -> bool:
    """Whether there is a checkpoint that is not whole."""
    found = output.parent.glob("checkpoints/*/checkpoint-*")
    return any(not (folder / "manifest.json").is_file() for folder in found)
