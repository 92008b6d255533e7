"""Extend a policy's context: rescale RoPE's frequencies (position interpolation and others), tune on long documents.

python -m posttrain longctx --config results/NAME/longctx/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --policy results/NAME/sft/manifest.json \
    --output results/NAME/longctx/manifest.json

An adapter cannot hold positions, so the artifact is a whole model, which transformers and lm-eval load correctly, but
for `modulo`, which is read here alone.
"""

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from posttrain.config.sections import Longctx
from posttrain.data import packing
from posttrain.ground.errors import Diverged, UserError
from posttrain.ground.files import read_jsonl
from posttrain.ground.progress import say
from posttrain.models import control, positions
from posttrain.models import policy as policies
from posttrain.models import quantization as nf4
from posttrain.training import order, parallel
from posttrain.training.order import Part


def longctx(section: Longctx, data: Path, base: Path, policy: Path, work: Path, checkpoints: Path) -> dict:
    """Write `work/model`, a whole model, and return its metrics."""
    from transformers import set_seed

    from posttrain.training import trainers

    dtype = policies.dtype_of(policy)
    model, tokenizer, differences = rescaled(section, base, policy, checkpoints / "rescaled")
    context = positions.contract(model.config, tokenizer.model_max_length)["context"]
    tokenizer.model_max_length = context
    set_seed(section.seed)
    train, parts = documents(section, tokenizer, data, "train", context, order.parts_of(data, "long"))
    test, _ = documents(section, tokenizer, data, "test", context)
    adapted = with_adapter(section, model)
    trainer = trainer_of(section, adapted, train, test, checkpoints)
    trainers.share_rows(trainer, section, parts, "blocks" if section.packing else "rows")
    before = trainer.evaluate()["eval_loss"]
    if section.tuning != "none":
        trainable = trainers.trainable(adapted)
        say(f"{section.method} x{section.factor:g}: {trainable:,} trainable parameters, {len(train):,} rows")
        trainers.run(trainer, section, checkpoints)
    if section.tuning == "full":
        trainers.round_trained(adapted, dtype)  # it is published in this type
    after = trainer.evaluate()["eval_loss"]
    if not math.isfinite(after):
        raise Diverged(f"longctx: the held-out loss is {after} after tuning ({before} before): lower learning_rate")
    published = publish(section, trainer.model, tokenizer, checkpoints / "rescaled", policy, work)
    if not parallel.main():
        return {}
    differences = published | differences
    summary = {"context": context, "perplexity_before": math.exp(before), "perplexity": math.exp(after)}
    return {
        "summary": summary | {key: value for key, value in differences.items() if value is not None},
        "history": trainers.history(trainer),
    }


def rescaled(section: Longctx, base: Path, policy: Path, folder: Path):
    """The policy with the new positions: (model, tokenizer, differences of its logits from merging and rounding).

    folder: for a copy of the policy with the new configuration, since positions are set when a model is loaded.
    Raises UserError where the policy's adapter cannot be merged, or where it has no RoPE.
    """
    contract = policies.read_contract(policy)
    if contract["method"] not in (*policies.MERGEABLE, "weights"):
        raise UserError(f"longctx: {policy}: {contract['method']} tuning cannot be merged")
    tokenizer, dtype, differences = policies.load_tokenizer(policy), policies.dtype_of(policy), {}
    if contract["method"] == "weights":
        model = policies.load_verified(policy)
    else:
        model, differences["policy_merge_difference"] = policies.merged_policy(policy, base)
        differences["policy_rounding_difference"] = policies.round_weights(model, dtype)
    # The tokenizer's limit is the context where a model has none of its own (ALiBi).
    context = positions.contract(model.config, tokenizer.model_max_length)["context"]
    tokenizer.model_max_length = round(context * section.factor)
    positions.rescale(model.config, section.method, section.factor)
    parallel.first(lambda: model.save_pretrained(folder))
    loaded = "float32" if section.tuning == "full" else dtype
    return policies.load_model(folder, quantization(section, dtype), dtype=loaded), tokenizer, differences


def quantization(section: Longctx, dtype: str) -> dict | None:
    """The quantisation of the weights under the adapter; None for none. dtype: of the frozen weights."""
    return nf4.settings(dtype) if section.tuning == "qlora" else None


def documents(
    section: Longctx, tokenizer, data: Path, side: str, context: int, parts: Sequence[Part] = ()
) -> tuple[list[dict], list[Part]]:
    """(rows of `context` tokens, the parts of a mixture counted in them).

    Raises UserError where there is no row, of any part.
    """
    file = data.parent / "data" / "long" / f"{side}.jsonl"
    prepared = read_jsonl(file) if file.is_file() else []
    of_parts = [
        rows_of(section, tokenizer, prepared[numbers.start : numbers.stop], context, f"{file} ({name})")
        for name, numbers in order.divided(len(prepared), parts)
    ]
    counts = list(map(len, of_parts))
    if section.packing:
        counted = order.in_sequences(parts, counts)
    else:  # all rows have as many tokens, so that shares of rows are those of tokens too
        counted = [part._replace(rows=n, share=part.weight) for part, n in zip(parts, counts, strict=False)]
    return list(chain.from_iterable(of_parts)), counted


def rows_of(section: Longctx, tokenizer, prepared: list[dict], context: int, where: str) -> list[dict]:
    """Rows of `context` tokens: each the beginning of a document or, with `packing`, concatenated documents.

    where: the documents' file and source, for the UserError where there are none.
    """
    long = [row for row in prepared if not {"answer", "task"} & row.keys() and row.get("length", context) >= context]
    encoded = control.plain(tokenizer, [row["text"] for row in long]) if long else []
    if section.packing and long:
        return packing.blocks(tokenizer, encoded, context, f"the text of {where}")
    rows = [{"input_ids": [control.opening(tokenizer), *ids][:context]} for ids in encoded if len(ids) + 1 >= context]
    if not rows:
        raise UserError(
            f"longctx: none of {len(long)} documents in {where} has {context} tokens; give longer ones or set packing"
        )
    return rows


def with_adapter(section: Longctx, model):
    """The model, with an adapter where `tuning` has one, and with trainable copies of embeddings and norms."""
    if section.tuning not in ("lora", "qlora"):
        return model
    import peft

    from posttrain.models import targets
    from posttrain.models.adapters import train_copies_in_float32
    from posttrain.training import trainers

    beside = dense_modules(model) if section.embeddings_and_norms else None
    adapted_layers = targets.layers(model, section.target_modules, "longctx.target_modules")
    config = peft.LoraConfig(
        r=section.rank, lora_alpha=section.alpha, target_modules=adapted_layers, modules_to_save=beside,
        ensure_weight_tying=model.config.tie_word_embeddings, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    trainers.make_trained_float32(adapted)
    train_copies_in_float32(adapted, cast_back=True)
    return adapted


def dense_modules(model) -> list[str]:
    """Names of the embedding and of the norms, whose weights a LoRA cannot adapt."""
    import torch

    leaves = [(name, module) for name, module in model.named_modules() if name and not list(module.children())]
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in leaves
            if isinstance(module, torch.nn.Embedding) or "norm" in type(module).__name__.lower()
        }
    )


def trainer_of(section: Longctx, model, train: list[dict], test: list[dict], checkpoints: Path):
    """transformers' trainer, for next-token prediction on rows of tokens."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from posttrain.training import optimizer, trainers

    trainer = Trainer(
        model=model,
        args=TrainingArguments(**trainers.arguments(section, checkpoints), remove_unused_columns=False),
        train_dataset=train,
        eval_dataset=test,
        data_collator=packing.collate,
        optimizers=(optimizer.chosen(section, model), None),
    )
    trainer.remove_callback(PrinterCallback)  # the first evaluation would print a dict
    return trainer


def publish(section: Longctx, tuned, tokenizer, rescaled: Path, policy: Path, work: Path) -> dict:
    """Write `work/model`, the tuned model, whole; returns the differences of its logits from merging and rounding, None
    where it was not merged or rounded. Every process must call it; the first writes.

    rescaled: folder of the model that was tuned. policy: manifest of the policy whose context was extended.
    """
    has_adapter, dtype, difference = section.tuning in ("lora", "qlora"), policies.dtype_of(policy), None
    state = parallel.gathered(tuned, every_name=has_adapter)  # PEFT saves a tied copy under each name
    if not parallel.main():
        return {}
    if has_adapter:
        tuned.save_pretrained(work / ".adapter", state_dict=state)
        expected = policies.probed(nf4.in_float32(tuned)) if state is None else None
        tuned, difference = merged(section, expected, rescaled, work / ".adapter", dtype)
        state = None
    rounding = policies.round_weights(tuned, dtype) if state is None else None  # shards have the type's values already
    tuned.save_pretrained(work / "model", state_dict=state)
    tokenizer.save_pretrained(work / "model")
    form = policies.read_contract(policy).get("form")
    policies.write_contract(work / "model", "weights", tokenizer, tuned.config, form=form, dtype=dtype)
    return {"merge_difference": difference, "rounding_difference": rounding}


def merged(section: Longctx, expected, rescaled: Path, adapter: Path, dtype: str) -> tuple:
    """(the model of the folder `rescaled` with an adapter merged, `certified_difference`).

    expected: the tuned model's logits (`policies.probed`); None where its weights are shared out: the adapter that was
    gathered is then certified alone. dtype: of the frozen weights. A LoRA on quantised weights is merged into the same
    weights, dequantised. Raises UserError where the merged model computes another function.
    """
    under = policies.load_model(rescaled, quantization(section, dtype), dtype=dtype)
    model, difference = policies.merge(under, adapter, "longctx")
    if expected is not None:
        problem = f"longctx: {policies.OTHER_FUNCTION}"
        difference = policies.certified_difference(expected, policies.probed(model), problem)
    say(f"merged: logits differ by {difference:.1g} of the largest")
    return model, difference
