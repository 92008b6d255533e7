"""Supervised fine-tuning on the assistant's tokens, with TRL's SFTTrainer.

python -m posttrain sft --config results/NAME/sft/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --output results/NAME/sft/manifest.json
"""

import math
from collections.abc import Sequence
from pathlib import Path

from posttrain.config.sections import Sft
from posttrain.data import tokenized
from posttrain.ground.errors import Diverged, UserError
from posttrain.ground.files import rows_of
from posttrain.ground.progress import say
from posttrain.models import tokens
from posttrain.training import order, parallel
from posttrain.training.order import Part

# Share of the largest logit by which a packed row may differ, by the type of the weights. Rows that see each other do
# so by more than half (OPT, Falcon), others by 1e-6 in float32 and 1e-2 in bfloat16.
ISOLATED = {"float32": 1e-2, "bfloat16": 1e-1}


def sft(section: Sft, data: Path, base: Path, work: Path, checkpoints: Path) -> dict:
    """Write `work/model`, an adapter or (method `full`) a whole model, and return its metrics."""
    from posttrain.models import policy
    from posttrain.models import quantization as nf4
    from posttrain.training import trainers

    tokenizer = policy.load_tokenizer(base)
    train, test = (tokenized.load(tokenizer, data, "sft", side, section.max_length) for side in ("train", "test"))
    rows = data.parent / "data" / "sft" / "train.jsonl"
    if train is None:
        raise UserError(f"{rows}: does not exist: the prepared data has no such rows; its metrics.json counts them")
    counts = tokenized.count(train)
    dtype = policy.dtype_of(base)
    quantization = quantization_of(section, dtype)
    model = policy.load_verified(base, quantization, dtype="float32" if section.method == "full" else dtype)
    trainer = trainer_of(section, model, tokenizer, train, test, checkpoints, order.parts_of(data, "sft"))
    trainable = trainers.trainable(trainer.model)
    say(f"{section.method}: {trainable:,} trainable parameters, {counts['trained_tokens']:,} tokens to learn")
    before = trainer.evaluate()["eval_loss"] if test else None
    trainers.run(trainer, section, checkpoints)
    if section.method == "full":
        trainers.round_trained(trainer.model, dtype)  # it is published in this type
    after = trainer.evaluate()["eval_loss"] if test else None
    if after is not None and not math.isfinite(after):
        raise Diverged(f"sft: the held-out loss is {after} after training ({before} before): lower learning_rate")
    form = tokens.form_of(rows_of(rows))
    publish(trainer.model, tokenizer, section, base, quantization, form, work / "model")
    summary = {"trainable_parameters": trainable, "eval_loss_before": before, "eval_loss": after}
    warning = nf4.count(trainer.model).warning() if quantization else ""
    return {
        "summary": {key: value for key, value in summary.items() if value is not None},
        **({"warnings": [warning]} if warning else {}),
        "tokens": counts | {"chat_template": policy.template_digest(tokenizer)},
        "history": trainers.history(trainer),
    }


def trainer_of(section: Sft, model, tokenizer, train, test, checkpoints: Path, parts: Sequence[Part] = ()):
    """TRL's trainer, which adds the adapter to the model. A batch of its collator is checked.

    train, test: the tokens of the rows (see `data/tokenized.py`); test may be None. parts: of a mixture.
    """
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from posttrain.models import methods, targets
    from posttrain.training import prefix, trainers

    set_seed(section.seed)
    if section.packing:
        prove_isolation(model, train)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **trainers.arguments(section, checkpoints),
            max_length=section.max_length,
            packing=section.packing,
            label_smoothing_factor=section.label_smoothing or 0.0,
            neftune_noise_alpha=section.neftune_alpha,
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        peft_config=methods.adapter(section, model),
    )
    targets.hold(trainer.model, section.fused_parts)
    if section.prefix_projection:
        trainer.add_callback(prefix.Reparametrized(checkpoints))
    if section.packing and parts:
        trainer.train_dataset, parts = packed_apart(train, trainer.args.max_length, parts)
    refuse_beyond(trainer.model, [*filter(None, (train, test))])
    trainers.make_trained_float32(trainer.model)
    rows = list(trainer.train_dataset.select(range(min(8, len(trainer.train_dataset)))))
    prove_batch(trainer.data_collator(rows))
    prove_loss(trainer, trainer.data_collator(rows[:1]))
    lengths = tokenized.lengths(train) if section.group_by_length else None
    trainers.share_rows(trainer, section, parts, "packed sequences" if section.packing else "rows", lengths)
    return trainer


def packed_apart(rows, length: int, parts: Sequence[Part]) -> tuple:
    """(packed sequences of at most `length` tokens, the parts of a mixture counted in them).

    Each part's rows are packed apart, by TRL's rule, so that a sequence can be read as often as each of its rows.
    """
    from datasets import concatenate_datasets
    from trl import pack_dataset

    of_parts = [pack_dataset(rows.select(numbers), length) for _, numbers in order.divided(len(rows), parts)]
    return concatenate_datasets(of_parts), order.in_sequences(parts, list(map(len, of_parts)))


def quantization_of(section: Sft, dtype: str) -> dict | None:
    """The quantisation of the base, as in the artifact's contract; None for none. dtype: of the frozen weights."""
    from posttrain.models import quantization

    if section.method != "qlora":
        return None
    return quantization.settings(section.compute or dtype, section.double_quantization, section.quantization or "nf4")


def refuse_beyond(model, sides: list) -> None:
    """Raise UserError where a row does not fit into the model's positions, of which virtual tokens take some.

    sides: the tokens of the rows.
    """
    from posttrain.models import positions

    longest = max(int(tokenized.lengths(side).max()) for side in sides)
    if longest > (room := positions.make_room(model, longest)):
        raise UserError(f"sft: a row has {longest} tokens, and the model has positions for {room}: lower max_tokens")


def prove_isolation(model, rows) -> None:
    """Check that packed rows do not attend to each other: a row has the same logits alone and after another row.

    The check runs without a cache, as the trainer does; with one, transformers would not recognise packing by
    positions. rows: their tokens. Raises UserError where the attention implementation ignores the boundaries of rows.
    """
    import torch

    first, second = rows[0]["input_ids"], rows[-1]["input_ids"]
    ids = torch.tensor([first + second], device=model.device)
    positions = torch.tensor([[*range(len(first)), *range(len(second))]], device=model.device)
    model.eval()
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([second], device=model.device), use_cache=False).logits[0]
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, len(first) :]
    model.train()
    difference = (alone - packed).abs().max().item() / alone.abs().max().item()
    if not math.isfinite(difference) or difference > ISOLATED[str(model.dtype).removeprefix("torch.")]:
        raise UserError(
            f"token contract: packed rows attend to each other (logits differ by {difference:.1%}); "
            "set sft.packing: false"
        )


def prove_batch(batch: dict) -> None:
    """Raise UserError where the trainer's collator labels padding, or the first token of a packed row."""
    labels, mask, positions = batch["labels"], batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and (labels[mask == 0] != tokens.MASKED).any():
        raise UserError("token contract: the collator labels padding")
    if positions is not None and (labels[positions == 0] != tokens.MASKED).any():
        raise UserError("token contract: the first token of a packed row is predicted from the row before it")


def prove_loss(trainer, batch: dict) -> None:
    """Raise UserError where TRL's loss of a batch is not the cross-entropy, smoothed by the section's share, of the
    model's own logits.

    TRL multiplies the last hidden state by the head itself, and scales the logits by the names of some families (1.16).
    """
    import torch

    model = trainer.model.eval()
    batch = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        shifted = logits[:, -batch["labels"].shape[1] : -1]  # behind virtual tokens
        share = trainer.args.label_smoothing_factor
        words = shifted.flatten(0, 1).float()
        own = torch.nn.functional.cross_entropy(words, labels.flatten(), label_smoothing=share).item()
        loss = trainer.compute_loss(model, dict(batch)).item()
    model.train()
    if math.isfinite(own) and not math.isclose(own, loss, rel_tol=0.02, abs_tol=0.02):
        family = model.config.model_type
        raise UserError(f"sft: TRL's loss of a row is {loss:.4f}, by the logits of {family} it is {own:.4f}")


def publish(model, tokenizer, section: Sft, base: Path, quantization: dict | None, form: str, folder: Path) -> None:
    """Write the trained weights, their tokenizer and their contract; equal weights give equal bytes.

    Every process must call it; the first writes.
    """
    from posttrain.models import adapters, policy
    from posttrain.models.quantization import described

    dtype = policy.dtype_of(base)
    if section.method == "full":
        policy.publish_whole(model, tokenizer, folder, form, dtype)
        return
    state = parallel.gathered(model)
    if not parallel.main():
        return
    adapters.save(model, folder, base, state=state)
    tokenizer.save_pretrained(folder)
    quantization = described(quantization, model)
    parts = section.fused_parts
    policy.write_contract(folder, section.method, tokenizer, model.config, base, quantization, form, dtype, parts)
