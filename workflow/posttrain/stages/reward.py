"""A reward model: an adapter and a scalar head on the SFT policy, with TRL's RewardTrainer.

python -m posttrain reward --config results/NAME/reward/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --output results/NAME/reward/manifest.json
"""

import math
from pathlib import Path

from posttrain.config.sections import Reward
from posttrain.data import preferences
from posttrain.ground.progress import say
from posttrain.training import parallel

BINS = 10  # of the reliability figure


def reward(section: Reward, data: Path, base: Path, sft: Path, work: Path, checkpoints: Path) -> dict:
    """Write `work/model`, a PEFT adapter of a sequence classifier, and return its metrics."""
    import datasets
    import peft
    from trl import RewardConfig, RewardTrainer

    from posttrain.models import adapters, policy, reward_head
    from posttrain.training import trainers

    found = adapters.foundation(base, sft)
    tokenizer = policy.load_tokenizer(found.weights)
    train, test = (preferences.tokenized(tokenizer, data, side, section.max_length) for side in ("train", "test"))
    trainers.seed_everything(section.seed)
    model = policy.load_weights(found.weights, found.quantization, head=True)
    reading = reward_head.pad_apart_from_end(tokenizer)
    model.config.pad_token_id = reading.pad_token_id
    config = adapters.lora(section, found, section.dropout, task_type="SEQ_CLS", modules_to_save=["score"])
    model = peft.get_peft_model(model, config)
    adapters.start_as_sft(model, found)
    begun = trainers.trained_weights(model)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            **trainers.arguments(section, checkpoints),
            max_length=section.max_length,
            center_rewards_coefficient=section.centering or None,
            disable_dropout=section.dropout == 0,
        ),
        train_dataset=datasets.Dataset.from_list(preferences.relabelled(train, section.labels, section.seed)),
        eval_dataset=datasets.Dataset.from_list(test) if test else None,
        processing_class=reading,
    )
    trainers.keep_adapters_exact(trainer.model, begun)
    trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    say(f"{trainable:,} trainable parameters, {len(train):,} pairs, {len(test):,} held out")
    trainers.share_rows(trainer, section)
    trainers.run(trainer, section, checkpoints)
    if not parallel.main():
        return {}  # the first process publishes for all
    adapters.save(trainer.model, work / "model", found.weights)
    tokenizer.save_pretrained(work / "model")
    policy.save_contract(work / "model", "reward", tokenizer, model.config, found.weights, found.quantization)
    return {
        "summary": {"trainable_parameters": trainable, "pairs": len(train)},
        "history": trainers.history(trainer, ("accuracy", "margin")),
        **held_out(trainer.model, reading, test),
    }


def held_out(model, tokenizer, rows: list[dict]) -> dict:
    """Accuracy with its standard error, margin and calibration on held-out pairs, and accuracy by kind of pair."""
    from posttrain.models import reward_head

    if not rows:
        return {}
    margins = [
        chosen - rejected
        for chosen, rejected in zip(
            reward_head.classify(model, tokenizer, [row["chosen_ids"] for row in rows]),
            reward_head.classify(model, tokenizer, [row["rejected_ids"] for row in rows]),
            strict=True,
        )
    ]
    found = {"all": measured(margins)}
    kinds = {row["kind"] for row in rows}
    for kind in sorted(kinds | {kind.partition("/")[0] for kind in kinds}):  # correct, correct/fact, correct/order
        inside = [f"{row['kind']}/".startswith(f"{kind}/") for row in rows]
        found[kind] = measured([margin for margin, one in zip(margins, inside, strict=True) if one])
    for kind, numbers in found.items():
        error = f" ± {numbers['stderr']:.3f}" if numbers["stderr"] is not None else ""
        say(f"held-out pairs, {kind}: accuracy {numbers['accuracy']:.3f}{error} (n {numbers['n']})")
    return {"pairs": found, "calibration": calibration(margins)}


def measured(margins: list[float]) -> dict:
    """Accuracy (a tie is half right) with its standard error, mean margin, n."""
    from posttrain.maths.intervals import mean_stderr

    accuracy, stderr = mean_stderr([(margin > 0) + 0.5 * (margin == 0) for margin in margins])
    return {"accuracy": accuracy, "stderr": stderr, "margin": sum(margins) / len(margins), "n": len(margins)}


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, x))))


def calibration(margins: list[float]) -> dict:
    """Expected calibration error of P(chosen > rejected) = sigmoid(margin), and the bins of its reliability figure.

    Every pair is read both ways, so that confidence p has its error at 1 - p too. ECE: the mean over pairs of
    |accuracy - confidence| of their bin (Guo et al. 2017, arXiv 1706.04599, eq. 3).
    """
    read = [(sigmoid(margin), 1.0) for margin in margins] + [(sigmoid(-margin), 0.0) for margin in margins]
    bins = []
    for number in range(BINS):
        inside = [(p, y) for p, y in read if min(BINS - 1, int(p * BINS)) == number]
        if inside:
            confidence, share = (sum(values) / len(inside) for values in zip(*inside, strict=True))
            bins.append({"confidence": confidence, "accuracy": share, "n": len(inside)})
    error = sum(part["n"] * abs(part["accuracy"] - part["confidence"]) for part in bins) / len(read)
    return {"ece": error, "bins": bins, "n": len(margins)}
