"""Rows of a matrix that holds queries, keys and values, by the attributes of a transformers configuration."""

from collections.abc import Collection

PARTS = ("query", "key", "value")
# Family -> the name of the matrix in transformers.
MATRICES = {"gpt2": "c_attn", "gpt_bigcode": "c_attn", "mpt": "Wqkv", "phi3": "qkv_proj", "bloom": "query_key_value",
            "falcon": "query_key_value", "gpt_neox": "query_key_value"}  # fmt: skip
EACH_HEAD = ("bloom", "gpt_neox")  # families with query, key and value of the first head, then of the next


def rows(config, parts: Collection[str]) -> list[bool]:
    """Whether each row of the matrix of a family of MATRICES belongs to one of the parts.

    Rows come in equal groups of heads: queries, then keys, then values.
    """
    family, heads = config.model_type, config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys, groups = heads, 1  # heads of the keys, and groups of rows
    if family == "phi3":
        keys = config.num_key_value_heads
    elif family == "falcon" and config.new_decoder_architecture:
        keys = groups = config.num_kv_heads
    elif family in ("falcon", "gpt_bigcode"):
        keys, groups = (1, 1) if config.multi_query else (heads, heads)
    elif family in EACH_HEAD:
        groups = heads
    sizes = [head * heads // groups, head * keys // groups, head * keys // groups]
    return [part in parts for part, size in zip(PARTS, sizes, strict=True) for _ in range(size)] * groups
