"""A language model as an artifact: its contract, and loading it exactly as it was trained."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from posttrain.config.sections import Judgement
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, sha256, write_json
from posttrain.ground.progress import say
from posttrain.models import positions
from posttrain.models import quantization as nf4

MERGEABLE = ("lora", "qlora")
MERGE_BOUND = 1e-3  # the difference is 1e-6 when merged into dequantised weights, 0.2 into those before quantisation
OTHER_FUNCTION = (
    "the merged model differs from the adapter on its weights, as where the adapter is on weights that two layers "
    "share (tie_word_embeddings)"
)
CHANCE = ("drop", "jitter", "aux_loss", "z_loss")  # parts of the names of settings of training alone


def template_digest(tokenizer) -> str | None:
    """sha256 of the chat template, as lm-eval records it."""
    template = tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest() if template else None


def write_contract(
    folder: Path,
    method: str,
    tokenizer,
    config,
    base: Path | None = None,
    quantization=None,
    form: str | None = None,
    dtype: str = "float32",
    fused_parts: Sequence[str] | None = None,
) -> None:
    """Write `policy.json`, the facts that every later load of this model is checked against.

    method: "weights" for a whole model, "reward" for a reward model, else the kind of adapter; base: manifest of the
    model under an adapter; quantization: that of this model when the adapter was trained; form: that of its training
    rows (`tokens.form_of`), which is recorded where it is `plain`; dtype: type of the frozen weights, which is
    recorded where it is not float32; fused_parts: of `sft`, which every later stage keeps to.
    """
    contract = {
        "method": method,
        "base": sha256(base) if base else None,
        "base_path": str(base) if base else None,
        "quantization": quantization,
        "chat_template": template_digest(tokenizer),
        "special_tokens": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "positions": positions.contract(config, tokenizer.model_max_length),
    }
    contract |= {"form": form} if form == "plain" else {}
    contract |= {"fused_parts": fused_parts} if fused_parts else {}
    write_json(folder / "policy.json", contract | ({"dtype": dtype} if dtype != "float32" else {}))


def publish_whole(model, tokenizer, folder: Path, form: str | None, dtype: str, method: str = "weights") -> None:
    """Write a whole trained model, its tokenizer and its contract; equal weights give equal bytes. Every process must
    call it; the first writes.

    dtype: type to store the weights in, to whose values they are rounded (`trainers.round_trained`). form, method: as
    in `write_contract`.
    """
    from posttrain.training import parallel

    state = parallel.gathered(model)
    if not parallel.main():
        return
    if state is None:  # a shard stays in float32: its values are those of the type
        store_as(model, dtype)
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    write_contract(folder, method, tokenizer, model.config, form=form, dtype=dtype)


def read_contract(manifest: Path) -> dict:
    """The contract of an artifact that holds a language model."""
    file = manifest.parent / "model" / "policy.json"
    if not file.is_file():
        raise UserError(f"{manifest}: is not an artifact of a language model (there is no {file})")
    return read_json(file)


def dtype_of(manifest: Path) -> str:
    """The type of the frozen weights that an artifact is, or that its adapter is on."""
    return read_contract(manifest).get("dtype", "float32")


def load_tokenizer(manifest: Path):
    """The tokenizer of a policy. Raises UserError where its chat template is not the one of training."""
    from transformers import AutoTokenizer

    expected = read_contract(manifest)["chat_template"]
    tokenizer = AutoTokenizer.from_pretrained(manifest.parent / "model")
    digest = template_digest(tokenizer)
    if expected != digest:
        raise UserError(
            f"{manifest.parent / 'model'}: its chat template (sha256 {digest}) is not the one that it was trained "
            f"with ({expected}); remake it: rm {manifest} and run snakemake again"
        )
    return tokenizer


def load_verified(manifest: Path, quantization: dict | None = None, head: bool = False, dtype: str | None = None):
    """The whole model of an artifact, as by `load_model`. dtype: None for the contract's. Raises UserError where its
    positions differ from the contract's."""
    positions.refuse_other(manifest, manifest.parent / "model")
    return load_model(manifest.parent / "model", quantization, head, dtype or dtype_of(manifest))


def load_model(folder: Path, quantization: dict | None = None, head: bool = False, dtype: str = "float32"):
    """A whole model, on the GPU where there is one. quantization: settings for 4 bits; None for none. dtype: type of
    all weights, or of those that are not quantised.

    head: whether to load a classifier with one new output, `score`, instead of a language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from posttrain.training import parallel

    skipped = ["score"] if head else None
    options = {"quantization_config": nf4.configuration(quantization, skipped)} if quantization else {}
    kind, labels = (AutoModelForSequenceClassification, {"num_labels": 1}) if head else (AutoModelForCausalLM, {})
    config = without_chance(AutoConfig.from_pretrained(folder, **labels))
    model = kind.from_pretrained(folder, config=config, dtype=getattr(torch, dtype), **options)
    if quantization:
        nf4.finish(model)
    positions.measure_each_row(model)
    positions.read_modulo(model)
    if not hasattr(model, model.base_model_prefix):  # the text part of Llama 4 in transformers 5.23; TRL reads it
        model.base_model_prefix = "model"
    return model.to(parallel.device())


def without_chance(config):
    """A configuration without the model's own dropout, noise and router loss, with which a loss in training depends on
    the random stream and on the micro-batch."""
    for key, value in vars(config).items():
        if hasattr(value, "to_dict"):
            without_chance(value)
        elif any(part in key for part in CHANCE) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def load_policy(policy: Path, base: Path | None = None, merge: bool | None = None, quantize: str | None = None):
    """A policy ready for use, `(model, tokenizer)`. policy, base: manifests; base is needed for adapters.

    merge: whether an adapter is merged, where that is possible, or stays on the weights that it was trained on,
    quantised as in training; None to merge into weights in float32 only, since merging rounds others. quantize: type
    of 4 bits to which a whole model is quantised. Raises UserError where the adapter was trained on another base, and
    where the merged model is another function.
    """
    contract, tokenizer, dtype = read_contract(policy), load_tokenizer(policy), dtype_of(policy)
    if contract["method"] == "weights":
        return load_verified(policy, nf4.settings(dtype, kind=quantize) if quantize else None).eval(), tokenizer
    if contract["method"] in MERGEABLE and (dtype == "float32" if merge is None else merge):
        model, _ = merged_policy(policy, base)
        round_weights(model, dtype)
        return model, tokenizer
    from peft import PeftModel

    return PeftModel.from_pretrained(load_under(policy, base), policy.parent / "model").eval(), tokenizer


def quantize_warnings(section: Judgement, policy: Path) -> list[str]:
    """A warning, which is printed, of a whole model that is quantised to be judged; else no warning."""
    if not section.four_bits or read_contract(policy)["method"] != "weights":
        return []
    warning = f"judged in {section.four_bits.upper()}, as quantize asks, and not in its own weights"
    say(f"warning: {policy.parent.name} is {warning}")
    return [warning]


def load_under(policy: Path, base: Path | None):
    """The model under a policy's adapter, quantised as in training. Raises UserError for another base."""
    contract = read_contract(policy)
    if base is None or sha256(base) != contract["base"]:
        raise UserError(f"{policy}: its adapter was trained on another base than {base}")
    positions.refuse_other(policy, base.parent / "model")
    quantization = contract["quantization"]
    if quantization and dtype_of(base) == "float32":
        quantization = quantization | {"compute": "float32"}  # exact, and the weights are the same
    return load_verified(base, quantization)


def merged_policy(policy: Path, base: Path | None) -> tuple:
    """(a policy with its LoRA merged into its base, in float32; `certified_difference`). Raises UserError as
    `load_policy`."""
    model, difference = merge(load_under(policy, base), policy.parent / "model", name=str(policy))
    say(f"merged: logits differ by {difference:.1g} of the largest")
    return model, difference


def merge(model, adapter: Path, name: str) -> tuple:
    """(a model with a LoRA merged into its weights, `certified_difference`). name: of the policy, for messages.

    A LoRA that was trained on quantised weights is merged into the same weights, dequantised, so that the merged model
    computes the trained function. Weights of 16 bits become float32: arithmetic in bfloat16 changes logits by up to 2 %
    of the largest, a mixture's by 20 % (a token takes another expert), which would hide another function.
    """
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(nf4.in_float32(model), adapter).eval()
    expected = probed(adapted)
    if getattr(model, "is_loaded_in_4bit", False):
        adapted = PeftModel.from_pretrained(nf4.dequantized(adapted.unload()), adapter)
    merged = adapted.merge_and_unload().eval()
    return merged, certified_difference(expected, probed(merged), f"{name}: {OTHER_FUNCTION}")


def probed(model, seed: int = 0, tokens: int = 64):
    """A model's logits on random tokens: 2 rows, shorter where its context is."""
    import torch

    length = min(tokens, getattr(model.config, "max_position_embeddings", None) or tokens)
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(ids.to(model.device), use_cache=False).logits.float().cpu()


def largest_difference(expected, logits) -> float:
    """Largest difference between two models' logits, divided by the largest logit of the first."""
    return ((expected - logits).abs().max() / expected.abs().max()).item()


def certified_difference(expected, logits, problem: str) -> float:
    """`largest_difference` between a model's logits and those `expected` of it.

    Raises UserError over `MERGE_BOUND`: it is another function. problem: beginning of the message.
    """
    difference = largest_difference(expected, logits)
    if not difference <= MERGE_BOUND:
        raise UserError(f"{problem}: logits differ by {difference:.2g} of the largest, allowed {MERGE_BOUND}")
    return difference


def round_weights(model, dtype: str) -> float | None:
    """Round the weights of a model in float32 to a type, and store them in it; returns the `largest_difference` of its
    logits, None where nothing is rounded.

    The logits are computed in float32 before and after, so that they differ by the weights alone.
    """
    import torch

    if dtype == "float32" or model.dtype != torch.float32:
        return None
    expected = probed(model)
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, dtype)).float()
    difference = largest_difference(expected, probed(model))
    say(f"rounded to {dtype}: logits differ by {difference:.1g} of the largest")
    store_as(model, dtype)
    return difference


def store_as(model, dtype: str) -> None:
    """Store the weights of a model in a type; buffers, such as the frequencies of positions, stay in float32."""
    import torch

    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, dtype))
