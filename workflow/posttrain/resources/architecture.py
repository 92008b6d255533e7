"""The shape of an experiment's model, read without torch from the settings, a `config.json` or the fetched model.

posttrain plan [CAMPAIGN]
"""

import math
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from posttrain.config.sections import Scratch
from posttrain.dag import given
from posttrain.dag.plan import Plan
from posttrain.ground.files import read_object
from posttrain.maths import rope

# Families whose feed-forward part has two matrices instead of three with a gate.
UNGATED = ("bloom", "gpt2", "gpt_neox", "opt", "mpt", "gptj", "falcon", "phi")
TIED = ("bloom", "gpt2", "opt", "mpt", "falcon", "gemma", "gemma2")  # default where `config.json` does not set it
# Families for which transformers has no fused attention.
UNFUSED = ("bloom", "mpt", "gemma2", "gpt_oss", "gptj", "gpt_neo", "codegen", "xglm")
# The same of a mixture's experts: their number, those that a token passes, and their width.
EXPERTS = {
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "active": ("num_experts_per_tok", "num_experts_per_token"),
    "width": ("moe_intermediate_size", "intermediate_size"),
}
# Size -> its names in the `config.json` of different families.
NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": given.LAYERS,
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "context": rope.CONTEXT,
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner"),
}


class Architecture(NamedTuple):
    """The shape of a transformer that determines its memory."""

    family: str  # transformers' `model_type`
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int  # width of one head
    intermediate: int  # width of the feed-forward part; of a mixture, of the experts that a token passes
    context: int  # in tokens
    tied: bool  # whether input and output embedding are the same
    biases: int = 0  # parameters of one layer outside its matrices: biases and norms
    counted: int | None = None  # parameters by the headers of its safetensors
    experts: int = 0  # parameters of one layer's experts and router, which are not quantised and get no adapters

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of one layer's matrices, which are quantised and get adapters."""
        wide, narrow, inner, h = self.heads * self.head, self.kv_heads * self.head, self.intermediate, self.hidden
        if self.family == "bloom":
            return {
                "query_key_value": (3 * h, h),
                "dense": (h, h),
                "dense_h_to_4h": (inner, h),
                "dense_4h_to_h": (h, inner),
            }
        attention = {"q_proj": (wide, h), "k_proj": (narrow, h), "v_proj": (narrow, h), "o_proj": (h, wide)}
        if self.experts:
            return attention
        if self.family in UNGATED:
            return attention | {"fc1": (inner, h), "fc2": (h, inner)}
        return attention | {"gate_proj": (inner, h), "up_proj": (inner, h), "down_proj": (h, inner)}

    @property
    def gated(self) -> bool:
        """Whether the feed-forward part has a gate."""
        return self.family not in UNGATED

    @property
    def embeddings(self) -> int:
        """Parameters of the input and output embeddings, which are never quantised."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Number of parameters: counted where the weights are available, else by the shape."""
        ends = 2 * 2 * self.hidden if self.family == "bloom" else self.hidden  # norms before and after all layers
        inside = self.layers * (sum(out * into for out, into in self.linear.values()) + self.biases + self.experts)
        return self.counted or self.embeddings + inside + ends


def of_experiment(plan: Plan, experiment: str) -> Architecture | None:
    """The shape of an experiment's base; None for a model of which nothing is fetched."""
    base = plan.experiments[experiment].base
    if base.scratch:
        return from_scratch(base.scratch, vocabulary(plan, experiment))
    return of_given(given.given(base))


def vocabulary(plan: Plan, experiment: str) -> int:
    """Vocabulary of an experiment's tokenizer: as prepared, else by the settings, else of the tokenizer's model."""
    tokenizer = plan.experiments[experiment].prepare.tokenizer
    size = prepared(plan, experiment).get("vocabulary") or (tokenizer and tokenizer.vocab_size)
    if size:
        return size
    model = in_folder(Path(tokenizer.path)) if tokenizer and tokenizer.path else None
    return model.vocab if model else 32000


def prepared(plan: Plan, experiment: str) -> dict:
    """The data card of an experiment; empty where it is not prepared yet."""
    return _read(f"{plan.folder(experiment, 'prepare')}/metrics.json")


def from_scratch(section: Scratch, vocab: int) -> Architecture:
    """The shape of the model of `base.scratch` (`stages.base.architecture`)."""
    h, head = section.hidden_size, section.hidden_size // section.heads
    same = (section.layers, section.heads, section.heads, head)
    if section.positions == "alibi":
        return Architecture("bloom", vocab, h, *same, 4 * h, section.context, tied=True, biases=13 * h)
    biases = 2 * h + (4 * h if section.locality > 0 else 0)
    return Architecture("llama", vocab, h, *same, section.intermediate_size, section.context, tied=True, biases=biases)


def in_folder(folder: Path) -> Architecture | None:
    """The shape of a model in the transformers format; None where its `config.json` lacks it."""
    return of_given(given.in_folder(str(folder)))


def of_given(model: given.Given) -> Architecture | None:
    """The shape of a given model, its parameters counted where its weights' shapes are known."""
    shape, shapes = from_config(model.config), model.shapes
    if shape is None or not shapes:
        return shape
    tied = not any("lm_head" in name or "embed_out" in name for name in shapes)
    return shape._replace(counted=sum(map(math.prod, shapes.values())), tied=tied)


def from_config(values: dict) -> Architecture | None:
    """The shape in a `config.json` of any family; None where a size is missing."""
    values = values.get("text_config") or values
    family = values.get("model_type", "")
    names_of = NAMES | EXPERTS
    sizes = {key: next((values[name] for name in names if values.get(name)), 0) for key, names in names_of.items()}
    h, heads, vocab = sizes["hidden"], sizes["heads"], values.get("vocab_size")
    if not (h and heads and vocab and sizes["layers"]):
        return None
    kv_heads = 1 if values.get("multi_query") else values.get("num_key_value_heads") or heads
    head = values.get("head_dim") or h // heads
    inner = sizes["intermediate"] or 4 * h
    extra = 13 * h if family in UNGATED else 2 * h
    if values.get("attention_bias") or family == "qwen2":
        extra += (heads + 2 * kv_heads) * head + (h if values.get("attention_bias") else 0)
    tied = values.get("tie_word_embeddings", family in TIED)
    experts = sizes["experts"] * (3 * sizes["width"] + 1) * h
    inner = sizes["active"] * sizes["width"] or inner if experts else inner
    return Architecture(
        family, vocab, h, sizes["layers"], heads, kv_heads, head, inner, sizes["context"] or 2048, tied, extra,
        experts=experts,
    )  # fmt: skip


@cache
def _object(file: str, changed: int) -> dict:
    return read_object(Path(file))


def _read(file: str | Path) -> dict:
    """The JSON object in a file, cached until the file changes; {} where there is none."""
    try:
        return _object(str(file), os.stat(file).st_mtime_ns)
    except OSError:
        return {}
