"""The learning rate of every training loop: transformers' schedules and their warm-up."""

import math
from collections.abc import Callable

from posttrain.config.sections import Optimisation


def warmup(training: Optimisation) -> int:
    """Number of warm-up steps; 0 with `constant`."""
    if training.schedule == "constant":
        return 0
    if training.warmup_ratio is not None:
        return math.ceil(round(training.warmup_ratio * training.steps, 6))
    return training.steps // 20 if training.warmup_steps is None else training.warmup_steps


def learning_rates(training: Optimisation) -> dict:
    """The schedule for a trainer of transformers: its name, its arguments, and the warm-up."""
    name, options = named(training)
    more = {"lr_scheduler_kwargs": options} if options else {}
    return {"lr_scheduler_type": name, "warmup_steps": warmup(training), **more}


def named(training: Optimisation) -> tuple[str, dict]:
    """(transformers' name of the schedule, its arguments). A polynomial of power 1 is linear, and need not end at 0."""
    if training.min_lr_ratio is None:
        return training.schedule, {}
    if training.schedule == "cosine":
        return "cosine_with_min_lr", {"min_lr_rate": training.min_lr_ratio}
    return "polynomial", {"lr_end": training.min_lr_ratio * training.learning_rate, "power": 1.0}


def share(start: float, warmup: int, after: Callable[[int], float], step: int) -> float:
    """The share of the peak learning rate at a step: in warm-up from `start` to 1, then as `after` says."""
    return start + (1 - start) * step / warmup if step < warmup else after(step)
