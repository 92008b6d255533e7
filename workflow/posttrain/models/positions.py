"""How a model reads positions, as a part of its contract: written once, held to by every later load.

Wrong numbers here raise no error and read short texts well: a model simply collapses beyond them.
"""

from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json

METHODS = {"linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "none": "default"}  # in transformers' words


def contract(config, longest_input: int) -> dict:
    """What a transformers configuration says of positions: `type` (`default`, `linear`, `dynamic`, `yarn`, another of
    transformers', or `alibi`), `factor`, `theta`, `original_context` and `context` in tokens, and RoPE's own
    `parameters` in full. longest_input: the tokenizer's, which is the context of a model without a longest position."""
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
    """Set a configuration to a longer context; a model must be loaded with it, for a change afterwards does nothing.

    `dynamic` keeps its longest position: transformers rescales beyond that one. Raises UserError for a model without
    RoPE, and for one that is rescaled already.
    """
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    if "rope_theta" not in parameters:
        raise UserError(f"longctx: {config.model_type} has no RoPE whose frequencies could be rescaled")
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
    """Raise UserError where the model in `folder` would be read with other positions than the contract of `manifest`
    says: that of the model itself, or of an adapter on it."""
    from transformers import AutoConfig

    expected = read_json(manifest.parent / "model" / "policy.json").get("positions")
    if expected is None:
        raise UserError(f"{manifest}: its contract says nothing of positions; remake it: rm {manifest}")
    longest_input = read_json(folder / "tokenizer_config.json").get("model_max_length")
    read = contract(AutoConfig.from_pretrained(folder), longest_input)
    wrong = [f"{key} is {read[key]}, not {expected[key]}" for key in expected if read[key] != expected[key]]
    if wrong:
        raise UserError(
            f"{manifest}: {folder / 'config.json'} would have it read with other positions than it was made with: "
            + "; ".join(wrong)
        )
