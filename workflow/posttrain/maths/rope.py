"""Positions by the values of a `config.json`: their kind, where they end, and RoPE's parameters for a longer context.

Which method extends which RoPE: the frequencies that a model was trained with must be those that are rescaled.

- `default`: any method; of Phi-3, which has `longrope` only, `linear` as one factor of all planes and all lengths.
- `linear` (position interpolation, arXiv 2306.15595, eq. 4) twice is once by the product: (m / f) / s = m / (f s).
- `yarn` (arXiv 2309.00071, section 3.2) from f to f s on the same trained context, as its authors go from 16 to 32
  (section 4.1). Planes that turn often stay; an `attention_factor` that is written down stays too.
- `llama3` (Llama 3.1, arXiv 2407.21783) is YaRN's interpolation by parts with a ramp of its own and without a
  temperature: `yarn` multiplies its factor, so that the slow planes see the angles of training, the fast ones stay.
- `longrope` (arXiv 2402.13753, section 3): `linear` multiplies the factors of long texts; short texts, and the
  temperature that belongs to the trained context, stay.
- `dynamic` (arXiv 2309.00071, appendix B.2) by the product of both factors.
- `ntk` (arXiv 2309.00071, section 3.1) multiplies the base theta by s^(d / (d - 2)), d the width that turns: the
  fastest plane stays and the slowest is divided by s. The result is plain RoPE, so that any method may follow. With
  `linear` it does the same to frequencies that are divided by f. The ramps of `yarn` and `llama3` would move with the
  base, and `dynamic` and `longrope` would change short texts too.
- `modulo`: the frequencies stay, and position p turns by the angles of p mod W, W the trained context. The score of a
  query at m and a key at n then depends on (m - n) - W (m // W - n // W): the distance within a window of W tokens, and
  wrong by W for each window that ends between the two; 0 for two tokens W apart, and negative where n mod W > m mod W.
- Layers with a sliding window never see a distance over it and stay (Gemma 3, arXiv 2503.19786, section 2.1, which
  interpolates its global layers only).
"""

from typing import Any

from posttrain.ground.errors import UserError

BY_LENGTH = ("dynamic", "longrope")  # kinds whose frequencies depend on the text's length
# Kind of a rescaled RoPE -> the methods that extend it.
ON_TOP = {"linear": ("linear", "ntk"), "proportional": ("linear",), "longrope": ("linear",), "yarn": ("yarn",),
          "llama3": ("yarn",), "dynamic": ("dynamic",)}  # fmt: skip
WINDOWS = ("sliding_attention", "chunked_attention")  # types of layers that see a part of the text
# Families with a table of positions.
TABLES = ("gpt2", "gpt-sw3", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "openai-gpt", "ctrl")
TURNS = ("gptj", "codegen")  # families with RoPE that transformers cannot rescale
# Families with other positions, or without any: sinusoidal ones, and recurrent layers that read in order.
OTHER = ("xglm", "cpmant", "xlnet", "mamba", "mamba2", "falcon_mamba", "jamba", "nemotron_h", "rwkv", "xlstm", "zamba",
         "kimi_linear", "inkling_text", "inkling2_text", "cohere_compass_text")  # fmt: skip
LONGROPE_ONLY = ("phi3", "phi4_multimodal")  # families that transformers gives no other kind
# The longest text of a model with dynamic NTK that was tuned on longer ones as it is: `max_position_embeddings` is the
# trained context in its formula, and must stay.
TUNED = "tuned_context"
# The trained context W of a model whose positions are read modulo W. transformers does not know this key.
MODULO = "modulo_context"
# What a model has instead of RoPE by the configuration's frequencies.
INSTEAD = {"alibi": "ALiBi", "turns": "RoPE of its own", "table": "a learned position for each token",
           "other": "neither RoPE nor ALiBi"}  # fmt: skip
THETA = 10000.0  # transformers' default, where a `config.json` has none
WIDTHS = ("head_dim", "qk_rope_head_dim", "kv_channels")  # names of the width of a head, as far as it may turn
# Names of the longest text.
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")


def whole(values: dict) -> dict:
    """RoPE's parameters in the layers that see the whole text; {} where a configuration has none."""
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    nested = [part for kind, part in parameters.items() if isinstance(part, dict) and kind not in WINDOWS]
    return nested[0] if nested else parameters


def kind(values: dict) -> str:
    """`default` or another kind of RoPE, such as `modulo`; or one of INSTEAD: `table` of learned positions, `turns`."""
    family = values.get("model_type")
    if family in ("bloom", "mpt") or values.get("alibi"):
        return "alibi"
    if family in TABLES + TURNS:
        return "table" if family in TABLES else "turns"
    if family in OTHER or ("rope_parameters" in values and not values["rope_parameters"]):
        return "other"
    if values.get(MODULO):
        return "modulo"
    named = whole(values).get("rope_type") or whole(values).get("type") or "default"
    return "longrope" if family in LONGROPE_ONLY and named != "default" else named


def longest(values: dict) -> int | None:
    """The longest text in tokens by the configuration; None where it has none."""
    return next((values[name] for name in CONTEXT if isinstance(values.get(name), int) and values[name]), None)


def context(values: dict) -> int | None:
    """The longest text in tokens that a model is for: of dynamic NTK, the trained context by its factor."""
    trained = longest(values)
    if kind(values) == "dynamic" and trained:
        return values.get(TUNED) or round(trained * float(whole(values).get("factor") or 1.0))
    return trained


def end(values: dict) -> int | None:
    """The number of positions that a model has; None for RoPE and ALiBi, which go on."""
    ends = kind(values) in ("table", "turns") or values.get("model_type") == "mpt"
    return longest(values) if ends else None


def extended(values: dict, method: str, factor: float) -> dict[str, Any]:
    """The values of a configuration that change for `factor` times the context.

    `none` leaves the frequencies. Raises UserError, with the reason, where the method cannot extend the model.
    """
    old, trained, family = kind(values), longest(values), values.get("model_type")
    grown: dict[str, Any] = {name: round(trained * factor) for name in CONTEXT if values.get(name) and trained}
    if method == "modulo":
        return _modulo(values, factor)
    if old == "table":
        raise UserError(f"{family} has a learned position for each of {trained} tokens, and none beyond them")
    if method == "none" and old == "dynamic":
        return {TUNED: round((context(values) or 0) * factor)}
    if method == "none":
        return grown | ({"rope_parameters": _by_layer(values, _ratio(values))} if _ratio(values) else {})
    if old in INSTEAD:
        raise UserError(f"{family} has {INSTEAD[old]}, no RoPE that can be rescaled: set method: none")
    if old != "default" and method not in ON_TOP.get(old, ()):
        ways = " or ".join((*ON_TOP.get(old, ()), "none"))
        raise UserError(f"{family}'s positions are rescaled already ({old}), which {method} cannot extend: set {ways}")
    if method == "ntk":
        return grown | {"rope_parameters": _by_layer(values, _larger_base(values, factor))}
    if family == "phimoe":  # its configuration takes no other than its makers'
        raise UserError(f"transformers knows no {method} for {family}: set none")
    if family in LONGROPE_ONLY and method != "linear":
        raise UserError(f"transformers knows no {method} for {family}, only longrope: set linear or none")
    if values.get("head_dim", 0) is None:  # transformers computes it for default frequencies only (5.23)
        grown["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    parameters = whole(values)
    changed: dict[str, Any] = {"factor": factor * float(parameters.get("factor") or 1.0)}
    if old == "longrope":
        changed = _ratio(values) | {"long_factor": [part * factor for part in parameters["long_factor"]]}
    elif family in LONGROPE_ONLY:
        planes = int(values["hidden_size"] // values["num_attention_heads"] * parameters["partial_rotary_factor"]) // 2
        lists = {"short_factor": [factor] * planes, "long_factor": [factor] * planes}
        changed = {
            "rope_type": "longrope",
            "original_max_position_embeddings": trained,
            "attention_factor": 1.0,
        } | lists
    elif old == "default":
        changed |= {"rope_type": method} | ({"original_max_position_embeddings": trained} if method == "yarn" else {})
    if method == "dynamic":  # the trained context stays, beyond which frequencies follow the length
        grown = {name: value for name, value in grown.items() if name not in CONTEXT}
        grown |= {TUNED: round(values[TUNED] * factor)} if values.get(TUNED) else {}
    return grown | {"rope_parameters": _by_layer(values, changed)}


def _modulo(values: dict, factor: float) -> dict[str, Any]:
    """The values that change where positions are read modulo the context; frequencies stay. Raises UserError."""
    old, family = kind(values), values.get("model_type")
    if old in INSTEAD or not longest(values):
        has = INSTEAD.get(old, "no longest text in its config.json")
        raise UserError(f"{family} has {has}, no RoPE whose positions can be read modulo a context")
    if old in BY_LENGTH:
        raise UserError(
            f"{family}'s frequencies depend on the text's length ({old}), which modulo would hide: set none"
        )
    if old == "modulo":
        raise UserError(f"{family}'s positions are read modulo {values[MODULO]} already: set none")
    return extended(values, "none", factor) | {MODULO: longest(values)}


def _larger_base(values: dict, factor: float) -> dict[str, float]:
    """The base theta by which the slowest plane turns `factor` times slower and the fastest as before. Raises UserError
    where the width of a head is not known."""
    parameters, heads = whole(values), values.get("num_attention_heads")
    head = next((values[name] for name in WIDTHS if values.get(name)), None)
    head = head or (values["hidden_size"] // heads if heads and values.get("hidden_size") else 0)
    width = int(head * parameters.get("partial_rotary_factor", 1.0))
    if width <= 2:
        raise UserError(
            f"{values.get('model_type')}'s configuration does not tell the width of a head, which ntk needs"
        )
    theta = parameters.get("rope_theta") or values.get("rope_theta") or THETA
    return {"rope_theta": theta * factor ** (width / (width - 2))}


def _ratio(values: dict) -> dict[str, float]:
    """The factor by which the context is longer than the trained one, where only the two lengths tell it (Phi-3)."""
    trained, longer = whole(values).get("original_max_position_embeddings"), longest(values)
    return {"factor": longer / trained} if trained and longer and not whole(values).get("factor") else {}


def _by_layer(values: dict, changed: dict) -> dict:
    """RoPE's parameters with changes in the layers that see the whole text."""
    parameters = values.get("rope_parameters") or {}
    if whole(values) is parameters:
        return parameters | changed
    return {name: part if name in WINDOWS or not part else part | changed for name, part in parameters.items()}
