"""Direct preference optimisation from the SFT policy, with TRL's DPOTrainer.

python -m posttrain dpo --config results/NAME/dpo/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reference results/NAME/reference/manifest.json --output results/NAME/dpo/manifest.json
"""

from pathlib import Path

from posttrain.config.sections import WHOLE_BATCH, Dpo
from posttrain.data import preferences

WATCHED = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "entropy")


def dpo(section: Dpo, data: Path, base: Path, sft: Path, reference: Path, work: Path, checkpoints: Path) -> dict:
    """Write `work/model`, an adapter, and return its metrics."""
    from trl import DPOConfig, DPOTrainer

    from posttrain.models import adapters
    from posttrain.training import trainers

    trainers.refuse_parts("dpo.loss", WHOLE_BATCH & set(section.loss), section)
    foundation, tokenizer, model = adapters.load_to_align(section, base, sft)
    train, test = (preferences.with_reference(tokenizer, data, reference, side, section) for side in ("train", "test"))
    with trainers.exact_weights(model):
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                **trainers.arguments(section, checkpoints),
                max_length=section.max_length,
                beta=section.beta,
                loss_type=section.loss,
                loss_weights=section.loss_weights,
                label_smoothing=section.label_smoothing,
                disable_dropout=section.dropout == 0,
            ),
            processing_class=tokenizer,
            **trainers.placeholders(test),
        )
    # The pairs bring their reference log-probabilities as columns; computed here, they would cost a second forward
    # pass each step and, with dropout, draw from the training's random stream.
    trainer.precompute_ref_logps = True
    trainers.give_rows(trainer, section, preferences.relabelled(train, section.labels, section.seed), test)
    metrics = trainers.run_measured(trainer, section, checkpoints, WATCHED)
    adapters.publish(trainer.model, tokenizer, foundation, work / "model")
    return metrics
