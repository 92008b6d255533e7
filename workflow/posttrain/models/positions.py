"""A model's position encoding, as part of its contract: written once, checked at every later load.

A wrong encoding raises no error and works on short texts; on longer ones the model collapses.
"""

import functools
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json

BY_LENGTH = ("dynamic", "longrope")  # kinds of RoPE whose frequencies depend on the text's length
METHODS = {"linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "none": "default"}  # in transformers' words


def contract(config, longest_input: int) -> dict:
    """The position encoding of a transformers configuration: `type` (`default`, `linear`, `dynamic`, `yarn`, another of
    transformers', or `alibi`), `factor`, `theta`, `original_context` and `context` in tokens, and all of RoPE's
    `parameters`. longest_input: the tokenizer's limit, the context of a model without a longest position."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    longest = getattr(config, "max_position_embeddings", None) or longest_input
    kind = parameters.get("rope_type", "default")
    factor = float(parameters.get("factor") or 1.0)
    original = int(parameters.get("original_max_position_embeddings") or longest)
    if kind == "linear" and "original_max_position_embeddings" not in parameters:
        original = round(longest / factor)
    return {
        "type": kind if parameters else "alibi" if config.model_type in ("bloom", "mpt") else "other",
        "factor": factor,
        "theta": parameters.get("rope_theta"),
        "original_context": original,
        "context": round(longest * factor) if kind == "dynamic" else longest,
        "parameters": parameters,
    }


def depend_on_length(contract: dict, longest: int) -> bool:
    """Whether the positions of a text of at most `longest` tokens depend on its length."""
    return contract["type"] in BY_LENGTH and longest > contract["original_context"]


def rescale(config, method: str, factor: float) -> None:
    """Set a configuration to a longer context. The model must then be loaded with it: a later change has no effect.

    `dynamic` keeps the longest position, beyond which transformers rescales. Raises UserError for a model without RoPE
    and for one that is already rescaled.
    """
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in parameters:
        raise UserError(f"longctx: {config.model_type} has no RoPE to rescale")
    if parameters.get("rope_type", "default") != "default":
        raise UserError(f"longctx: the model's positions are rescaled already ({parameters['rope_type']})")
    original = config.max_position_embeddings
    rescaled = {"rope_type": METHODS[method], "rope_theta": parameters["rope_theta"]}
    rescaled |= {key: parameters[key] for key in ("partial_rotary_factor",) if key in parameters}
    if method != "none":
        rescaled["factor"] = factor
    if method == "yarn":
        rescaled["original_max_position_embeddings"] = original
    config.rope_parameters = rescaled
    if method != "dynamic":
        config.max_position_embeddings = round(original * factor)


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


def measure_each_row(model) -> None:
    """Make each row of a batch have the frequencies of its own length, as if it were alone, where RoPE depends on it.

    transformers computes them from the longest row of a batch, padding included, and keeps those of an earlier, longer
    batch (5.23). Neither hook changes a model with other positions. Without an attention mask, padding is not known.
    """
    limit = contract(model.config, 0)["original_context"]
    rotations = [module for module in model.modules() if set(BY_LENGTH) & set(_kinds(module).values())]
    for module in rotations:
        module.register_forward_hook(functools.partial(_rotate_each_row, limit), with_kwargs=True)
    if rotations:
        # PEFT calls the `forward` of the model itself, which skips its hooks.
        model.base_model.register_forward_pre_hook(_count_from_padding, with_kwargs=True)
    if rotations and hasattr(model, "generate"):
        model.generate = functools.partial(_generate, model.generate, limit)


def _kinds(module) -> dict:
    """The kinds of RoPE of a module that computes rotations, by its type of layer; of any other module, none."""
    kinds = getattr(module, "rope_type", {})
    return kinds if isinstance(kinds, dict) else {None: kinds}


def _count_from_padding(_, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    """A model's arguments with positions counted from the first token that is not padding."""
    mask, ids = options.get("attention_mask"), options.get("input_ids", options.get("inputs_embeds"))
    if options.get("position_ids") is None and ids is not None and mask is not None and mask.dim() == 2:
        places = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        options = options | {"position_ids": places[:, -ids.shape[1] :]}
    return arguments, options


def _rotate_each_row(limit: int, module, arguments: tuple, options: dict, output: tuple) -> tuple:
    """Cosines and sines, each B x T x width, of a RoPE module by the length of each row.

    limit: the length up to which frequencies do not depend on it. The length is a row's last position + 1; of packed
    rows, that of each row in them, which begins at position 0.
    """
    import torch

    given = dict(zip(("x", "position_ids", "layer_type"), arguments, strict=False)) | options
    kind = _kinds(module).get(given.get("layer_type"))
    if kind not in BY_LENGTH:
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
