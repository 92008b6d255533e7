"""Train the SFT policy, by an adapter or whole, with a trainer of TRL and its precomputed log-probabilities."""

from collections.abc import Sequence
from pathlib import Path

import torch

from posttrain.config.sections import Referenced
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_object
from posttrain.ground.progress import say
from posttrain.models import adapters, completions, policy
from posttrain.training import trainers
from posttrain.training.order import Part

PROVED = 8  # rows whose log-probabilities are computed again before the first step
NOISE = {"float32": 1e-3, "bfloat16": 3e-2}  # nats for each token, by the arithmetic
WATCHED = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "kl", "entropy")
FALLEN = 1.0  # nats; a larger fall of the chosen answers' log-probability is a warning


def train(
    trainer_class: type,
    config_class: type,
    section: Referenced,
    start: adapters.Start,
    rows: tuple[list[dict], list[dict]],
    reference: Path,
    work: Path,
    checkpoints: Path,
    parts: Sequence[Part] = (),
    ref_model=None,
    **settings,
) -> dict:
    """Write `work/model`, an adapter or (method `full`) a whole model, and return its metrics.

    trainer_class, config_class: TRL's. rows: training and held-out rows, tokenized, with the log-probabilities of their
    answers under the SFT policy. reference: manifest of these. parts: see `order.parts_of`. ref_model: the SFT policy,
    for a trainer of all weights that needs it at each step. settings: further arguments of `config_class`.
    """
    prove_reference(section, start, rows[0][:PROVED], reference)
    trainer = trainer_of(trainer_class, config_class, section, start, rows, checkpoints, parts, ref_model, **settings)
    metrics = run_measured(trainer, section, checkpoints, policy.dtype_of(start.foundation.weights))
    adapters.publish(trainer.model, start.tokenizer, start.foundation, work / "model")
    return metrics


def trainer_of(
    trainer_class: type,
    config_class: type,
    section: Referenced,
    start: adapters.Start,
    rows: tuple[list[dict], list[dict]],
    checkpoints: Path,
    parts: Sequence[Part] = (),
    ref_model=None,
    **settings,
):
    """TRL's trainer with its rows; arguments as in `train`."""
    train_rows, held_out = rows
    with trainers.exact_weights(start.model):
        trainer = trainer_class(
            model=start.model,
            ref_model=ref_model,
            args=config_class(
                **trainers.arguments(section, checkpoints),
                max_length=section.max_length,
                beta=section.beta,
                disable_dropout=section.dropout == 0,
                # Of a placeholder; otherwise TRL would load a whole reference model.
                precompute_ref_log_probs=section.method == "full" and ref_model is None,
                **settings,
            ),
            processing_class=start.tokenizer,
            **trainers.placeholders(held_out),
        )
    # Otherwise the trainer would compute the log-probabilities in a second forward pass each step and, with dropout,
    # draw from the training's random stream.
    trainer.precompute_ref_logps = True
    trainers.give_rows(trainer, section, train_rows, held_out, parts)
    return trainer


def prove_reference(section: Referenced, start: adapters.Start, rows: list[dict], reference: Path) -> None:
    """Raise UserError where the policy is not the reference before the first step, that is where the first loss is not
    log 2 (DPO) or 1/2 (KTO): where log-probabilities of answers differ by more than rounding."""
    model, off, count = start.model.eval(), 0.0, 0
    with torch.no_grad(), completions.autocast(model, section.precision):
        for row in rows:
            for answer in ("chosen", "rejected", "completion"):
                expected = row.get("ref_logps" if answer == "completion" else f"ref_{answer}_logps")
                if expected is not None:
                    ids = row[f"{answer}_ids"]
                    batch = completions.answers_of(start.tokenizer, [row["prompt_ids"]], [ids], model.device)
                    off += abs(completions.log_probs(model, batch).double().sum().item() - expected)
                    count += len(ids)
    computed = read_object(reference.parent / "config.yaml").get("precision", "float32")
    allowed = max(NOISE[kind] for kind in (section.precision, computed, policy.dtype_of(start.foundation.weights)))
    if not off / count <= allowed:
        raise UserError(
            f"{reference}: is not the policy that training starts from: log-probabilities of {len(rows)} rows differ "
            f"by {off / count:.2g} nats a token, allowed {allowed}, and the first loss would be another. It was "
            "computed with other weights, or other tokens: does the chat template write the date? Remake it: rm that "
            "file, and run snakemake again"
        )


def run_measured(trainer, section: Referenced, checkpoints: Path, dtype: str) -> dict:
    """Train, with an evaluation of the held-out rows before the first and after the last step; returns the metrics.
    dtype: in which a whole model is published, and therefore measured."""
    count = trainers.trainable(trainer.model)
    say(f"{count:,} trainable parameters, {len(trainer.train_dataset.dataset):,} rows, beta {section.beta}")
    before = trainer.evaluate() if trainer.eval_dataset else {}
    trainers.run(trainer, section, checkpoints)
    if section.method == "full":
        trainers.round_trained(trainer.model, dtype)
    after = trainer.evaluate() if trainer.eval_dataset else {}
    measured = {
        f"{key} {when}": metrics[f"eval_{key}"]
        for when, metrics in (("before", before), ("after", after))
        for key in ("loss", *WATCHED)
        if f"eval_{key}" in metrics
    }
    return {
        "summary": {"trainable_parameters": count, "beta": section.beta, **measured},
        "warnings": displacement(before, after),
        "history": trainers.history(trainer, WATCHED),
    }


def displacement(before: dict, after: dict) -> list[str]:
    """A warning where the chosen answers became less likely (arXiv 2402.13228, section 3); else no warning."""
    key = "eval_logps/chosen"
    if key not in before or after[key] > before[key] - FALLEN:
        return []
    fell = f"held-out chosen answers fell from {before[key]:.1f} to {after[key]:.1f} nats while margins grew"
    say(f"warning: {fell}")
    return [f"{fell}: the policy moves away from both answers (likelihood displacement); lower learning_rate or steps"]
