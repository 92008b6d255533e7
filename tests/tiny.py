"""How the tests run a stage in this process, and short settings of each stage."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make(stage: str, section, output: Path, **inputs) -> Path:
    """Run a stage as the command line does, in this process; returns its manifest."""
    import importlib

    import torch

    from posttrain import artifact

    torch.set_num_threads(1)
    run = getattr(importlib.import_module(f"posttrain.stages.{stage}"), stage)
    artifact.make(stage, run, section, inputs, output)
    return output


def scratch(**changes):
    """A base of one narrow layer, trained for a moment."""
    from posttrain.config import Scratch

    settings = dict(hidden_size=64, layers=1, heads=2, intermediate_size=64, steps=30, learned=0.99, warmup_steps=3,
                    log_steps=10, learning_rate=5e-3, seed=0, batch_size=8)  # fmt: skip
    return Scratch(**settings | changes)


def sft(**changes):
    """A short fine-tuning."""
    from posttrain.config import Sft

    settings = dict(steps=6, batch_size=4, log_steps=2, warmup_steps=1, checkpoint_steps=2, seed=0, max_length=128,
                    learning_rate=5e-3)  # fmt: skip
    return Sft(**settings | changes)


def reward(**changes):
    """A short reward model."""
    from posttrain.config import Reward

    settings = dict(steps=6, batch_size=8, log_steps=2, warmup_steps=1, checkpoint_steps=2, seed=0, max_length=128,
                    learning_rate=5e-3, target_modules="all-linear")  # fmt: skip
    return Reward(**settings | changes)


def dpo(**changes):
    """A short DPO."""
    from posttrain.config import Dpo

    settings = dict(steps=6, batch_size=4, log_steps=2, warmup_steps=1, checkpoint_steps=2, seed=0, max_length=128,
                    learning_rate=3e-4)  # fmt: skip
    return Dpo(**settings | changes)


def ppo(**changes):
    """A short PPO."""
    from posttrain.config import Ppo, Rails

    settings = dict(rails=Rails(min_eos_rate=0.0), steps=4, value_warmup=1,
                    batch_size=6, epochs=2, warmup_steps=0, checkpoint_steps=1, snapshot_steps=2, seed=0,
                    max_new_tokens=12, learning_rate=1e-3)  # fmt: skip
    return Ppo(**settings | changes)


def first_gradient(stage: str, section, **inputs):
    """The gradient of a trainer's first optimiser step, before it is clipped; the run ends there."""
    import torch

    kept, patch = [], pytest.MonkeyPatch()

    def keep(self, weights, *_):
        kept.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))
        raise KeyboardInterrupt

    patch.setattr("accelerate.Accelerator.clip_grad_norm_", keep)
    with pytest.raises(KeyboardInterrupt):
        make(stage, section, Path(f"results/first-gradient-{stage}/{stage}/manifest.json"), **inputs)
    patch.undo()
    return kept[0]
