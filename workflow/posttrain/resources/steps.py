"""What a stage trains, and what one step of its training holds in memory.

posttrain plan EXPERIMENT/STAGE
"""

from typing import NamedTuple

from posttrain.config.experiment import Experiment
from posttrain.config.sections import Longctx, Sft
from posttrain.resources import memory
from posttrain.resources.architecture import Architecture
from posttrain.resources.memory import FULL, Terms


class Learned(NamedTuple):
    """What is trained: the layers' matrices that are, or whose adapter of a rank is; how many numbers in all."""

    kept: list[str]
    numbers: int
    norms: bool = False  # too
    rank: int = 0
    muon: int = 0  # numbers that Muon moves


class Batch(NamedTuple):
    """One forward pass: rows of a length in tokens; padded where they are of unequal length."""

    rows: int
    length: int
    padded: bool


def learned(settings: Experiment, shape: Architecture, stage: str) -> Learned:
    """What a stage trains."""
    if stage == "base" and settings.base.scratch:
        return _everything(shape, settings.base.scratch.optimizer)
    if stage == "sft":
        return _tuned(settings.sft, shape)
    if stage in ("reward", "dpo", "ppo"):
        return _aligned(settings, shape, stage)
    return _lengthened(settings.longctx, shape) if stage == "longctx" else Learned([], 0)


def _everything(shape: Architecture, optimizer: str = "adamw") -> Learned:
    muon = memory.linear(shape) if optimizer == "muon" else 0
    return Learned(list(shape.linear), shape.parameters, norms=True, muon=muon)


def _tuned(section: Sft, shape: Architecture) -> Learned:
    """Of virtual tokens: their keys and values in every layer (prefix), or their embeddings (prompt)."""
    if section.method == "full":
        return _everything(shape)
    if section.method in ("lora", "qlora"):
        return _adapter(shape, section.rank, section.target_modules)
    width = 2 * shape.layers * shape.kv_heads * shape.head if section.method == "prefix" else shape.hidden
    return Learned([], section.virtual_tokens * width)


def _adapter(shape: Architecture, rank: int, named: list[str] | str) -> Learned:
    return Learned(memory.targets(shape, named), memory.lora(shape, rank, named), rank=rank)


def _aligned(settings: Experiment, shape: Architecture, stage: str) -> Learned:
    """An adapter that begins as the SFT policy's; in PPO one more of its kind, the value function."""
    section, sft = getattr(settings, stage), settings.sft
    own = sft.method in ("lora", "qlora")
    rank = section.rank or (sft.rank if own else 16)
    found = _adapter(shape, rank, section.target_modules or (sft.target_modules if own else "all-linear"))
    return found._replace(numbers=2 * found.numbers) if stage == "ppo" else found


def _lengthened(section: Longctx, shape: Architecture) -> Learned:
    """Beside an adapter, the embedding and the norms."""
    if section.tuning == "full":
        return _everything(shape, section.optimizer)
    if section.tuning == "none":
        return Learned([], 0)
    found = _adapter(shape, section.rank, section.target_modules)
    beside = shape.vocab * shape.hidden + 2 * shape.hidden * shape.layers if section.embeddings_and_norms else 0
    return found._replace(numbers=found.numbers + beside, norms=bool(beside))


def step(shape: Architecture, section, batch: Batch, what: Learned, quantised: bool, loss: Terms) -> Terms:
    """All that one training step holds beside the weights. section: `config.Optimisation`; loss: the logits.

    Without accumulation gradients are made while activations go, and need only the room that those do not leave.
    """
    half, again = section.precision == "bfloat16", getattr(section, "gradient_checkpointing", False)
    terms = {"adapters": FULL * what.numbers} if what.numbers < shape.parameters else {}
    terms |= memory.learning(what.numbers, what.muon)
    terms |= memory.activations(shape, batch.rows, batch.length, what.kept, what.norms, half, again, what.rank)
    terms |= memory.padding_mask(shape, batch.rows, batch.length, again) if batch.padded else {}
    terms |= loss | memory.workspace(shape, batch.rows * batch.length, quantised, half)
    terms |= memory.half_copies(shape, quantised, half)
    if micro(section) == section.batch_size:
        terms["gradients"] = max(0.0, terms["gradients"] - terms["activations"] - terms.get("logits", 0))
    return terms


def micro(section) -> int:
    """Sequences in one forward pass."""
    return section.micro_batch_size or section.batch_size
