"""What every trainer shares: arguments, progress that a person can follow, continuing an interrupted run, the curve."""

import array
import functools
import math
import os
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from posttrain.ground.errors import Diverged, UserError
from posttrain.ground.files import write_json
from posttrain.ground.progress import say, spent
from posttrain.training import checkpoint, interruption, parallel


def arguments(training, checkpoints: Path) -> dict:
    """A trainer's arguments from the settings that all trainers have (`config.Training`).

    The batch is global: `batch_size` = micro-batch x accumulation x processes.
    """
    micro, accumulation = split(training.batch_size, parallel.at_once(training, training.batch_size), parallel.world())
    if parallel.world() < torch.cuda.device_count():  # transformers would give each of them a whole micro-batch
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible to {parallel.world()} processes: start one for each "
            "(docs/processes.md), or set CUDA_VISIBLE_DEVICES"
        )
    return {
        "output_dir": str(checkpoints),
        "max_steps": training.steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": parallel.at_once(training, training.batch_size),  # see `evaluate_whole`
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",  # in the order of `in_batches`
        "average_tokens_across_devices": True,
        "ddp_backend": parallel.backend() if parallel.world() > 1 else None,
        **sharding(),
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
        "logging_steps": training.log_steps,  # of the curve (`history`); a trainer logs each step
        "logging_nan_inf_filter": False,  # else a trainer leaves losses that are no number out of its mean
        "eval_strategy": "steps" if training.eval_steps else "no",
        "eval_steps": training.eval_steps,
        "save_strategy": "no",  # `Progress` says when
        "disable_tqdm": True,
        "optim": "adamw_torch",
        "report_to": wandb_targets(),
        "run_name": os.environ.get("WANDB_NAME"),
    }


def sharding() -> dict:
    """A trainer's arguments for FSDP2 (arXiv 2304.11277), where the weights are to be shared out among processes."""
    if not parallel.sharded or parallel.world() == 1:
        return {}
    refuse_shards()
    return {"fsdp": True, "fsdp_config": {"version": 2}}


def refuse_shards() -> None:
    """Raise UserError on CPUs, where accelerate leaves sharding out without a word."""
    if not torch.cuda.is_available():
        raise UserError("--shard needs GPUs; without it every process holds all weights")


def whole(model) -> dict | None:
    """Trained weights that are shared out, put together again in the first process; None where they are not.

    Every process takes part.
    """
    if not parallel.sharded or parallel.world() == 1:
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state, named = get_model_state_dict(model, options=options), dict(model.named_parameters())
    return {name: weight for name, weight in state.items() if name in named}  # tied weights once


def split(batch_size: int, micro_batch_size: int | None, processes: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of each process: the largest micro-batch that shares the global batch evenly.

    micro_batch_size: the most that fits; None for no limit. Raises UserError where processes would get unequal shares.
    """
    if batch_size % processes:
        fit = [str(count) for count in range(1, processes) if batch_size % count == 0]
        more = processes * math.ceil(batch_size / processes)
        raise UserError(
            f"batch_size {batch_size} cannot be shared evenly by {processes} processes: "
            f"start {' or '.join(fit)}, or set batch_size to a multiple of {processes}, {more} for one"
        )
    share = batch_size // processes
    micro = next(size for size in range(min(micro_batch_size or share, share), 0, -1) if share % size == 0)
    return micro, share // micro


def warmup(training) -> int:
    """Optimiser steps over which the learning rate rises; `constant` has none."""
    if training.schedule == "constant":
        return 0
    return training.steps // 20 if training.warmup_steps is None else training.warmup_steps


def share_rows(trainer, training) -> None:
    """Let a trainer's steps and held-out losses be the same with any number of processes."""
    trainer.train_dataset = in_batches(trainer.train_dataset, training)
    if parallel.world() > 1:
        trainer.evaluation_loop = functools.partial(evaluate_whole, trainer)


def evaluate_whole(trainer, *_, metric_key_prefix: str = "eval", **__) -> EvalLoopOutput:
    """The held-out loss, by every process on all rows, in the batches of one process; stands for `evaluation_loop`.

    Shared among processes, other rows would be averaged together, and those that fill up a last batch count twice. And
    a model that transformers prepared for evaluation before it trains is trained without adding up the processes'
    gradients (5.23, seen in tests/stages/test_processes.py).
    """
    rows, size, total = trainer.eval_dataset, trainer.args.per_device_eval_batch_size, 0.0
    trainer.model.eval()
    for start in range(0, len(rows), size):
        part = [rows[n] for n in range(start, min(start + size, len(rows)))]
        with trainer.accelerator.autocast():
            loss = trainer.prediction_step(trainer.model, trainer.data_collator(part), prediction_loss_only=True)[0]
        total += loss.item() * len(part)
    return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": total / len(rows)}, len(rows))


def in_batches(rows, training) -> torch.utils.data.Subset:
    """The rows of a whole run in the order of its batches: passes through all of them, each in an order of its own.

    A trainer ends each of its own passes with a smaller batch, which processes and micro-batches would share unevenly.
    And from a checkpoint of the last step it would take one more, were there rows left.
    rows: a sequence. Returns `steps` x `batch_size` rows.
    """
    wanted, order = training.steps * training.batch_size, array.array("q")  # of eight bytes: a run may read millions
    for number in range(math.ceil(wanted / len(rows))):
        shuffle = torch.Generator().manual_seed(training.seed + number)
        order.extend(torch.randperm(len(rows), generator=shuffle).tolist())
    return torch.utils.data.Subset(rows, order[:wanted])


def wandb_targets() -> list[str]:
    """Where a trainer reports to: nowhere, or wandb's offline files (`WANDB_MODE`, set by the campaign)."""
    return ["wandb"] if os.environ.get("WANDB_MODE", "disabled") == "offline" else []


def run(trainer, section, checkpoints: Path) -> None:
    """Train to the last step, continuing from the newest whole checkpoint. section: `config.Training`.

    Raises Interrupted when it was to stop before, Diverged where the loss is no number, UserError when it ended before.
    """
    trainer.remove_callback(PrinterCallback)
    progress = Progress(section, checkpoints)
    trainer.add_callback(progress)
    begin = checkpoint.newest(checkpoints)
    if begin:
        say(f"continuing from a checkpoint of step {checkpoint.step_of(begin)}")
    trainer.train(resume_from_checkpoint=str(begin) if begin else None)
    state = trainer.state
    if stopped := progress.watch.stop(state.global_step):
        raise stopped
    if state.global_step < state.max_steps:
        raise UserError(f"training stopped at step {state.global_step} of {state.max_steps}; run it again to continue")


class Heartbeat:
    """Says every few seconds where a stage stands, and leaves it in `progress.json` for `posttrain status`."""

    def __init__(self, checkpoints: Path, steps: int, first: int = 0):
        self.file, self.steps, self.first = checkpoints / "progress.json", steps, first
        self.begun, self.spoken, self.before = time.monotonic(), 0.0, spent(checkpoints)
        checkpoints.mkdir(parents=True, exist_ok=True)

    def beat(self, step: int, how: str) -> None:
        """Called after each step; how: loss or reward, in words."""
        now = time.monotonic()
        if not parallel.main() or (now - self.spoken < 5 and step < self.steps):
            return
        self.spoken = now
        left = round((now - self.begun) / max(1, step - self.first) * (self.steps - step))
        say(f"step {step}/{self.steps}  {how}  {left // 60}:{left % 60:02d} left")
        seconds = round(self.before + now - self.begun, 1)
        write_json(self.file, {"step": step, "steps": self.steps, "loss": how, "left": left, "seconds": seconds})


class Progress(TrainerCallback):
    """A trainer's heartbeat and checkpoints; stops it when it is time to, or when the loss is no number."""

    def __init__(self, section, checkpoints: Path):
        self.section, self.checkpoints, self.loss = section, checkpoints, math.nan

    def on_train_begin(self, args, state, control, **_):
        self.heart = Heartbeat(self.checkpoints, state.max_steps, state.global_step)
        self.watch = interruption.Watch(self.section)

    def on_log(self, args, state, control, logs=None, **_):
        self.loss = float((logs or {}).get("loss", self.loss))
        if not math.isfinite(self.loss) and "loss" in (logs or {}):
            raise Diverged(
                f"the loss is {self.loss} at step {state.global_step}: lower learning_rate or raise warmup_steps"
            )

    def on_step_end(self, args, state, control, **_):
        control.should_log = True  # a mean over steps would be another one after a checkpoint between them
        control.should_save = self.watch.step(state.global_step)
        if self.watch.stop(state.global_step):
            control.should_training_stop = True
        self.heart.beat(state.global_step, f"loss {self.loss:.3f}" if math.isfinite(self.loss) else "first steps")

    def on_save(self, args, state, control, **_):
        checkpoint.seal(self.checkpoints / f"checkpoint-{state.global_step}")
        self.watch.wrote()


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
    """The training curve: one entry for each `log_steps` steps, the means over them, and the measurements of the
    held-out loss, without what depends on the clock. more: a trainer's own keys."""
    known = ("loss", "eval_loss", "learning_rate", "grad_norm", *more, *(f"eval_{key}" for key in more))
    points, spans = {}, {}
    for entry in trainer.state.log_history:
        kept = {key: entry[key] for key in ("step", *known) if key in entry}
        if "loss" in kept:  # of one step
            spans.setdefault((kept["step"] - 1) // trainer.args.logging_steps, []).append(kept)
        elif len(kept) > 1:
            points.setdefault(kept["step"], {}).update(kept)
    for span in spans.values():
        means = {key: sum(point[key] for point in span) / len(span) for key in ("loss", *more)}
        points[span[-1]["step"]] = points.get(span[-1]["step"], {}) | span[-1] | means
    return [points[step] for step in sorted(points)]


def seed_everything(seed: int) -> None:
    """Seed before any weight is made: an adapter's random half is drawn when it is created."""
    set_seed(seed)
