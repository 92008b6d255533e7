"""The number of steps of a training whose settings name a number of epochs, by the rows that `prepare` left.

python -m posttrain sft --config '{"epochs": 3, ...}' --data results/NAME/prepare/manifest.json ...
"""

import math
from pathlib import Path

from posttrain.config.sections import Adapter, Pairs, Passes, Reward
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, rows_of
from posttrain.ground.progress import say


def with_steps(section, data: Path | None):
    """The section with the steps that its epochs come to; as it is without epochs. data: manifest of `prepare`.

    Raises UserError where warm-up is longer than that.
    """
    if not isinstance(section, Passes) or section.epochs is None:
        return section
    assert data, "every stage that trains on rows reads them"
    rows = elements(section, data)
    steps = steps_of(section, rows)
    say(f"{section.epochs:g} epochs of {rows:,} rows are {steps:,} steps of {section.batch_size}")
    if (section.warmup_steps or 0) > steps:
        raise UserError(f"warmup_steps: {section.warmup_steps} is more than the {steps} steps of these epochs")
    return section.replaced(steps=steps)


def steps_of(section: Passes, rows: int) -> int:
    """Steps in which so many rows are read `epochs` times, the last one filled up with rows of the next pass."""
    assert section.epochs is not None
    return max(1, math.ceil(round(section.epochs * rows / section.batch_size, 6)))


def elements(section: Passes, data: Path) -> int:
    """What a batch is counted in: training rows; for a reward model prompts, where rows are ranked lists; for unpaired
    training on pairs the answers."""
    card = read_json(data.parent / "metrics.json")
    if isinstance(section, Reward):
        return len({row["source"] for row in rows_of(data.parent / "data" / "preference" / "train.jsonl")})
    return rows(section, card["splits"])


def rows(section: Passes, splits: dict) -> int:
    """The training rows of a section, by the data card's `splits`; 0 where there are none."""
    task = section.task if isinstance(section, Adapter) else "sft"
    answers = 2 if task == "preference" and not isinstance(section, Pairs) else 1
    return answers * splits.get(task, {}).get("train", 0)
