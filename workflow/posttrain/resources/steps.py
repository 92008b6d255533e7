"""The trained parameters of a stage, its steps, and the rows of one forward pass.

posttrain plan EXPERIMENT/STAGE
"""

from typing import Any, NamedTuple

from posttrain.config.sections import Adapter, Base, Longctx, Optimisation, Passes, Ppo, Scratch, Section, Sft
from posttrain.config.stages import Experiment
from posttrain.resources import memory
from posttrain.resources.architecture import Architecture
from posttrain.training import epochs


class Learned(NamedTuple):
    """The trained parameters."""

    kept: list[str]  # a layer's matrices that are trained or get an adapter, and whose input is kept
    numbers: int  # of trained parameters
    norms: bool = False  # whether norms are trained
    rank: int = 0  # of the adapter
    muon: int = 0  # parameters that Muon updates


class Batch(NamedTuple):
    """The rows of one forward pass and their length in tokens; padded: whether rows have unequal lengths."""

    rows: int
    length: int
    padded: bool


def loop(section: Section) -> Any:
    """The section with a stage's batch size and steps; None for a base that is not trained."""
    return section.scratch if isinstance(section, Base) else section


def learned(settings: Experiment, shape: Architecture, stage: str) -> Learned:
    """The parameters that a stage trains, by the class of its section."""
    section = loop(getattr(settings, stage))
    if isinstance(section, Scratch):
        return _everything(shape, section.optimizer)
    if isinstance(section, Sft):
        return _tuned(section, shape)
    if isinstance(section, Adapter):
        return _aligned(section, settings.sft, shape)
    return _lengthened(section, shape) if isinstance(section, Longctx) else Learned([], 0)


def _everything(shape: Architecture, optimizer: str = "adamw") -> Learned:
    muon = memory.linear(shape) if optimizer == "muon" else 0
    return Learned(list(shape.linear), shape.parameters, norms=True, muon=muon)


def _tuned(section: Sft, shape: Architecture) -> Learned:
    """The parameters that `sft` trains. A virtual token has keys and values in all layers (prefix) or an embedding."""
    if section.method == "full":
        return _everything(shape)
    if section.method in ("lora", "qlora"):
        return _adapter(shape, section.rank, section.target_modules)
    width = 2 * shape.layers * shape.kv_heads * shape.head if section.method == "prefix" else shape.hidden
    return Learned([], section.virtual_tokens * width)


def _adapter(shape: Architecture, rank: int, modules: list[str] | str) -> Learned:
    return Learned(memory.targets(shape, modules), memory.lora(shape, rank, modules), rank=rank)


def _aligned(section: Adapter, sft: Sft, shape: Architecture) -> Learned:
    """An adapter that starts as the SFT policy's, or all its weights; in PPO also the value function's, as many."""
    if section.method == "full":
        whole = _everything(shape)
        return whole._replace(numbers=2 * whole.numbers) if isinstance(section, Ppo) else whole
    has_adapter = sft.method in ("lora", "qlora")
    rank = section.rank or (sft.rank if has_adapter else 16)
    adapter = _adapter(shape, rank, section.target_modules or (sft.target_modules if has_adapter else "all-linear"))
    return adapter._replace(numbers=2 * adapter.numbers) if isinstance(section, Ppo) else adapter


def _lengthened(section: Longctx, shape: Architecture) -> Learned:
    """The parameters that `longctx` trains: all, or an adapter with the embedding and the norms."""
    if section.tuning == "full":
        return _everything(shape, section.optimizer)
    if section.tuning == "none":
        return Learned([], 0)
    adapter = _adapter(shape, section.rank, section.target_modules)
    beside = shape.vocab * shape.hidden + 2 * shape.hidden * shape.layers if section.embeddings_and_norms else 0
    return adapter._replace(numbers=adapter.numbers + beside, norms=bool(beside))


def micro(section: Optimisation) -> int:
    """Most sequences in one forward pass."""
    return section.micro_batch_size or section.batch_size


def with_steps(settings: Experiment, stage: str, card: dict) -> Experiment:
    """The settings with the steps that a stage's epochs come to, by the data card; as they are without one."""
    section = getattr(settings, stage)
    count = epochs.rows(section, card.get("splits", {})) if isinstance(section, Passes) else 0
    if not count or section.epochs is None:
        return settings
    steps = epochs.steps_of(section, count)
    return settings.model_copy(update={stage: section.replaced(steps=steps, epochs=None)})
