"""Kahneman-Tversky optimisation from the SFT policy, with TRL's KTOTrainer.

python -m posttrain kto --config results/NAME/kto/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reference results/NAME/reference/manifest.json --output results/NAME/kto/manifest.json
"""

from pathlib import Path

from posttrain.config.sections import Kto
from posttrain.data import preferences


def kto(section: Kto, data: Path, base: Path, sft: Path, reference: Path, work: Path, checkpoints: Path) -> dict:
    """Write `work/model`, an adapter or (method `full`) a whole model, and return its metrics."""
    from posttrain.models import adapters, policy, referenced
    from posttrain.training import order
    from posttrain.training.unpaired import KTOConfig, UnpairedTrainer

    start = adapters.load_to_align(section, base, sft)
    rows = preferences.referenced_rows(start.tokenizer, data, reference, section)
    settings: dict = {"loss_type": section.loss, "desirable_weight": section.desirable_weight}
    settings["undesirable_weight"] = section.undesirable_weight
    settings["parts"] = order.parts_of(data, section.rows)
    if section.method == "full" and section.loss == "kto":  # whose reference point is measured at each step
        settings["ref_model"] = policy.load_verified(start.foundation.weights, dtype="float32").requires_grad_(False)
    return referenced.train(UnpairedTrainer, KTOConfig, section, start, rows, reference, work, checkpoints, **settings)
