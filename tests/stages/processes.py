"""What each of several processes does that share the batch: short runs of trainers, some in a way that is wrong."""

import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType
from tiny import make

from posttrain.ground.errors import Interrupted
from posttrain.jobs import kept
from posttrain.stages import grpo
from posttrain.training import interruption, parallel, trainers


def one(rank: int, count: int, port: int, runs: dict, folder: Path, sharded: bool) -> None:
    """One of `count` processes, with what torchrun would put into its environment; ends the process.

    runs: name -> stage, its section, its inputs and `twist`. What it says is left in a file of the folder.
    """
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 0
    with open(folder / f"said-{rank}", "a", buffering=1) as sys.stderr:
        sys.stdout = sys.stderr
        try:
            main(runs, folder, sharded)
        except BaseException:
            traceback.print_exc()
            code = 1
    os._exit(code)


def main(runs: dict, folder: Path, sharded: bool) -> None:
    """Make each run's artifact in a folder of its own."""
    if sharded:
        share_out()
    for name, (stage, section, inputs, how) in runs.items():
        output, keep_gb = folder / name / "manifest.json", float(how == "unseen")
        with pytest.MonkeyPatch.context() as patch:
            twist(how, patch)
            try:
                make(stage, section, output, **inputs, keep_gb=keep_gb)
            except Interrupted:
                make(stage, section, output, **inputs, keep_gb=keep_gb)


def twist(how: str, patch: pytest.MonkeyPatch) -> None:
    """Go through the batch in a way that is wrong: controls that must be seen. Or see other files than the first
    process, or be told to stop."""
    split, arguments, due = parallel.split, trainers.arguments, interruption.due
    if how == "unseen" and os.environ["RANK"] != "0":
        patch.setattr(kept, "take", lambda *_: None)
    if how == "own rewards":
        score = grpo.score
        patch.setattr(
            grpo, "score", lambda section, scorer, batch, rows: score(section, scorer, batch, rows) * shared(rows)
        )
    if how == "accumulation":  # as if there were one process
        patch.setattr(parallel, "split", lambda batch, micro, processes: split(batch, micro, 1))
    if how == "average":  # each process over its own tokens
        own = {"average_tokens_across_devices": False}
        patch.setattr(trainers, "arguments", lambda *given: arguments(*given) | own)
    if how == "evaluation":  # shared as accelerate shares it
        patch.setattr(
            trainers, "held_out_loss",
            lambda trainer, *given, **named: type(trainer).evaluation_loop(trainer, *given, **named),
        )  # fmt: skip
    if how == "stopped":  # after the second step, once
        calls = iter([False, False, True])
        patch.setattr(
            interruption, "due", lambda *given: interruption.TERMINATED if next(calls, False) else due(*given)
        )


def shared(rows: list[dict]) -> torch.Tensor:
    """1 for the answers of this process, else 0."""
    mine = parallel.share(len(rows))
    return torch.tensor([float(number in mine) for number in range(len(rows))])


def share_out() -> None:
    """FSDP on CPUs, where accelerate leaves it out: what a machine with several GPUs would do, but for its messages."""
    begin, known = AcceleratorState.__init__, {}

    def with_plugin(state, *given, **named):
        begin(state, *given, **named)
        if plugin := named.get("fsdp_plugin") or known.get("plugin"):
            known["plugin"] = plugin
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin

    run = trainers.run

    def halves(trainer, *given) -> None:
        run(trainer, *given)
        for name, weight in trainer.model.named_parameters():
            whole = weight.shape[0] == 1  # a reward model's head has one row
            assert weight.to_local().numel() == weight.numel() / 2 or whole, name

    AcceleratorState.__init__, trainers.run, parallel.refuse_shards = with_plugin, halves, lambda: None
    parallel.sharded = True
