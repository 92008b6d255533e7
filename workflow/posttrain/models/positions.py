"""A model's position encoding, as part of its contract: written once, checked at every later load.

A wrong encoding raises no error and works on short texts; on longer ones the model collapses.
"""

import functools
import inspect
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json
from posttrain.maths import rope

ARGUMENTS = ("x", "position_ids", "layer_type")  # of transformers' modules that compute RoPE


def values_of(config) -> dict:
    """The values of a transformers configuration; `rope_parameters` is None in one that knows none."""
    return config.to_dict() | {"rope_parameters": getattr(config, "rope_parameters", None)}


def contract(config, longest_input: int) -> dict:
    """The position encoding of a transformers configuration: `type` (by `rope.kind`), `factor`, `theta`,
    `original_context` and `context` in tokens, and all of RoPE's `parameters`; where layers differ, those of the layers
    that see the whole text. longest_input: the tokenizer's limit, the context of a model without a longest position."""
    values = values_of(config)
    parameters, kind = rope.whole(values), rope.kind(values)
    longest = rope.longest(values) or longest_input
    factor = float(parameters.get("factor") or 1.0)
    original = int(values.get(rope.MODULO) or parameters.get("original_max_position_embeddings") or longest)
    if kind == "linear" and "original_max_position_embeddings" not in parameters:
        original = round(longest / factor)
    return {
        "type": kind,
        "factor": factor,
        "theta": parameters.get("rope_theta"),
        "original_context": original,
        "context": rope.context(values) or longest,
        "parameters": dict(values["rope_parameters"] or {}),
    }


def depend_on_length(contract: dict, longest: int) -> bool:
    """Whether the positions of a text of at most `longest` tokens depend on its length."""
    return contract["type"] in rope.BY_LENGTH and longest > contract["original_context"]


def rescale(config, method: str, factor: float) -> None:
    """Set a configuration to a longer context. The model must then be loaded with it: a later change has no effect.

    Raises UserError where the method cannot extend the model (`rope.extended`).
    """
    for key, value in rope.extended(values_of(config), method, factor).items():
        setattr(config, key, value)


def make_room(model, longest: int) -> int:
    """Tokens of text that fit into a model: `longest`, or fewer where its positions end; virtual tokens take some.

    MPT's ALiBi, which transformers makes for the configured length in every forward pass, is made longer.
    """
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    if model.config.model_type == "mpt" and not virtual:
        model.config.max_seq_len = max(model.config.max_seq_len, longest)
    last = rope.end(values_of(model.config))
    return min(longest, last - virtual) if last else longest


def refuse_other(manifest: Path, folder: Path) -> None:
    """Raise UserError where the positions of the model in `folder` differ from the contract of `manifest`, which is
    that
    of the model itself or of an adapter on it."""
    from transformers import AutoConfig

    expected = read_json(manifest.parent / "model" / "policy.json").get("positions")
    if expected is None:
        raise UserError(f"{manifest}: its contract has no positions; remake it: rm {manifest}")
    longest_input = read_json(folder / "tokenizer_config.json").get("model_max_length")
    read = contract(AutoConfig.from_pretrained(folder), longest_input)
    wrong = [f"{key} is {read[key]}, not {expected[key]}" for key in expected if read[key] != expected[key]]
    if wrong:
        raise UserError(
            f"{manifest}: the positions in {folder / 'config.json'} differ from those that it was trained with: "
            + "; ".join(wrong)
        )


def skip_padding(model) -> bool:
    """Whether padding between a prefix and a text changes nothing: it takes no positions and fills no window."""
    windows = [getattr(model.config, name, None) for name in ("sliding_window", "window_size")]
    return not any(windows) and "position_ids" in inspect.signature(model.get_base_model().forward).parameters


def measure_each_row(model) -> None:
    """Make each row of a batch have the frequencies of its own length, as if it were alone, where RoPE depends on it.

    transformers computes them from the longest row of a batch, padding included, and keeps those of an earlier, longer
    batch (5.23). Neither hook changes a model with other positions. Without an attention mask, padding is not known.
    """
    limit = contract(model.config, 0)["original_context"]
    rotations = [module for module in model.modules() if set(rope.BY_LENGTH) & set(_kinds(module).values())]
    for module in rotations:
        module.register_forward_hook(functools.partial(_rotate_each_row, limit), with_kwargs=True)
    if rotations:
        # PEFT calls the `forward` of the model itself, which skips its hooks.
        model.base_model.register_forward_pre_hook(_count_from_padding, with_kwargs=True)
    if rotations and hasattr(model, "generate"):
        model.generate = functools.partial(_generate, model.generate, limit)


def read_modulo(model) -> None:
    """Make RoPE of a model with `rope.MODULO` turn each token by its position modulo that number.

    Nothing else sees such positions: where `position_ids` begin again, transformers reads several rows, which do not
    attend to each other. Positions count from the first token that is not padding; a cached key was turned by its own.
    Raises UserError where the model has no module that computes RoPE.
    """
    modulo = values_of(model.config).get(rope.MODULO)
    if not modulo:
        return
    rotations = [module for module in model.modules() if _kinds(module)]
    if not rotations:
        raise UserError(f"{model.config.model_type} has no RoPE whose positions can be read modulo {modulo}")
    for module in rotations:
        module.register_forward_pre_hook(functools.partial(_take_modulo, modulo), with_kwargs=True)
    model.base_model.register_forward_pre_hook(_count_from_padding, with_kwargs=True)


def _take_modulo(modulo: int, _, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    """The arguments of a RoPE module with positions modulo a number."""
    given = dict(zip(ARGUMENTS, arguments, strict=False)) | options
    return (), given | {"position_ids": given["position_ids"] % modulo}


def _kinds(module) -> dict:
    """The kinds of RoPE of a module that computes rotations, by its type of layer; of any other module, none."""
    kinds = getattr(module, "rope_type", {})
    return kinds if isinstance(kinds, dict) else {None: kinds}


def _count_from_padding(_, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    """A model's arguments with positions counted from the first token that is not padding."""
    mask = options.get("attention_mask")
    states = options.get("inputs_embeds") if options.get("input_ids") is None else options["input_ids"]
    if options.get("position_ids") is None and states is not None and mask is not None and mask.dim() == 2:
        places = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        options = options | {"position_ids": places[:, -states.shape[1] :]}
    return arguments, options


def _rotate_each_row(limit: int, module, arguments: tuple, options: dict, output: tuple) -> tuple:
    """Cosines and sines, each B x T x width, of a RoPE module by the length of each row.

    limit: the length up to which frequencies do not depend on it. The length is a row's last position + 1; of packed
    rows, that of each row in them, which begins at position 0.
    """
    import torch

    given = dict(zip(ARGUMENTS, arguments, strict=False)) | options
    kind = _kinds(module).get(given.get("layer_type"))
    if kind not in rope.BY_LENGTH:
        return output
    states, places = given.pop("x"), given.pop("position_ids")
    rows = (places == 0).long().cumsum(dim=1)
    last = torch.zeros_like(torch.nn.functional.pad(places, (1, 0))).scatter_reduce(1, rows, places, "amax")
    lengths = last.gather(1, rows).add(1).clamp(limit, limit + 1 if kind == "longrope" else None)
    for length in lengths.unique():
        module.forward(states[:1, :1], torch.zeros_like(places[:1, :1]), **given)  # forgets an earlier, longer text
        of_length = module.forward(states, places.where(lengths == length, 0), **given)
        output = tuple(map(functools.partial(torch.where, (lengths == length)[..., None]), of_length, output))
    return output


def _generate(generate, limit: int, *arguments, **options):
    """A model's own `generate`; without a cache where the text can exceed the `limit`, since a cache would hold keys
    that were rotated by the frequencies of a shorter text (arXiv 2309.00071, section 3.3)."""
    config, ids = options.get("generation_config"), options.get("input_ids")
    added = options.get("max_new_tokens") or getattr(config, "max_new_tokens", None)
    longest = options.get("max_length") or (ids.shape[1] + added if ids is not None and added else limit + 1)
    return generate(*arguments, **options | {"use_cache": longest <= limit})
