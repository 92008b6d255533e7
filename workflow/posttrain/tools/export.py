"""Write a policy as one model directory that transformers and lm-eval can load.

posttrain export results/NAME/sft/manifest.json FOLDER
"""

import shutil
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import verify
from posttrain.ground.progress import say
from posttrain.models.policy import MERGEABLE, certified_difference, load_merged, probed, read_contract
from posttrain.reporting import card


def export(policy: Path, folder: Path) -> None:
    """Merge a LoRA into the (dequantised) base that it was trained on, and save weights and tokenizer.

    Raises UserError for an adapter of virtual tokens, which cannot be merged, for a folder that exists, for bytes that
    differ from their manifest, and for a merged model that differs from the policy.
    """
    contract = read_contract(policy)
    if contract["method"] not in (*MERGEABLE, "weights"):
        raise UserError(f"{policy}: {contract['method']} tuning cannot be merged; load it with peft on its base")
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    base = Path(contract["base_path"]) if contract["base"] else None
    for manifest in filter(None, (policy, base)):
        verify(manifest)
    model, tokenizer = load_merged(policy, base)
    ends = model.generation_config.eos_token_id  # a number, several, or None
    if tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):  # it is `prepare.end_of_turn`
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    part = folder.with_name(f".{folder.name}.part")  # the folder appears whole or not at all
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    certify(part, probed(model))
    card.write_exported(policy, part)
    part.rename(folder)


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
