"""Direct preference optimisation from the SFT policy, with TRL's DPOTrainer.

python -m posttrain dpo --config results/NAME/dpo/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reference results/NAME/reference/manifest.json --output results/NAME/dpo/manifest.json
"""

from pathlib import Path

from posttrain.config.sections import WHOLE_BATCH, Dpo
from posttrain.data import preferences


def dpo(section: Dpo, data: Path, base: Path, sft: Path, reference: Path, work: Path, checkpoints: Path) -> dict:
    """Write `work/model`, an adapter or (method `full`) a whole model, and return its metrics."""
    from trl import DPOConfig, DPOTrainer

    from posttrain.models import adapters, referenced
    from posttrain.training import order, trainers

    trainers.refuse_parts("dpo.loss", WHOLE_BATCH & set(section.loss), section)
    start = adapters.load_to_align(section, base, sft)
    rows = preferences.referenced_rows(start.tokenizer, data, reference, section)
    settings: dict = {"loss_type": section.loss, "loss_weights": section.loss_weights}
    settings["label_smoothing"] = section.label_smoothing
    settings["parts"] = order.parts_of(data, "preference")
    return referenced.train(DPOTrainer, DPOConfig, section, start, rows, reference, work, checkpoints, **settings)
