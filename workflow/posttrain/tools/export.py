"""Write a policy as one model directory that transformers and lm-eval can load.

posttrain export results/NAME/sft/manifest.json FOLDER
"""

from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import verify
from posttrain.ground.progress import say
from posttrain.models.policy import MERGEABLE, certify_merge, load_merged, read_contract
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
    if base:
        say(f"merged: logits differ by {certify_merge(policy, base, model):.1g} of the largest")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card.write_exported(policy, folder)
