"""Mistakes in what gets an adapter, and how, that the names and shapes of the base's weights show, without torch."""

import re
from collections.abc import Iterator

from posttrain.config.sections import Sft
from posttrain.config.stages import Experiment
from posttrain.dag.given import given
from posttrain.ground import weights
from posttrain.maths import fused

LAYER = re.compile(r"(^|\.)\d+\.")  # in the name of a weight: the number of its layer
HEADS = {"lm_head", "embed_out"}  # names of output embeddings
SHARED_IN_SCRATCH = HEADS | {"embed_tokens", "word_embeddings"}
OF_SCRATCH = {  # linear layers of `base.scratch`, by its positions
    "rope": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "alibi": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}


def target_mistakes(
    where: str, wanted: list[str] | str | None, experiment: Experiment, earlier: list[str] | str | None = None
) -> Iterator[tuple[str, str]]:
    """Target modules that the base lacks or that can get no adapter: (dotted key, what is wrong). Names are compared by
    their last part, as a checkpoint's names may lack the first. Nothing where the base's weights are not at hand.

    wanted: names, `all-linear`, or None for the earlier ones. earlier: those of the adapter from which this one starts,
    for an adapter that has to be on linear layers and on all of these.
    """
    linear, apart, shared = layers(experiment)
    key, names = f"{where}.target_modules", wanted if isinstance(wanted, list) else []
    allowed = f"linear layers: {', '.join(sorted(linear))}"
    for number, name in enumerate(names if linear else []):
        item, last = f"{key}[{number}]", name.rpartition(".")[2]
        if last in shared:
            reason = "it is the output embedding, or shares its weights with it (tie_word_embeddings)"
            yield item, f"{name} can get no adapter: {reason}; {allowed}"
        elif last not in linear | apart:
            yield item, f"the base has no {name}; {allowed}"
        elif last not in linear and earlier is not None:
            yield item, f"{name} is no linear layer; {allowed}"
    if names and isinstance(earlier, list) and (lacking := [name for name in earlier if name not in names]):
        yield key, f"lacks {', '.join(lacking)}, which sft.target_modules has"
    if wanted is None and linear and isinstance(earlier, list):
        for name in (name for name in earlier if name.rpartition(".")[2] in apart):
            yield key, f"{name} of sft.target_modules is no linear layer, from which none can start; {allowed}"


def adapter_mistakes(where: str, sft: Sft, experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Layers that the base lacks, and a start at which BA is not 0: (dotted key, what is wrong)."""
    count = number_of_layers(experiment)
    for place, number in enumerate(sft.layers or []):
        if count and number >= count:
            yield f"{where}.layers[{place}]", f"the base has no layer {number}: its {count} layers are 0 to {count - 1}"
    named = sft.target_modules if isinstance(sft.target_modules, list) else []
    for place, name in enumerate(named if sft.layers else []):
        if LAYER.search(f"{name}."):
            yield f"{where}.target_modules[{place}]", f"{name} names a layer itself: leave out layers, or its number"
    if sft.dora and frozen_in_16_bits(experiment):
        problem = "needs weights in float32: PEFT rounds their lengths to their type, so that it starts beside the base"
        yield f"{where}.dora", f"{problem} (set base.dtype: float32)"
    if sft.fused_parts:
        yield from _fused_mistakes(f"{where}.fused_parts", sft, experiment)
    if sft.initialization != "orthogonal":
        return
    if sft.method == "qlora" or frozen_in_16_bits(experiment):
        problem = "orthogonal needs weights in float32: PEFT rounds A and B to their type, so that BA is not 0"
        yield f"{where}.initialization", f"{problem} (set method: lora and base.dtype: float32)"
    elif sft.rank % 2:
        yield f"{where}.initialization", f"orthogonal needs an even rank, found {sft.rank}"


def _fused_mistakes(key: str, sft: Sft, experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Parts of a matrix that the base or the adapter lacks, or whose other rows would change."""
    base, named = experiment.base, sft.target_modules
    scratch = base.scratch and {"alibi": "bloom", "rope": "llama"}[base.scratch.positions]
    family = scratch or given(base).config.get("model_type")
    matrix = fused.MATRICES.get(family or "")
    if family and not matrix:
        problem = f"{family} has no matrix of queries, keys and values whose rows are known"
        yield key, f"{problem} (of {', '.join(fused.MATRICES)}); name layers in sft.target_modules"
    elif matrix and isinstance(named, list) and matrix not in {name.rpartition(".")[2] for name in named}:
        yield key, f"has no effect: sft.target_modules lacks {matrix}, which holds queries, keys and values"
    if sft.dora:
        yield key, "cannot be combined with dora, which trains the lengths of all rows"
    if sft.initialization == "orthogonal":
        yield key, "cannot be combined with initialization: orthogonal, with which B does not start at 0"


def number_of_layers(experiment: Experiment) -> int:
    """The layers of the base; 0 where its weights are not at hand."""
    base = experiment.base
    if base.scratch:
        return base.scratch.layers
    found = (LAYER.search(name) for name in given(base).shapes)
    return max((1 + int(match.group().strip(".")) for match in found if match), default=0)


def frozen_in_16_bits(experiment: Experiment) -> bool:
    """Whether the base's frozen weights are of a type of 16 bits."""
    base = experiment.base
    return weights.frozen_dtype(base.dtype, {} if base.scratch else given(base).config) == "bfloat16"


def layers(experiment: Experiment) -> tuple[set[str], set[str], set[str]]:
    """(linear layers, embeddings of their own weights, the output embedding and what shares its weights): names, of the
    base, without the experts of a mixture. The first two are empty where the weights are not at hand."""
    base = experiment.base
    if base.scratch:
        return OF_SCRATCH[base.scratch.positions], set(), SHARED_IN_SCRATCH
    model = given(base)
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in model.shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and ".experts." not in name
    }
    inside = {name.rpartition(".")[2] for name in matrices if LAYER.search(f"{name}.")}
    outside = {name.rpartition(".")[2]: shape for name, shape in matrices.items() if not LAYER.search(f"{name}.")}
    words = [name for name, shape in outside.items() if shape[0] == model.config.get("vocab_size")]
    tied = model.config.get("tie_word_embeddings", len(words) < 2)  # families differ in their default
    shared = HEADS | set(words if tied else [])
    return inside, outside.keys() - shared - inside, shared
