"""Measure how exact bfloat16 and NF4 are on the tests' random architectures, and what bfloat16 costs in time.

python benchmarks/dtypes.py [MODEL ...]    # default: all of tests/zoo.py

Differences are shares of the largest logit: of a row behind padding in a batch of two, and of one packed behind
another, against the row alone; of a merge that is rounded to bfloat16, in float32. Times are CPU seconds on one thread.
"""

import inspect
import os
import sys
import tempfile
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "tests")]

import zoo  # noqa: E402

from posttrain.dag.given import UNPACKED  # noqa: E402
from posttrain.models import policy, quantization, targets  # noqa: E402

NF4 = quantization.settings("bfloat16")
TYPES = {"float32": ("float32", None), "bfloat16": ("bfloat16", None), "NF4 and bfloat16": ("bfloat16", NF4)}
SHORT, LONG = 12, 40  # tokens of the rows
SIZES = ((128, 1280), (512, 8192), (1024, 32000))  # width of four layers, words


def exactness(folder: Path, dtype: str, settings: dict | None) -> dict[str, float]:
    """How far the logits of a row move behind padding and, where the family can be packed, behind another row."""
    model = policy.load_model(folder, settings, dtype=dtype).eval()
    random = torch.Generator().manual_seed(0)
    short, long = (torch.randint(5, zoo.VOCABULARY, (1, length), generator=random) for length in (SHORT, LONG))
    gap = LONG - SHORT
    ids = torch.cat([torch.nn.functional.pad(short, (gap, 0)), long])
    mask = torch.ones_like(ids)
    mask[0, :gap] = 0
    positions = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    positions = positions if "position_ids" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        alone = model(short, attention_mask=torch.ones_like(short), use_cache=False).logits[0]
        padded = model(ids, attention_mask=mask, use_cache=False, **positions).logits[0, gap:]
    change = alone.float().log_softmax(dim=-1) - padded.float().log_softmax(dim=-1)
    result = {"padded": policy.largest_difference(alone, padded), "nats": change.abs().mean().item()}
    if model.config.model_type in UNPACKED:
        return result
    places = torch.cat([torch.arange(LONG), torch.arange(SHORT)])[None]
    with torch.no_grad():
        packed = model(torch.cat([long, short], dim=1), position_ids=places, use_cache=False).logits[0, LONG:]
    return result | {"packed": policy.largest_difference(alone, packed)}


def rounding(folder: Path) -> dict[str, float]:
    """How far logits move when a LoRA with random weights is computed in bfloat16, and when its merge is rounded."""

    def adapted(dtype: str):
        torch.manual_seed(0)
        base = policy.load_model(folder, dtype="bfloat16")
        base = quantization.in_float32(base) if dtype == "float32" else base
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets.layers(base, "all-linear"))
        model = peft.get_peft_model(base, config)
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight.data = torch.randn(weight.shape) * 0.05
        return model

    exact = adapted("float32")
    expected = policy.probed(exact)
    arithmetic = policy.largest_difference(expected, policy.probed(adapted("bfloat16")))
    return {"arithmetic": arithmetic, "rounded": policy.round_weights(exact.merge_and_unload(), "bfloat16")}


def cpu_seconds(run) -> float:
    """CPU seconds of a call, after one to warm up."""
    run()
    before = sum(os.times()[:2])
    run()
    return sum(os.times()[:2]) - before


def times(width: int, words: int) -> dict[str, float]:
    """CPU time in bfloat16, in that of float32, of scoring 16 x 96 tokens and of generating 16 x 16."""
    config = LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=words)  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(5, 1000, (16, 96))
    prompts, ratios = ids[:, :32], {}
    options = dict(attention_mask=torch.ones_like(prompts), max_new_tokens=16, min_new_tokens=16, do_sample=False,
                   pad_token_id=0)  # fmt: skip
    runs = {"scoring": lambda: model(ids, use_cache=False), "generating": lambda: model.generate(prompts, **options)}
    with torch.no_grad():
        for name, run in runs.items():
            whole = cpu_seconds(lambda run=run: (model.float(), run()))
            ratios[name] = cpu_seconds(lambda run=run: (model.bfloat16(), run())) / whole
    return ratios


def print_line(name: str, values: dict[str, float]) -> None:
    """Print a line of figures."""
    print(f"{name:32}", "  ".join(f"{key} {value:.1e}" for key, value in values.items()), flush=True)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or zoo.ZOO:
            folder = zoo.write_model(name, Path(scratch, name))
            for kind, (dtype, settings) in TYPES.items():
                print_line(f"{name}, {kind}", exactness(folder, dtype, settings))
            print_line(f"{name}, a LoRA", rounding(folder))
    for width, words in () if names else SIZES:
        print_line(f"width {width}, bfloat16 / float32", times(width, words))


if __name__ == "__main__":
    main(sys.argv[1:])
