"""Train an adapter from the SFT policy with a trainer of TRL that reads the SFT policy's log-probabilities."""

from pathlib import Path

from posttrain.config.sections import Referenced
from posttrain.models import adapters
from posttrain.training import trainers

WATCHED = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "kl", "entropy")


def train(
    trainer_class: type,
    config_class: type,
    section: Referenced,
    start: adapters.Start,
    rows: tuple[list[dict], list[dict]],
    work: Path,
    checkpoints: Path,
    **settings,
) -> dict:
    """Write `work/model`, an adapter, and return its metrics.

    trainer_class, config_class: of TRL. rows: to train on and held out, tokenized, with the log-probabilities of their
    answers under the SFT policy. settings: the method's own, by the names of `config_class`.
    """
    seen, held_out = rows
    with trainers.exact_weights(start.model):
        trainer = trainer_class(
            model=start.model,
            args=config_class(
                **trainers.arguments(section, checkpoints),
                max_length=section.max_length,
                beta=section.beta,
                disable_dropout=section.dropout == 0,
                **settings,
            ),
            processing_class=start.tokenizer,
            **trainers.placeholders(held_out),
        )
    # Computed by the trainer, the log-probabilities would cost a second forward pass each step and, with dropout, draw
    # from the training's random stream.
    trainer.precompute_ref_logps = True
    trainers.give_rows(trainer, section, seen, held_out)
    metrics = trainers.run_measured(trainer, section, checkpoints, WATCHED)
    adapters.publish(trainer.model, start.tokenizer, start.foundation, work / "model")
    return metrics
