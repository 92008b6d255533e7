"""The trained parameters of a stage, its steps, and the rows of one forward pass.

posttrain plan EXPERIMENT/STAGE
"""

import math
from typing import Any, NamedTuple

from posttrain.config.sections import Adapter, Base, Longctx, Optimisation, Passes, Ppo, Scratch, Section, Sft
from posttrain.config.stages import Experiment
from posttrain.resources import memory
from posttrain.resources.architecture import Architecture
from posttrain.resources.optimizer import Tensors
from posttrain.training import epochs


class Learned(NamedTuple):
    """The trained parameters."""

    kept: list[str]  # a layer's matrices that are trained or get an adapter, and whose input is kept
    tensors: list[Tensors]  # the trained parameters
    norms: bool = False  # whether norms are trained
    rank: int = 0  # of the adapter
    dora: bool = False  # whether the lengths of rows are trained too
    first: int = 0  # number of the first layer in which something is trained

    @property
    def numbers(self) -> int:
        """Number of trained parameters."""
        return sum(part.number * math.prod(part.shape) for part in self.tensors)


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
        return _everything(shape)
    if isinstance(section, Sft):
        return _tuned(section, shape)
    if isinstance(section, Adapter):
        return _aligned(section, settings.sft, shape)
    return _lengthened(section, shape) if isinstance(section, Longctx) else Learned([], [])


def _everything(shape: Architecture) -> Learned:
    """All parameters: matrices, an output embedding of its own and a mixture's experts among them, the embedding, and
    vectors."""
    tensors = [Tensors(shape.layers, size) for size in shape.linear.values()]
    tensors.append(Tensors(1, (shape.vocab, shape.hidden), embedding=True))
    tensors += [] if shape.tied else [Tensors(1, (shape.vocab, shape.hidden))]
    tensors += [Tensors(shape.layers, (shape.experts // shape.hidden, shape.hidden))] if shape.experts else []
    whole = Learned(list(shape.linear), tensors, norms=True)
    return whole._replace(tensors=[*tensors, *vectors(shape.parameters - whole.numbers, shape.hidden)])


def vectors(numbers: int, width: int) -> list[Tensors]:
    """So many numbers in vectors of a width, and one of what is left."""
    return [Tensors(numbers // width, (width,)), Tensors(1, (numbers % width,))]


def _tuned(section: Sft, shape: Architecture) -> Learned:
    """The parameters that `sft` trains. A virtual token has keys and values in all layers (prefix), which a network of
    two layers may make, or an embedding."""
    if section.method == "full":
        return _everything(shape)
    if section.method in ("lora", "qlora"):
        return _adapter(shape, section.rank, section.target_modules, section)
    keys, wide = shape.kv_heads * shape.head, section.prefix_projection
    width = 2 * shape.layers * keys if section.method == "prefix" else shape.hidden
    if wide and section.method == "prefix":
        network = [Tensors(1, (wide, keys)), Tensors(1, (wide,)), Tensors(1, (width, wide)), Tensors(1, (width,))]
        return Learned([], [Tensors(1, (section.virtual_tokens, keys), embedding=True), *network])
    return Learned([], [Tensors(1, (section.virtual_tokens, width), embedding=True)])


def _adapter(shape: Architecture, rank: int, modules: list[str] | str, sft: Sft | None = None) -> Learned:
    """A LoRA's two matrices for each matrix that it adapts (`memory.lora`), in all layers or those of `sft`, and DoRA's
    lengths of rows where `sft` has them."""
    names = memory.targets(shape, modules)
    sides = [size for name in names for size in shape.linear[name]]
    layers = (sft.layers if sft else None) or range(shape.layers)
    tensors = [Tensors(len(layers), (rank, side)) for side in sides]
    dora = bool(sft and sft.dora)
    tensors += [Tensors(len(layers), (shape.linear[name][0],)) for name in names if dora]
    return Learned(names, tensors, rank=rank, dora=dora, first=min(layers))


def _aligned(section: Adapter, sft: Sft, shape: Architecture) -> Learned:
    """An adapter that starts as the SFT policy's, or all its weights; in PPO also the value function's, as many."""
    if section.method == "full":
        whole = _everything(shape)
        return whole._replace(tensors=2 * whole.tensors) if isinstance(section, Ppo) else whole
    has_adapter = sft.method in ("lora", "qlora")
    rank = section.rank or (sft.rank if has_adapter else 16)
    modules = section.target_modules or (sft.target_modules if has_adapter else "all-linear")
    adapter = _adapter(shape, rank, modules, sft if has_adapter else None)
    return adapter._replace(tensors=2 * adapter.tensors) if isinstance(section, Ppo) else adapter


def _lengthened(section: Longctx, shape: Architecture) -> Learned:
    """The parameters that `longctx` trains: all, or an adapter with the embedding and the norms."""
    if section.tuning == "full":
        return _everything(shape)
    if section.tuning == "none":
        return Learned([], [])
    adapter = _adapter(shape, section.rank, section.target_modules)
    if not section.embeddings_and_norms:
        return adapter
    beside = [Tensors(1, (shape.vocab, shape.hidden), embedding=True), Tensors(2 * shape.layers, (shape.hidden,))]
    return adapter._replace(tensors=[*adapter.tensors, *beside], norms=True)


def micro(section: Optimisation) -> int:
    """Most sequences in one forward pass."""
    return section.micro_batch_size or section.batch_size


def stated(settings: Experiment) -> dict:
    """The training rows that an experiment's paper states, in the form of a data card."""
    rows = settings.paper.rows if settings.paper else None
    return {"splits": {kind: {"train": count} for kind, count in rows.items()}} if rows else {}


def with_steps(settings: Experiment, stage: str, card: dict) -> Experiment:
    """The settings with the steps that a stage's epochs come to, by the data card; as they are without one."""
    section = getattr(settings, stage)
    count = epochs.rows(section, card.get("splits", {})) if isinstance(section, Passes) else 0
    if not count or section.epochs is None:
        return settings
    steps = epochs.steps_of(section, count)
    return settings.model_copy(update={stage: section.replaced(steps=steps, epochs=None)})
