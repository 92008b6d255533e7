"""Identities of LoRA, prefix tuning and prompt tuning, by PEFT with the configurations of `models/methods.py`.

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685); prefix tuning, Li and Liang 2021 (arXiv 2101.00190); prompt tuning,
Lester et al. 2021 (arXiv 2104.08691).
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import peft

from posttrain.config.sections import Sft
from posttrain.identities import small
from posttrain.identities.small import INNER, LAYERS, NARROW, WIDTH, Identity, largest
from posttrain.models import methods, policy, quantization
from posttrain.training import trainers

RANK, ALPHA, TOKENS = 4, 24.0, 8


def tuned(model=None, **settings) -> peft.PeftModel:
    """A small Llama with what a method of SFT trains."""
    section = Sft(**{"rank": RANK, "alpha": ALPHA, "virtual_tokens": TOKENS} | settings)
    model = model or small.llama()
    return peft.get_peft_model(model, methods.adapter(section, model)).eval()


@contextlib.contextmanager
def trained_adapter(model) -> Iterator[Path]:
    """The folder of a LoRA for a model, with a B that is not 0."""
    adapted = tuned(model, method="lora")
    small.draw_b(adapted)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        adapted.unload()
        yield Path(folder)


def lora_count() -> Identity:
    """Deviation of the trained parameters from r (d_in + d_out), summed over the linear layers (2106.09685, section
    4.1). Control: the count of another rank."""
    count = trainers.trainable(tuned(method="lora"))
    attention = 2 * (WIDTH + WIDTH) + 2 * (WIDTH + NARROW)  # queries and output, keys and values
    sizes = LAYERS * (attention + 3 * (WIDTH + INNER))
    return abs(count - RANK * sizes), abs(count - (RANK + 1) * sizes)


def lora_start() -> Identity:
    """With B = 0 the adapted model is the base: largest difference of logits (2106.09685, section 4.1). Control: B is
    drawn."""
    base = small.llama()
    expected = policy.probed(base)
    adapted = tuned(base, method="lora")
    start = policy.probed(adapted)
    small.draw_b(adapted)
    return largest(start, expected), largest(policy.probed(adapted), expected)


def lora_merge() -> Identity:
    """W merged - W = (alpha / r) B A, in every layer (2106.09685, eq. 3). Control: without alpha / r."""
    model = small.llama()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with trained_adapter(model) as folder:
        merged, _ = policy.merge(model, folder, "algebra")
        state = peft.load_peft_weights(folder, device="cpu")
    after, off = dict(merged.named_parameters()), {1.0: 0.0, ALPHA / RANK: 0.0}
    for key in (key for key in state if key.endswith("lora_A.weight")):
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        product = state[key.replace("lora_A", "lora_B")] @ state[key]
        for scale in off:
            off[scale] = max(off[scale], largest(after[name] - before[name], scale * product))
    return off[ALPHA / RANK], off[1.0]


def lora_merge_logits() -> Identity:
    """A LoRA on weights in NF4, merged into these weights, is the trained function: the certified difference of logits,
    a share of the largest. Control: merged into the weights before quantisation."""
    model = small.llama()
    with tempfile.TemporaryDirectory() as folder, trained_adapter(model) as adapter:
        model.save_pretrained(folder)
        loaded = policy.load_model(Path(folder), quantization.settings("float32"))
        expected = policy.probed(peft.PeftModel.from_pretrained(loaded, adapter))
        loaded = policy.load_model(Path(folder), quantization.settings("float32"))
        _, difference = policy.merge(loaded, adapter, "algebra")
        unquantised, _ = policy.merge(policy.load_model(Path(folder)), adapter, "algebra")
        return difference, policy.largest_difference(expected, policy.probed(unquantised))


def prefix_count() -> Identity:
    """Deviation of the trained parameters from tokens x layers x 2 x the width of the keys (2101.00190, section 4.2).
    Control: the width of the queries."""
    count = trainers.trainable(tuned(method="prefix"))
    right, other = (TOKENS * LAYERS * 2 * width for width in (NARROW, WIDTH))
    return abs(count - right), abs(count - other)


def prompt_count() -> Identity:
    """Deviation of the trained parameters from tokens x the width of the embeddings (2104.08691, section 2). Control:
    prefix tuning's count."""
    count = trainers.trainable(tuned(method="prompt"))
    return abs(count - TOKENS * WIDTH), abs(count - TOKENS * LAYERS * 2 * NARROW)
