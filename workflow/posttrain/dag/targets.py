"""Mistakes in `target_modules` that the names and shapes of the base's weights show, without a library that trains."""

import re
from collections.abc import Iterator

from posttrain.config.stages import Experiment
from posttrain.dag.given import given

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
