"""The safetensors that a model consists of, chosen as transformers chooses them, and their headers.

Other weights may lie beside them: an adapter's, or the same weights in another layout (`consolidated.safetensors`).
"""

import json
import os
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

from posttrain.ground.files import read_object

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SIXTEEN_BITS = ("bfloat16", "float16")
TEXT = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?")  # before a text weight's name


def named(folder: Path, listed: Collection[str] | None = None) -> list[str]:
    """The files that hold a model's weights: the one that `config.json` names as `transformers_weights`, else
    `model.safetensors`, else those of the index; the index comes first where it is used. Empty where there are none.

    listed: the files of the model where not all are in the folder. A file that the index names need not exist.
    """
    first = read_object(folder / "config.json").get("transformers_weights")
    for name in [first] if isinstance(first, str) else [WHOLE, INDEX]:
        if os.path.isfile(folder / name) if listed is None else name in listed:
            return [name, *shards(folder / name)] if name.endswith(".index.json") else [name]
    return []


def shards(index: Path) -> list[str]:
    """The files that an index names, sorted."""
    places = read_object(index).get("weight_map")
    return sorted({str(file) for file in places.values()}) if isinstance(places, dict) else []


def headers(folder: Path) -> dict[str, list[int]]:
    """Weight -> its shape, of the model in a folder; files that cannot be read are left out."""
    files = [str(folder / file) for file in named(folder) if file.endswith(".safetensors")]
    return {name: shape for file in files for name, shape in _header(file).items()}


@cache
def _header(file: str) -> dict[str, list[int]]:
    """The header of a safetensors file: 8 bytes of length, then JSON."""
    try:
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, ValueError, MemoryError, AttributeError, TypeError, KeyError, OverflowError):
        return {}


def own_dtype(config: dict) -> str:
    """The type that a `config.json` names, of a multimodal model its text part; float32 where it names none."""
    parts = [part for part in (config.get("text_config"), config) if isinstance(part, dict)]
    return next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), "float32")


def frozen_dtype(wanted: str | None, config: dict) -> str:
    """The type of a model's frozen weights: the wanted one, else bfloat16 where its `config.json` names a type of 16
    bits, else float32."""
    return wanted or ("bfloat16" if own_dtype(config) in SIXTEEN_BITS else "float32")


def text_name(name: str) -> str | None:
    """The name that a weight of a multimodal model has in its text part alone; None for a weight of another part."""
    inner = TEXT.sub("", name)
    if inner.startswith("lm_head."):
        return inner
    return f"model.{inner}" if inner != name else None
