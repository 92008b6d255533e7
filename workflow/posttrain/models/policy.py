"""A language model as an artifact: its contract, and loading it exactly as it was trained."""

from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, sha256, write_json
from posttrain.models import positions
from posttrain.models.tokens import template_digest

MERGEABLE = ("lora", "qlora")
MERGE_BOUND = 1e-3  # the difference is 1e-6 when merged into dequantised weights, 0.2 into those before quantisation


def write_contract(folder: Path, method: str, tokenizer, config, base: Path | None = None, quantization=None) -> None:
    """Write `policy.json`, the facts that every later load of this model is checked against.

    method: "weights" for a whole model, else the kind of adapter; base: manifest of the model under an adapter;
    quantization: that of this model when the adapter was trained.
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
    write_json(folder / "policy.json", contract)


def read_contract(manifest: Path) -> dict:
    """The contract of an artifact that holds a language model."""
    file = manifest.parent / "model" / "policy.json"
    if not file.is_file():
        raise UserError(f"{manifest}: is not an artifact of a language model (there is no {file})")
    return read_json(file)


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


def quantization_config(settings: dict, skipped: list[str] | None = None):
    """bitsandbytes' configuration for 4-bit NormalFloat (Dettmers et al., arXiv 2305.14314, section 3).

    skipped: layers that are not quantised; None for transformers' own choice, the output embedding.
    """
    import torch
    from transformers import BitsAndBytesConfig

    from posttrain.training import parallel

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings["double_quantization"],
        bnb_4bit_compute_dtype=getattr(torch, settings["compute"]),
        # The same bytes under another type: FSDP cannot shard integers.
        bnb_4bit_quant_storage=torch.float32 if parallel.sharded else torch.uint8,
        llm_int8_skip_modules=skipped,  # despite its name, for 4 bits too
    )


def load_verified(manifest: Path, quantization: dict | None = None, head: bool = False):
    """The whole model of an artifact, as by `load_model`. Raises UserError where its positions differ from the
    contract's."""
    positions.refuse_other(manifest, manifest.parent / "model")
    return load_model(manifest.parent / "model", quantization, head)


def load_model(folder: Path, quantization: dict | None = None, head: bool = False):
    """A whole model, on the GPU where there is one. quantization: settings for 4 bits; None for float32.

    head: whether to load a classifier with one new output, `score`, instead of a language model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from posttrain.training import parallel

    skipped = ["score"] if head else None
    options = {"quantization_config": quantization_config(quantization, skipped)} if quantization else {}
    kind, labels = (AutoModelForSequenceClassification, {"num_labels": 1}) if head else (AutoModelForCausalLM, {})
    model = kind.from_pretrained(folder, dtype=torch.float32, **options, **labels)
    if quantization:
        keep_quantized_weights(model)
    positions.measure_each_row(model)
    return model.to(parallel.device())


def keep_quantized_weights(model) -> None:
    """Switch off bitsandbytes' repacking of 4-bit weights on CPUs with AVX512-BF16.

    The repacking happens in place in the first forward pass in evaluation mode and is never undone. After it,
    gradients, merging and saving are wrong without an error (bitsandbytes 0.50.2).
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_merged(policy: Path, base: Path | None = None):
    """A policy ready for use, `(model, tokenizer)`, with its adapter merged into the weights where possible.

    A LoRA trained on quantised weights is merged into the same weights, dequantised, so that the merged model computes
    the trained function. policy, base: manifests; base is needed for adapters.
    Raises UserError where the adapter was trained on another base.
    """
    from peft import PeftModel

    contract, tokenizer = read_contract(policy), load_tokenizer(policy)
    if contract["method"] == "weights":
        return load_verified(policy).eval(), tokenizer
    if base is None or sha256(base) != contract["base"]:
        raise UserError(f"{policy}: its adapter was trained on another base than {base}")
    positions.refuse_other(policy, base.parent / "model")
    model = load_verified(base, contract["quantization"])
    if contract["quantization"]:
        model = model.dequantize()
    model = PeftModel.from_pretrained(model, policy.parent / "model")
    if contract["method"] in MERGEABLE:
        model = model.merge_and_unload()
    return model.eval(), tokenizer


def merge_difference(adapted, merged, seed: int = 0, tokens: int = 64) -> float:
    """Largest difference between the logits of a merged model and of its adapter on the training weights, divided by
    the
    largest logit, on random tokens. Raises UserError over `MERGE_BOUND`: the merged model would be another function."""
    import torch

    ids = torch.randint(adapted.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        one, other = (model.eval()(ids.to(model.device), use_cache=False).logits.float() for model in (adapted, merged))
    difference = ((one - other).abs().max() / one.abs().max()).item()
    if not difference <= MERGE_BOUND:
        raise UserError(
            f"the merged model differs from the adapter on its weights: logits differ by {difference:.2g} of the "
            f"largest, allowed {MERGE_BOUND}"
        )
    return difference


def certify_merge(policy: Path, base: Path, merged) -> float:
    """`merge_difference` between a merged policy and its adapter on the (quantised) base, which is loaded here."""
    from peft import PeftModel

    quantization = read_contract(policy)["quantization"]
    adapted = load_verified(base, quantization and quantization | {"compute": "float32"})  # to compare weights only
    return merge_difference(PeftModel.from_pretrained(adapted, policy.parent / "model"), merged)
