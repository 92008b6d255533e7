"""A reward model: the SFT policy with a scalar head, trained by an adapter or whole, with TRL's RewardTrainer.

python -m posttrain reward --config results/NAME/reward/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --output results/NAME/reward/manifest.json
"""

import math
from pathlib import Path

import numpy as np

from posttrain.config.sections import Reward
from posttrain.data import preferences, tokenized
from posttrain.data.judged import MARGIN
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say
from posttrain.training import parallel

BINS = 10  # bins of the reliability diagram
DEMONSTRATIONS = 4096  # of the rows of `sft`, at even distances: their mean is known to a 64th of their spread


def reward(section: Reward, data: Path, base: Path, sft: Path, work: Path, checkpoints: Path) -> dict:
    """Write `work/model`, a PEFT adapter of a sequence classifier or (method `full`) a whole one, and return its
    metrics."""
    from posttrain.models import adapters, policy, reward_head
    from posttrain.training import order, trainers

    foundation, tokenizer, model = adapters.load_to_align(section, base, sft, head=True)
    train = pairs(tokenizer, data, "train", section.max_length, section.margin)
    test = pairs(tokenizer, data, "test", section.max_length)
    padded = reward_head.pad_apart_from_end(tokenizer)
    model.config.pad_token_id = padded.pad_token_id
    train = preferences.relabelled(train, section.labels, section.seed)
    trainer = trainer_of(section, model, padded, train, test, checkpoints, order.parts_of(data, "preference"))
    trainable = trainers.trainable(trainer.model)
    say(f"{trainable:,} trainable parameters, {len(train):,} pairs, {len(test):,} held out")
    trainers.run(trainer, section, checkpoints)
    if section.method == "full":
        trainers.round_trained(trainer.model, policy.dtype_of(foundation.weights))
    # The first process measures; where weights are shared out, a forward pass needs every process.
    measures = parallel.main() or parallel.sharded
    measured = held_out(trainer.model, padded, test) if measures else {}
    if section.normalize and measures:
        measured |= {"demonstrations": demonstrated(trainer.model, padded, demonstrations(tokenizer, data))}
    adapters.publish(trainer.model, tokenizer, foundation, work / "model", method="reward")
    if section.normalize and parallel.main():
        reward_head.write_mean(work / "model", measured["demonstrations"]["mean"])
    return {
        "summary": {"trainable_parameters": trainable, "pairs": len(train)},
        "history": trainers.history(trainer, ("accuracy", "margin")),
        **measured,
    }


def trainer_of(section: Reward, model, tokenizer, train: list[dict], test: list[dict], checkpoints: Path, parts=()):
    """TRL's trainer with its rows: pairs or, where a place has several of them, ranked lists. parts: of a mixture."""
    import datasets
    from trl import RewardConfig, RewardTrainer

    from posttrain.training import rankings, trainers

    ranked = len({pair["source"] for pair in train}) < len(train)
    lists = rankings.elements(train) if ranked else []
    with trainers.exact_weights(model):
        trainer = (rankings.RankingTrainer if ranked else RewardTrainer)(
            model=model,
            args=RewardConfig(
                **trainers.arguments(rankings.fitting(section, lists) if ranked else section, checkpoints),
                max_length=section.max_length,
                center_rewards_coefficient=section.centering or None,
                disable_dropout=section.dropout == 0,
                remove_unused_columns=not ranked,  # TRL's columns are those of pairs
            ),
            train_dataset=datasets.Dataset.from_list(train),
            eval_dataset=datasets.Dataset.from_list(test) if test else None,
            processing_class=tokenizer,
        )
    if ranked:
        say(f"batches are of {len(lists):,} prompts, each with all pairs of its answers")
        trainer.data_collator = rankings.Collator(tokenizer.pad_token_id)
        trainers.give_rows(trainer, section, lists, rankings.elements(test), rankings.parts(train, parts))
    else:
        trainers.share_rows(trainer, section, parts)
    return trainer


def pairs(tokenizer, data: Path, side: str, longest: int | None, scale: float | None = None) -> list[dict]:
    """Preference pairs for RewardTrainer: `chosen_ids` and `rejected_ids` with the prompt; `kind` and `source`; with a
    `scale`, `margin`: the difference of both ratings, times it (Llama 2, arXiv 2307.09288, eq. 2)."""
    rows = preferences.tokenized(tokenizer, data, side, longest, more=(MARGIN,))
    if scale:
        refuse_unrated(rows, data)
    return [
        {f"{answer}_ids": pair["prompt_ids"] + pair[f"{answer}_ids"] for answer in ("chosen", "rejected")}
        | {"kind": pair.get("kind", "pairs"), "source": pair["source"]}
        | ({MARGIN: scale * pair[MARGIN]} if scale else {})
        for pair in rows
    ]


def refuse_unrated(rows: list[dict], data: Path) -> None:
    """Raise UserError, naming the first, where pairs have no ratings of their answers."""
    if bare := [row["source"] for row in rows if MARGIN not in row]:
        problem = f"{len(bare):,} of {len(rows):,} training pairs have no ratings, the first at {bare[0]}"
        raise UserError(
            f"reward.margin: {problem}: give rows `margin`, or `score_chosen` and `score_rejected` ({data})"
        )


def demonstrations(tokenizer, data: Path) -> list[list[int]]:
    """At most DEMONSTRATIONS training rows of `sft` as tokens, up to the end of their last reply that is trained.
    Raises UserError where there are none."""
    rows = tokenized.load(tokenizer, data, "sft", "train")
    if rows is None:
        raise UserError(f"reward.normalize: {data} has no training rows of sft, whose mean reward is to be 0")
    chosen = np.unique(np.linspace(0, len(rows) - 1, DEMONSTRATIONS, dtype=int))
    texts = []
    for row in rows.select(chosen):
        last = np.flatnonzero(np.array(row["labels"]) >= 0)[-1]
        texts.append(row["input_ids"][: last + 1])
    return texts


def demonstrated(model, tokenizer, rows: list[list[int]]) -> dict:
    """The mean score of demonstrations, its standard error, and their number."""
    from posttrain.maths.intervals import mean_stderr
    from posttrain.models import reward_head

    mean, stderr = mean_stderr(reward_head.classify(model, tokenizer, rows))
    if parallel.main():
        say(f"{len(rows):,} demonstrations have a mean reward of {mean:.3f}, which is taken from every reward")
    return {"mean": mean, "stderr": stderr, "n": len(rows)}


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
    figures = {"all": measured(margins)}
    kinds = {row["kind"] for row in rows}
    for kind in sorted(kinds | {kind.partition("/")[0] for kind in kinds}):  # correct, correct/fact, correct/order
        inside = [f"{row['kind']}/".startswith(f"{kind}/") for row in rows]
        figures[kind] = measured([margin for margin, one in zip(margins, inside, strict=True) if one])
    for kind, numbers in figures.items() if parallel.main() else ():
        error = f" ± {numbers['stderr']:.3f}" if numbers["stderr"] is not None else ""
        say(f"held-out pairs, {kind}: accuracy {numbers['accuracy']:.3f}{error} (n {numbers['n']})")
    return {"pairs": figures, "calibration": calibration(margins)}


def measured(margins: list[float]) -> dict:
    """Accuracy (a tie counts half) with its standard error, mean margin, n."""
    from posttrain.maths.intervals import mean_stderr

    accuracy, stderr = mean_stderr([(margin > 0) + 0.5 * (margin == 0) for margin in margins])
    return {"accuracy": accuracy, "stderr": stderr, "margin": sum(margins) / len(margins), "n": len(margins)}


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, x))))


def calibration(margins: list[float]) -> dict:
    """Expected calibration error of P(chosen > rejected) = sigmoid(margin), and the bins of its reliability diagram.

    Every pair counts in both orders, with confidence p and 1 - p. ECE: the mean over pairs of |accuracy - confidence|
    of their bin (Guo et al. 2017, arXiv 1706.04599, eq. 3).
    """
    outcomes = [(sigmoid(margin), 1.0) for margin in margins] + [(sigmoid(-margin), 0.0) for margin in margins]
    bins = []
    for number in range(BINS):
        inside = [(p, y) for p, y in outcomes if min(BINS - 1, int(p * BINS)) == number]
        if inside:
            confidence, share = (sum(values) / len(inside) for values in zip(*inside, strict=True))
            bins.append({"confidence": confidence, "accuracy": share, "n": len(inside)})
    error = sum(part["n"] * abs(part["accuracy"] - part["confidence"]) for part in bins) / len(outcomes)
    return {"ece": error, "bins": bins, "n": len(margins)}
