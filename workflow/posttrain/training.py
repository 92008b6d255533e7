"""What every trainer shares: arguments, progress that a person can follow, continuing a killed run, the curve."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from posttrain.errors import UserError
from posttrain.files import write_json
from posttrain.progress import say


def arguments(training, checkpoints: Path) -> dict:
    """A trainer's arguments from the settings that all trainers have (`config.Training`).

    The batch is global: `batch_size` = micro-batch x accumulation x processes.
    """
    micro = training.micro_batch_size or training.batch_size
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if training.batch_size % (micro * world):
        raise UserError(
            f"batch_size {training.batch_size} cannot be split over {world} processes of {micro} sequences each; "
            "set micro_batch_size to a divisor"
        )
    return {
        "output_dir": str(checkpoints),
        "max_steps": training.steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": training.batch_size // (micro * world),
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        "warmup_steps": warmup(training),
        "weight_decay": training.weight_decay,
        "adam_beta2": training.beta2,
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.precision == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),  # said, because bf16 without a GPU is refused otherwise
        "gradient_checkpointing": training.gradient_checkpointing,
        "seed": training.seed,
        "data_seed": training.seed,
        "logging_steps": training.log_steps,
        "logging_nan_inf_filter": False,  # else a trainer leaves losses that are no number out of its mean
        "eval_strategy": "steps" if training.eval_steps else "no",
        "eval_steps": training.eval_steps,
        "save_strategy": "steps",
        "save_steps": training.checkpoint_steps,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "optim": "adamw_torch",
        "report_to": wandb_targets(),
        "run_name": os.environ.get("WANDB_NAME"),
    }


def warmup(training) -> int:
    """Optimiser steps over which the learning rate rises; `constant` has none."""
    if training.schedule == "constant":
        return 0
    return training.steps // 20 if training.warmup_steps is None else training.warmup_steps


def wandb_targets() -> list[str]:
    """Where a trainer reports to: nowhere, or wandb's offline files (`WANDB_MODE`, set by the campaign)."""
    return ["wandb"] if os.environ.get("WANDB_MODE", "disabled") == "offline" else []


def run(trainer, checkpoints: Path) -> None:
    """Train to the last step, continuing from the newest whole checkpoint.

    Raises UserError when training ended before its last step or the loss stopped being a number.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(checkpoints))
    drop_broken(checkpoints)
    resumable = any(checkpoints.glob("checkpoint-*"))
    if resumable:
        say("continuing from a checkpoint")
    loss = trainer.train(resume_from_checkpoint=resumable or None).training_loss
    state = trainer.state
    if state.global_step < state.max_steps:
        raise UserError(f"training stopped at step {state.global_step} of {state.max_steps}; run it again to continue")
    if not math.isfinite(loss):  # in the steps after the last logged one
        raise UserError(f"the loss is {loss} before step {state.global_step}: lower learning_rate or mend the base")


def drop_broken(checkpoints: Path) -> None:
    """Delete checkpoints that a kill left half written: `trainer_state.json` is what a trainer writes last."""
    for folder in checkpoints.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(folder)


class Heartbeat:
    """Says every few seconds where a stage stands, and leaves it in `progress.json` for `posttrain status`."""

    def __init__(self, checkpoints: Path, steps: int, first: int = 0):
        self.file, self.steps, self.first = checkpoints / "progress.json", steps, first
        self.begun, self.spoken = time.monotonic(), 0.0
        checkpoints.mkdir(parents=True, exist_ok=True)

    def beat(self, step: int, how: str) -> None:
        """Called after each step; how: loss or reward, in words."""
        now = time.monotonic()
        if now - self.spoken < 5 and step < self.steps:
            return
        self.spoken = now
        left = round((now - self.begun) / max(1, step - self.first) * (self.steps - step))
        say(f"step {step}/{self.steps}  {how}  {left // 60}:{left % 60:02d} left")
        write_json(self.file, {"step": step, "steps": self.steps, "loss": how, "left": left})


class Progress(TrainerCallback):
    """A trainer's heartbeat; stops it when the loss is no number."""

    def __init__(self, checkpoints: Path):
        self.checkpoints, self.loss = checkpoints, math.nan

    def on_train_begin(self, args, state, control, **_):
        self.heart = Heartbeat(self.checkpoints, state.max_steps, state.global_step)

    def on_log(self, args, state, control, logs=None, **_):
        self.loss = float((logs or {}).get("loss", self.loss))
        if not math.isfinite(self.loss) and "loss" in (logs or {}):
            raise UserError(
                f"the loss is {self.loss} at step {state.global_step}: lower learning_rate or raise warmup_steps"
            )

    def on_step_end(self, args, state, control, **_):
        if state.global_step % args.save_steps == 0:
            control.should_log = True  # a mean that reached over a checkpoint would be another one after a kill
        if state.global_step >= state.max_steps:
            control.should_save = False  # from a checkpoint of the last step a trainer takes one more
        self.heart.beat(state.global_step, f"loss {self.loss:.3f}" if math.isfinite(self.loss) else "first steps")


def write_checkpoint(folder: Path, tensors: dict, state: dict, keep: int = 2) -> None:
    """A checkpoint of a loop of our own, which appears whole or not at all; the newest `keep` stay.

    tensors: nested dicts of tensors and numbers; state: what JSON holds.
    """
    import torch

    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    torch.save(tensors, new / "tensors.pt")
    write_json(new / "state.json", state)
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)
    for old in sorted(folder.parent.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old)


def read_checkpoint(checkpoints: Path) -> tuple[dict, dict] | None:
    """The newest checkpoint as `(tensors, state)`; None where there is none."""
    import torch

    newest = max(checkpoints.glob("checkpoint-*"), default=None)
    if newest is None:
        return None
    return torch.load(newest / "tensors.pt", weights_only=True, map_location="cpu"), json.loads(
        (newest / "state.json").read_text()
    )


def trained_weights(model) -> dict:
    """Copies of the weights that training will change, by name: what `keep_adapters_exact` restores."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def keep_adapters_exact(model, begun: dict | None = None) -> None:
    """Hold trained weights in float32, as they were before the trainer was made (`begun`).

    TRL makes a 4-bit base's adapter bfloat16 (TRL 1.16). PEFT reloads it as float32, so that a continued run would be
    another run; and an adapter that begins as the SFT policy's would begin as a rounded copy of it.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = begun[name].clone() if begun else weight.data.float()


def history(trainer, more: tuple[str, ...] = ()) -> list[dict]:
    """The training curve: one entry per logged step, without what depends on the clock. more: a trainer's own keys."""
    known = ("loss", "eval_loss", "learning_rate", "grad_norm", *more, *(f"eval_{key}" for key in more))
    points: dict[int, dict] = {}
    for entry in trainer.state.log_history:
        kept = {key: entry[key] for key in known if key in entry}
        if kept:
            points.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return [points[step] for step in sorted(points)]


def seed_everything(seed: int) -> None:
    """Seed before any weight is made: an adapter's random half is drawn when it is created."""
    set_seed(seed)
