"""Write a policy as one model directory that transformers and lm-eval can load.

posttrain export results/NAME/sft/manifest.json FOLDER
"""

import shutil
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import permit, verify
from posttrain.ground.progress import say
from posttrain.models.policy import (
    MERGEABLE,
    certified_difference,
    load_tokenizer,
    load_verified,
    merged_policy,
    probed,
    read_contract,
    round_weights,
)
from posttrain.models.quantization import in_float32
from posttrain.reporting import card


def export(policy: Path, folder: Path, dtype: str | None = None) -> None:
    """Merge a LoRA into the (dequantised) base that it was trained on, and save weights and tokenizer.

    dtype: type of the saved weights; None for that of the policy's frozen weights, to which a merge is rounded.

    Raises UserError for an adapter of virtual tokens, which cannot be merged, for a folder that exists, for bytes that
    differ from their manifest, and for a merged model that differs from the policy.
    """
    contract = read_contract(policy)
    if contract["method"] not in (*MERGEABLE, "weights"):
        raise UserError(f"{policy}: {contract['method']} tuning cannot be merged; load it with peft on its base")
    if contract["positions"]["type"] == "modulo":
        modulo = contract["positions"]["original_context"]
        raise UserError(
            f"{policy}: its positions are read modulo {modulo}, which transformers alone does not do: it would read "
            "another model; export one with another longctx.method"
        )
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    base = Path(contract["base_path"]) if contract["base"] else None
    for manifest in filter(None, (policy, base)):
        verify(manifest)
    model, tokenizer = merged_or_whole(policy, base), load_tokenizer(policy)
    round_weights(model, dtype or contract.get("dtype", "float32"))
    ends = model.generation_config.eos_token_id  # a number, several, or None
    if tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):  # it is `prepare.end_of_turn`
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    part = folder.with_name(f".{folder.name}.part")  # the folder appears whole or not at all
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    certify(part, probed(in_float32(model)))
    card.write_exported(policy, part)
    permit(part)
    part.rename(folder)


def merged_or_whole(policy: Path, base: Path | None):
    """A policy as a whole model, its adapter merged in float32. Raises UserError where the merge changes it."""
    if read_contract(policy)["method"] == "weights":
        return load_verified(policy).eval()
    return merged_policy(policy, base)[0]


def certify(folder: Path, logits) -> None:
    """Raise UserError where transformers alone reads another model from the folder. logits: those of the policy."""
    import torch
    from transformers import AutoModelForCausalLM

    problem = f"export: transformers reads another model than the policy from {folder}"
    try:
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except RuntimeError as error:  # weights of another shape
        raise UserError(f"{problem}: {error}") from None
    difference = certified_difference(logits, probed(read), problem)
    say(f"read back by transformers alone: logits differ by {difference:.1g} of the largest")
