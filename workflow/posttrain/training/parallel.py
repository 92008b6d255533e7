"""Data parallelism: each process takes a share of the batch, and sums are taken over all processes.

torchrun --nproc-per-node 2 -m posttrain STAGE ... ; with one process, nothing here has an effect.
"""

import math
import os
from collections.abc import Callable

import torch
import torch.distributed as distributed
from torch import Tensor

from posttrain.config.sections import LARGEST_BATCH
from posttrain.ground.errors import UserError

fits: int | None = None  # sequences that fit into the memory, as planned or after it ran out; set by the command line
sharded = False  # whether each process holds a share of the weights (FSDP), set by the command line


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def main() -> bool:
    """Whether this is the main process, which writes files for all."""
    return rank() == 0


def backend() -> str:
    """The backend of torch.distributed."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def start() -> None:
    """Join the other processes, where torchrun started several."""
    if world() > 1 and not distributed.is_initialized():
        distributed.init_process_group(backend())


def refuse_sharded(key: str) -> None:
    """Raise UserError where each process holds a share of the weights, for a key that needs whole ones."""
    if sharded:
        raise UserError(f"{key}: needs whole weights in each process, and they are sharded (FSDP)")


def share(count: int) -> list[int]:
    """The numbers, of `count` items, that this process takes."""
    return list(range(rank(), count, world()))


def at_once(section, count: int) -> int:
    """Number of sequences, of `count`, in one forward pass. section: `config.Optimisation`."""
    return max(1, fitting(min(count, section.micro_batch_size or count)))


def requests_at_once(section) -> int:
    """Number of requests in one forward pass of a benchmark. section: `config.Evaluate`."""
    return fitting(LARGEST_BATCH if section.batch_size == "auto" else section.batch_size)


def fitting(count: int) -> int:
    """Number of sequences, of `count`, that fit into a GPU's memory, as far as is known."""
    return min(count, fits or count)


def split(batch_size: int, micro_batch_size: int | None, processes: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of each process: the largest micro-batch that divides the global batch evenly.

    micro_batch_size: upper limit; None for no limit. Raises UserError where processes would get unequal shares.
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
    """A trainer's arguments for FSDP2 (arXiv 2304.11277), where weights are sharded over processes; else none."""
    if not sharded or world() == 1:
        return {}
    refuse_shards()
    return {"fsdp": True, "fsdp_config": {"version": 2}}


def refuse_shards() -> None:
    """Raise UserError on CPUs, where accelerate silently does not shard."""
    if not torch.cuda.is_available():
        raise UserError("--shard needs GPUs; without it every process holds all weights")


def reshard(model) -> None:
    """Let each process hold its share of the weights alone: an evaluation leaves the last layers whole, in copies in
    which a change would be lost."""
    if not sharded or world() == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(model, every_name: bool = False) -> dict | None:
    """The trained weights of a sharded model, gathered in the first process; None where the model is not sharded.

    A collective call: every process must make it. every_name: tied weights under each of their names, not once.
    """
    if not sharded or world() == 1:
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    named = dict(model.named_parameters(remove_duplicate=not every_name))
    return {name: weight for name, weight in state.items() if name in named}


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    start()
    if world() > 1:
        distributed.all_reduce(value)
    return value


def summed_numbers(numbers: dict[str, float], device) -> dict[str, float]:
    """The sum over all processes of each number."""
    total = summed(torch.tensor(list(numbers.values()), dtype=torch.float64, device=device))
    return dict(zip(numbers, total.tolist(), strict=True))


def largest(number: float, device) -> float:
    """The largest number of all processes."""
    start()
    value = torch.tensor(number, dtype=torch.float64, device=device)
    if world() > 1:
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return value.item()


def barrier() -> None:
    """Wait for all processes."""
    start()
    if world() > 1:
        distributed.barrier()


def first(act: Callable[[], None]) -> None:
    """Run a function in the first process, while the others wait."""
    if main():
        act()
    barrier()


def device() -> str:
    """The device of this process: its GPU, or the CPU where there are none."""
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return f"cuda:{torch.cuda.current_device()}"


def add_gradients(weights: list[Tensor]) -> None:
    """Sum the gradients over all processes, in one message."""
    if world() == 1:
        return
    flat = torch.cat([(w.grad if w.grad is not None else torch.zeros_like(w)).flatten() for w in weights])
    parts = summed(flat).split([w.numel() for w in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = part.view_as(weight)
