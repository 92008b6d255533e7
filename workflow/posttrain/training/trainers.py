"""Code shared by the trainers of transformers and TRL: arguments, rows, exact weights, resuming, the curve."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from posttrain.config.sections import Training
from posttrain.ground.errors import Diverged, UserError
from posttrain.ground.files import write_json
from posttrain.ground.progress import say, spent
from posttrain.training import checkpoint, interruption, optimizer, parallel, schedule, spotchecks
from posttrain.training.order import Part, in_batches


def arguments(training: Training, checkpoints: Path) -> dict:
    """A trainer's arguments, from the settings that all trainers share.

    The batch is global: `batch_size` = micro-batch x accumulation x processes.
    """
    at_once, world = parallel.at_once(training, training.batch_size), parallel.world()
    micro, accumulation = parallel.split(training.batch_size, at_once, world)
    if world < torch.cuda.device_count():  # transformers would give each GPU a whole micro-batch
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible to {world} processes: start one for each "
            "(docs/processes.md), or set CUDA_VISIBLE_DEVICES"
        )
    return {
        "output_dir": str(checkpoints),
        "max_steps": training.steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": at_once,  # see `held_out_loss`
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",  # in the order of `in_batches`
        "average_tokens_across_devices": True,
        "ddp_backend": parallel.backend() if world > 1 else None,
        **parallel.sharding(),
        "learning_rate": training.learning_rate,
        **schedule.learning_rates(training),
        "weight_decay": training.weight_decay,
        **moments(training),
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.precision == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),  # without it, bf16 on a CPU is refused
        "gradient_checkpointing": training.gradient_checkpointing,
        "seed": training.seed,
        "data_seed": training.seed,
        "logging_steps": training.log_steps,  # for the curve (`history`); a trainer logs each step
        "logging_nan_inf_filter": False,  # otherwise a trainer leaves losses that are not finite out of its mean
        "eval_strategy": "steps" if training.eval_steps else "no",
        "eval_steps": training.eval_steps,
        "save_strategy": "no",  # `Progress` decides when
        "disable_tqdm": True,
        "optim": optimizer.of_trainer(training),
        "report_to": ["wandb"] if os.environ.get("WANDB_MODE", "disabled") == "offline" else [],
        "run_name": os.environ.get("WANDB_NAME"),
    }


def moments(training) -> dict:
    """AdamW's decays and epsilon for a trainer of transformers."""
    chosen = {"adam_beta1": training.beta1, "adam_beta2": training.beta2, "adam_epsilon": training.epsilon}
    return {key: value for key, value in chosen.items() if value is not None}


def refuse_parts(key: str, losses: set[str], training: Training) -> None:
    """Raise UserError where losses that need a whole batch would be computed over parts of it.

    key: the setting that names the losses.
    """
    whole = " and ".join(sorted(losses))
    if whole and parallel.world() > 1:
        raise UserError(f"{key}: TRL computes {whole} over a whole batch: start one process")
    if whole and (fits := parallel.at_once(training, training.batch_size)) < training.batch_size:
        raise UserError(
            f"{key}: TRL computes {whole} over a whole batch ({training.batch_size}), of which {fits} fit into memory: "
            "lower batch_size, or leave out that loss"
        )


def placeholders(test: list[dict]) -> dict:
    """Data sets to construct a trainer of TRL with; `give_rows` replaces them.

    TRL would tokenize real rows itself, and its tokens may differ from those on which the token contract was checked.
    """
    from datasets import Dataset

    row = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    return {"train_dataset": row, "eval_dataset": row if test else None}


def give_rows(trainer, training: Training, train: list[dict], test: list[dict], parts: Sequence[Part] = ()) -> None:
    """Set the tokenized rows that a trainer of TRL is trained and evaluated on, in place of the `placeholders`."""
    from datasets import Dataset

    trainer.train_dataset, trainer.eval_dataset = (Dataset.from_list(rows) if rows else None for rows in (train, test))
    share_rows(trainer, training, parts)


def share_rows(trainer, training: Training, parts: Sequence[Part] = (), what: str = "rows", lengths=None) -> None:
    """Make a trainer's steps and held-out losses independent of micro-batches and of the number of processes. parts: of
    a mixture (`order.parts_of`); what: the word for the rows; lengths: of the rows, for batches of like ones."""
    trainer.train_dataset = in_batches(trainer.train_dataset, training, parts, what, lengths)
    trainer.evaluation_loop = functools.partial(held_out_loss, trainer)


def held_out_loss(trainer, *_, metric_key_prefix: str = "eval", **__) -> EvalLoopOutput:
    """The mean held-out loss of a token or, where batches have no labels, of a row; replaces `evaluation_loop`, which
    takes a mean over batches. Every process computes it on all rows.

    If processes shared the rows, rows that pad a last batch would count twice. Also, transformers does not sum
    gradients over processes for a model that it prepared for evaluation before training (5.23,
    tests/stages/test_processes.py).
    """
    if spotchecks.replayed:  # no step depends on it
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": math.nan}, 0)
    rows, size, total, count = trainer.eval_dataset, trainer.args.per_device_eval_batch_size, 0.0, 0
    smoother, trainer.label_smoother = trainer.label_smoother, None  # which only training has
    trainer.model.eval()
    for start in range(0, len(rows), size):
        part = [rows[n] for n in range(start, min(start + size, len(rows)))]
        batch = trainer.data_collator(part)
        items = int((batch["labels"][:, 1:] >= 0).sum()) if "labels" in batch else len(part)
        with trainer.accelerator.autocast():
            loss = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)[0]
        total, count = total + loss.item() * items, count + items
    trainer.label_smoother = smoother
    return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": total / count}, len(rows))


@contextlib.contextmanager
def exact_weights(model) -> Iterator[None]:
    """Restore the trained weights, in float32, after a trainer was constructed with the model.

    TRL converts the adapter of a 4-bit base to bfloat16 (TRL 1.16). PEFT reloads it as float32, so that a resumed run
    would differ; and an adapter that starts as the SFT policy's would be rounded.
    """
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = before[name]


def make_trained_float32(model) -> None:
    """Convert the trained weights to float32, where a trainer created the adapter itself (see `exact_weights`)."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def round_trained(model, dtype: str) -> None:
    """Round the trained weights, which are float32, to the values of another type; nothing for float32."""
    if dtype == "float32":
        return
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(weight.to(getattr(torch, dtype)))


def trainable(model) -> int:
    """Number of trainable parameters."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def run(trainer, section: Training, checkpoints: Path) -> None:
    """Train to the last step, starting from the newest valid checkpoint.

    Raises Interrupted where it is stopped before, Diverged where the loss is not finite, UserError where the trainer
    ended early.
    """
    trainer.remove_callback(PrinterCallback)
    optimizer.start_at(trainer, section)
    progress = Progress(section, checkpoints)
    trainer.add_callback(progress)
    newest = checkpoint.newest(checkpoints)
    if newest:
        say(f"continuing from a checkpoint of step {checkpoint.step_of(newest)}")
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    parallel.reshard(trainer.model)
    state = trainer.state
    if interrupted := progress.watch.stop(state.global_step):
        raise interrupted
    if state.global_step < state.max_steps:
        raise UserError(f"training stopped at step {state.global_step} of {state.max_steps}; run it again to continue")


class Heartbeat:
    """Prints a stage's progress every few seconds, and writes it to `progress.json` for `posttrain status`."""

    def __init__(self, checkpoints: Path, steps: int, first: int = 0):
        self.file, self.steps, self.first = checkpoints / "progress.json", steps, first
        self.begun, self.spoken, self.before = time.monotonic(), 0.0, spent(checkpoints)
        checkpoints.mkdir(parents=True, exist_ok=True)

    def beat(self, step: int, how: str) -> None:
        """Report a step; called after each. how: the text of loss or reward."""
        now = time.monotonic()
        if not parallel.main() or (now - self.spoken < 5 and step < self.steps):
            return
        self.spoken = now
        left = round((now - self.begun) / max(1, step - self.first) * (self.steps - step))
        say(f"step {step}/{self.steps}  {how}  {left // 60}:{left % 60:02d} left")
        seconds = round(self.before + now - self.begun, 1)
        write_json(self.file, {"step": step, "steps": self.steps, "loss": how, "left": left, "seconds": seconds})


class Progress(TrainerCallback):
    """A trainer's heartbeat, checkpoints and states for spot-checks; stops it at SIGTERM, the time limit or a loss that
    is not finite."""

    def __init__(self, section: Training, checkpoints: Path):
        self.section, self.checkpoints, self.loss = section, checkpoints, math.nan

    def on_train_begin(self, args, state, control, **_):
        self.heart = Heartbeat(self.checkpoints, state.max_steps, state.global_step)
        self.watch = interruption.Watch(self.section)
        spotchecks.keep(self.section, self.checkpoints)

    def on_log(self, args, state, control, logs=None, model=None, optimizer=None, **_):
        self.loss = float((logs or {}).get("loss", self.loss))
        if not math.isfinite(self.loss) and "loss" in (logs or {}):
            raise Diverged(
                f"the loss is {self.loss} at step {state.global_step}: lower learning_rate or raise warmup_steps"
            )
        if "loss" in (logs or {}) and (stretch := spotchecks.ended(self.section, state.global_step)):
            trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
            spotchecks.record(stretch, self.checkpoints, spotchecks.logged(state.log_history), trained, optimizer)

    def on_step_end(self, args, state, control, **_):
        control.should_log = True  # a mean over several steps would change after a resume between them
        saves = self.watch.step(state.global_step)
        control.should_save = saves or spotchecks.due(self.section, state.global_step)
        if self.watch.stop(state.global_step):
            control.should_training_stop = True
        self.heart.beat(state.global_step, f"loss {self.loss:.3f}" if math.isfinite(self.loss) else "first steps")

    def on_save(self, args, state, control, **_):
        checkpoint.seal(self.checkpoints / f"checkpoint-{state.global_step}")
        spotchecks.keep(self.section, self.checkpoints)
        self.watch.wrote()


def history(trainer, more: tuple[str, ...] = ()) -> list[dict]:
    """The training curve: means over each `log_steps` steps, and the evaluations; without figures that depend on time.

    more: metrics of the trainer; a step may lack one (KTO's of a label that its batch does not have).
    """
    return curve(trainer.state.log_history, trainer.args.logging_steps, more)


def curve(entries: Iterable[dict], log_steps: int, more: tuple[str, ...] = ()) -> list[dict]:
    """The points of a training curve, from what a trainer logged of each step. more: as of `history`."""
    keys = ("loss", "eval_loss", "learning_rate", "grad_norm", *more, *(f"eval_{key}" for key in more))
    points: dict[int, dict] = {}
    spans: dict[int, list[dict]] = {}
    for entry in entries:
        figures = {key: entry[key] for key in ("step", *keys) if key in entry}
        if "loss" in figures:  # of one step
            spans.setdefault((figures["step"] - 1) // log_steps, []).append(figures)
        elif len(figures) > 1:
            points.setdefault(figures["step"], {}).update(figures)
    for span in spans.values():
        values = {key: [point[key] for point in span if key in point] for key in ("loss", *more)}
        means = {key: sum(numbers) / len(numbers) for key, numbers in values.items() if numbers}
        points[span[-1]["step"]] = points.get(span[-1]["step"], {}) | span[-1] | means
    return [points[step] for step in sorted(points)]
