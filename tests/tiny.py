"""How the tests run a stage in this process, and short settings of each stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLD = "posttrain.world.gold:gold_reward"


def make(stage: str, section, output: Path, keep_gb: float = 0.0, **inputs) -> Path:
    """Run a stage as the command line does, in this process; returns its manifest."""
    import importlib

    import torch

    from posttrain.jobs import artifact

    torch.set_num_threads(1)
    if stage == "evaluate":
        import lm_eval.evaluator

        lm_eval.evaluator.add_env_info = lambda storage: None  # it starts many processes, which take a second
    run = getattr(importlib.import_module(f"posttrain.stages.{stage}"), stage)
    artifact.make(stage, run, section, inputs, output, keep_gb=keep_gb)
    return output


def command(stage: str, section, output: Path, inputs: dict[str, Path]) -> list[str]:
    """A stage's command line after `posttrain`; its section is written beside the output."""
    config = output.parent / "config.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(section.model_dump_json(exclude_none=True))
    flags = [part for role, path in inputs.items() for part in (f"--{role}", str(path))]
    return [stage, "--config", str(config), "--output", str(output), "--keep-gb", "0", *flags]


def start(stage: str, section, output: Path, inputs: dict[str, Path]) -> subprocess.Popen:
    """A stage in a process of its own, as the workflow starts it."""
    started = [sys.executable, "-m", "posttrain", *command(stage, section, output, inputs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    return subprocess.Popen(started, env=environment, stderr=subprocess.PIPE, text=True)


def prepare():
    """A small world."""
    from posttrain.config.sections import Prepare, Tokenizer, World

    world = World(documents=300, questions=160, test_questions=33, pairs=96)
    return Prepare(world=world, tokenizer=Tokenizer(vocab_size=512), max_tokens=128)


def prepare_long():
    """A small world of long documents."""
    from posttrain.config.sections import Long, Prepare, Tokenizer, World

    long = Long(context=64, documents=160, questions=20)
    world = World(documents=400, questions=60, test_questions=14, pairs=16, long=long)
    return Prepare(world=world, tokenizer=Tokenizer(vocab_size=512), max_tokens=64)


def scratch(**changes):
    """A base of one narrow layer, trained for a moment."""
    from posttrain.config.sections import Scratch

    settings = dict(hidden_size=64, layers=1, heads=2, intermediate_size=64, steps=30, learned=0.99, warmup_steps=3,
                    log_steps=10, learning_rate=5e-3, seed=0, batch_size=8)  # fmt: skip
    return Scratch(**settings | changes)


def sft(**changes):
    """A short fine-tuning."""
    from posttrain.config.sections import Sft

    settings = dict(steps=6, batch_size=4, log_steps=2, warmup_steps=1, checkpoint_steps=2, seed=0, max_length=128,
                    learning_rate=5e-3)  # fmt: skip
    return Sft(**settings | changes)


def reward(**changes):
    """A short reward model."""
    from posttrain.config.sections import Reward

    settings = dict(steps=6, batch_size=8, log_steps=2, warmup_steps=1, checkpoint_steps=2, seed=0, max_length=128,
                    learning_rate=5e-3, target_modules="all-linear")  # fmt: skip
    return Reward(**settings | changes)


def dpo(**changes):
    """A short DPO."""
    from posttrain.config.sections import Dpo

    settings = dict(steps=6, batch_size=4, log_steps=2, warmup_steps=1, checkpoint_steps=2, seed=0, max_length=128,
                    learning_rate=3e-4)  # fmt: skip
    return Dpo(**settings | changes)


def kto(**changes):
    """A short KTO."""
    from posttrain.config.sections import Kto

    settings = dict(rows="preference", steps=6, batch_size=4, log_steps=2, warmup_steps=1, checkpoint_steps=2, seed=0,
                    max_length=128, learning_rate=3e-4)  # fmt: skip
    return Kto(**settings | changes)


def ppo(**changes):
    """A short PPO."""
    from posttrain.config.sections import Ppo, Rails

    settings = dict(rails=Rails(min_eos_rate=0.0), steps=4, value_warmup=1,
                    batch_size=6, epochs=2, warmup_steps=0, checkpoint_steps=1, snapshot_steps=2, seed=0,
                    max_new_tokens=12, learning_rate=1e-3, gold_function=GOLD)  # fmt: skip
    return Ppo(**settings | changes)


def grpo(**changes):
    """A short GRPO."""
    from posttrain.config.sections import Grpo, Rails

    settings = dict(rails=Rails(min_eos_rate=0.0), steps=4, batch_size=8, group=4, epochs=2, warmup_steps=0,
                    checkpoint_steps=1, snapshot_steps=2, seed=0, max_new_tokens=12, learning_rate=1e-3,
                    gold_function=GOLD)  # fmt: skip
    return Grpo(**settings | changes)


def longctx(**changes):
    """A short tuning to four times the context."""
    from posttrain.config.sections import Longctx

    settings = dict(steps=6, batch_size=4, log_steps=2, warmup_steps=1, checkpoint_steps=2, seed=0, packing=True)
    return Longctx(**settings | changes)


def trainers(**changes) -> dict:
    """A section of every trainer with all that a resume could lose: adapters on NF4, dropout, accumulation, packing,
    evaluation, epochs crossed, snapshots; checkpoints by the clock alone."""
    from posttrain.config.sections import Base

    common = dict(checkpoint_steps=None, log_steps=7, eval_steps=5, micro_batch_size=2) | changes
    answers = {key: value for key, value in common.items() if key not in ("log_steps", "eval_steps")}
    return {
        "base": Base(scratch=scratch(**dict(steps=160, batch_size=4) | common)),
        "sft": sft(**dict(steps=40, method="qlora", dropout=0.1, packing=True) | common),
        "reward": reward(**dict(steps=40, dropout=0.1, batch_size=4) | common),
        "dpo": dpo(**dict(steps=40, dropout=0.1) | common),
        "kto": kto(**dict(steps=40, dropout=0.1) | common),
        "ppo": ppo(**dict(steps=20, snapshot_steps=3, kl_target=0.1, kl_horizon=60, sft_coefficient=0.1) | answers),
        "grpo": grpo(**dict(steps=12, snapshot_steps=3, redraws=1, sft_coefficient=0.1) | answers),
        "longctx": longctx(**dict(steps=40, tuning="qlora") | common),
    }


ALIGNED = {"data": "data", "base": "base", "sft": "tuned_policy"}
READ_BY = {  # trainer -> role -> the artifact, by its name in `chain` and in conftest.py
    "base": {"data": "data"},
    "sft": {"data": "data", "base": "base"},
    "reward": ALIGNED,
    "dpo": ALIGNED | {"reference": "referenced"},
    "kto": ALIGNED | {"reference": "referenced"},
    "ppo": ALIGNED | {"reward": "rewarded"},
    "grpo": ALIGNED | {"reward": "rewarded"},
    "longctx": {"data": "long_data", "base": "long_base", "policy": "long_base"},
}


def chain() -> dict[str, tuple]:
    """What the trainers begin with: name -> stage, section, and the names of what it reads."""
    from posttrain.config.sections import Base, Reference

    return {
        "data": ("prepare", prepare(), {}),
        "base": ("base", Base(scratch=scratch()), READ_BY["base"]),
        "tuned_policy": ("sft", sft(method="qlora", steps=20), READ_BY["sft"]),
        "rewarded": ("reward", reward(steps=40), ALIGNED),
        "referenced": ("reference", Reference(), ALIGNED),
        "long_data": ("prepare", prepare_long(), {}),
        "long_base": ("base", Base(scratch=scratch(context=64)), {"data": "long_data"}),
    }


def first_gradient(stage: str, section, step: int = 1, **inputs):
    """The gradient of a trainer's first optimiser step, or a later one, before it is clipped; the run ends there."""
    import torch

    kept, patch = [], pytest.MonkeyPatch()

    def keep(self, weights, *_):
        kept.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))
        if len(kept) == step:
            raise KeyboardInterrupt
        return kept[-1].norm()

    patch.setattr("accelerate.Accelerator.clip_grad_norm_", keep)
    with pytest.raises(KeyboardInterrupt):
        make(stage, section, Path(f"results/first-gradient-{stage}/{stage}/manifest.json"), **inputs)
    patch.undo()
    return kept[-1]
