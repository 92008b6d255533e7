"""Several processes that make one update: each takes its share of a batch, and sums are taken over all of them.

torchrun --nproc-per-node 2 -m posttrain STAGE ... ; with one process nothing here does anything.
"""

import math
import os
from collections.abc import Callable

import torch
import torch.distributed as distributed
from torch import Tensor

from posttrain.ground.errors import UserError

fits: int | None = None  # sequences for which a GPU has the memory, set by the command line after one had not
sharded = False  # whether each process holds a share of the weights (FSDP) in place of all, set by the command line


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def main() -> bool:
    """Whether this process writes for all of them."""
    return rank() == 0


def backend() -> str:
    """What carries messages between processes."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def start() -> None:
    """Join the other processes, where torchrun started some."""
    if world() > 1 and not distributed.is_initialized():
        distributed.init_process_group(backend())


def share(count: int) -> list[int]:
    """The part of `count` items that this process takes."""
    return list(range(rank(), count, world()))


def at_once(section, count: int) -> int:
    """How many of `count` sequences go through the model at once. section: `config.Optimisation`."""
    return max(1, min(count, section.micro_batch_size or count, fits or count))


def split(batch_size: int, micro_batch_size: int | None, processes: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of each process: the largest micro-batch that shares the global batch evenly.

    micro_batch_size: the most that fits; None for no limit. Raises UserError where processes would get unequal shares.
    """
    if batch_size % processes:
        fit = [str(count) for count in range(1, processes) if batch_size % count == 0]
        more = processes * math.ceil(batch_size / processes)
        raise UserError(
            f"batch_size {batch_size} cannot be shared evenly by {processes} processes: "
            f"start {' or '.join(fit)}, or set batch_size to a multiple of {processes}, {more} for one"
        )
    of_one = batch_size // processes
    micro = next(size for size in range(min(micro_batch_size or of_one, of_one), 0, -1) if of_one % size == 0)
    return micro, of_one // micro


def sharding() -> dict:
    """A trainer's arguments for FSDP2 (arXiv 2304.11277), where the weights are to be shared out among processes."""
    if not sharded or world() == 1:
        return {}
    refuse_shards()
    return {"fsdp": True, "fsdp_config": {"version": 2}}


def refuse_shards() -> None:
    """Raise UserError on CPUs, where accelerate leaves sharding out without a message."""
    if not torch.cuda.is_available():
        raise UserError("--shard needs GPUs; without it every process holds all weights")


def gathered(model) -> dict | None:
    """Trained weights that are shared out, put together again in the first process; None where they are not.

    Every process takes part.
    """
    if not sharded or world() == 1:
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state, named = get_model_state_dict(model, options=options), dict(model.named_parameters())
    return {name: weight for name, weight in state.items() if name in named}  # tied weights once


def summed(value: Tensor) -> Tensor:
    """The sum of every process's tensor; what a process did not fill in is 0."""
    start()
    if world() > 1:
        distributed.all_reduce(value)
    return value


def summed_numbers(numbers: dict[str, float], device) -> dict[str, float]:
    """The sums of every process's numbers, key by key."""
    total = summed(torch.tensor(list(numbers.values()), dtype=torch.float64, device=device))
    return dict(zip(numbers, total.tolist(), strict=True))


def largest(number: float, device) -> float:
    """The largest of every process's numbers."""
    start()
    value = torch.tensor(number, dtype=torch.float64, device=device)
    if world() > 1:
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return value.item()


def barrier() -> None:
    """Wait for every process."""
    start()
    if world() > 1:
        distributed.barrier()


def first(act: Callable[[], None]) -> None:
    """Let the first process do something before any goes on."""
    if main():
        act()
    barrier()


def device() -> str:
    """The device of this process: its own GPU, where there are GPUs."""
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return f"cuda:{torch.cuda.current_device()}"


def add_gradients(weights: list[Tensor]) -> None:
    """Give every process the sum of all gradients, in one message."""
    if world() == 1:
        return
    flat = torch.cat([(w.grad if w.grad is not None else torch.zeros_like(w)).flatten() for w in weights])
    parts = summed(flat).split([w.numel() for w in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = part.view_as(weight)
