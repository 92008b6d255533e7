"""A model's position encoding, as part of its contract: written once, checked at every later load.

A wrong encoding raises no error and works on short texts; on longer ones the model collapses.
"""

from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json

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
