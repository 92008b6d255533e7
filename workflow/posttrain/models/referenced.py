"""Train an adapter from the SFT policy, with a trainer of TRL and precomputed log-probabilities of the SFT policy."""

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

    trainer_class, config_class: TRL's. rows: training and held-out rows, tokenized, with the log-probabilities of their
    answers under the SFT policy. settings: further arguments of `config_class`.
    """
    train_rows, held_out = rows
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
    # Otherwise the trainer would compute the log-probabilities in a second forward pass each step and, with dropout,
    # draw from the training's random stream.
    trainer.precompute_ref_logps = True
    trainers.give_rows(trainer, section, train_rows, held_out)
    metrics = trainers.run_measured(trainer, section, checkpoints, WATCHED)
    adapters.publish(trainer.model, start.tokenizer, start.foundation, work / "model")
    return metrics
