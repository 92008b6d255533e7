"""The untouched model: a local directory, a model from the hub, or one trained from scratch on the prepared text.

python -m posttrain base --config results/NAME/base/config.yaml --data results/NAME/prepare/manifest.json \
    --output results/NAME/base/manifest.json
"""

import collections
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from posttrain.config.sections import Base, Scratch
from posttrain.data import given, packing
from posttrain.data.tokenizer import refuse_other_tokens
from posttrain.ground.errors import Diverged, UserError
from posttrain.ground.files import read_json, read_jsonl
from posttrain.ground.progress import say
from posttrain.ground.weights import frozen_dtype
from posttrain.models.policy import write_contract
from posttrain.training import order, parallel
from posttrain.training.order import Part


def base(section: Base, data: Path, work: Path, checkpoints: Path, fetched: Sequence[Path] = ()) -> dict:
    """Write `work/model`, the base with the prepared tokenizer, and return its metrics."""
    from transformers import AutoConfig, AutoTokenizer

    prepared = data.parent / "data" / "tokenizer"
    if not prepared.is_dir():
        raise UserError(f"{data}: is not a manifest of prepared data (there is no {prepared})")
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    model_folder = work / "model"
    if section.scratch:
        metrics = from_scratch(section.scratch, tokenizer, data, model_folder, checkpoints)
    else:
        source = source_folder(section, list(fetched))
        metrics = given.copy(source, model_folder)
        refuse_other_tokens(tokenizer, source)
        if len(tokenizer) > AutoConfig.from_pretrained(model_folder).vocab_size:
            raise UserError("base: the prepared tokenizer has more tokens than the model has embeddings")
    if not parallel.main():
        return {}  # the first process publishes for all
    tokenizer.save_pretrained(model_folder)
    form = read_json(data.parent / "metrics.json").get("form")  # of the rows that it is compared on
    dtype = frozen_dtype(section.dtype, read_json(model_folder / "config.json"))
    if dtype != "float32":
        say(f"frozen weights are {dtype} in every later stage; base.dtype: float32 takes twice the memory")
    config = AutoConfig.from_pretrained(model_folder)
    write_contract(model_folder, "weights", tokenizer, config, form=form, dtype=dtype)
    return metrics


def source_folder(section: Base, fetched: list[Path]) -> Path:
    """The folder of an existing model: fetched, or the user's own. Raises UserError where it does not exist."""
    if section.hub:
        from posttrain.data.hub import fetched_repo

        return fetched_repo("model", section.hub.id, section.hub.revision, fetched)
    folder = Path(section.path or "")
    if not (folder / "config.json").is_file():
        raise UserError(f"base.path: {folder} is not a model directory (it has no config.json)")
    return folder


def from_scratch(section: Scratch, tokenizer, data: Path, folder: Path, checkpoints: Path) -> dict:
    """Train a model on blocks of `context` tokens, save it, and return its metrics. data: manifest of `prepare`.

    Raises Diverged where the held-out perplexity is not under `learned` times that of a unigram model.
    """
    from transformers import Trainer, TrainingArguments

    from posttrain.training import optimizer, trainers

    model = initial_model(section, tokenizer)
    text = data.parent / "data" / "text"
    documents, held_out = (read(tokenizer, text / f"{side}.jsonl") for side in ("train", "test"))
    train, parts = mixed_blocks(tokenizer, documents, section.context, order.parts_of(data, "text"))
    test = packing.blocks(tokenizer, held_out, section.context)
    say(f"{model.num_parameters():,} parameters, {len(train) * section.context:,} tokens of text")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**trainers.arguments(section, checkpoints), remove_unused_columns=False),
        train_dataset=train,
        eval_dataset=test,
        data_collator=packing.collate,
        optimizers=(optimizer.chosen(section, model), None),
    )
    trainers.share_rows(trainer, section, parts, "blocks")
    trainers.run(trainer, section, checkpoints)
    perplexity, unigram = math.exp(trainer.evaluate()["eval_loss"]), unigram_perplexity(train, test)
    say(f"held-out perplexity {perplexity:.2f} (unigram {unigram:.2f})")
    if not perplexity < section.learned * unigram:
        raise Diverged(
            f"base: did not learn: held-out perplexity {perplexity:.1f} is not under base.scratch.learned "
            f"({section.learned}) x the unigram's ({unigram:.1f}); train longer or with another learning_rate"
        )
    if parallel.main():
        trainer.model.save_pretrained(folder)
    summary = {"parameters": model.num_parameters(), "perplexity": perplexity, "unigram_perplexity": unigram}
    summary["trained_tokens"] = section.steps * section.batch_size * section.context
    return {"summary": summary, "history": trainers.history(trainer)}


def mixed_blocks(
    tokenizer, documents: list[list[int]], context: int, parts: Sequence[Part]
) -> tuple[list[dict], list[Part]]:
    """(the blocks of all documents, the parts counted in blocks), each part of a mixture in blocks of its own."""
    of_parts = [
        packing.blocks(tokenizer, documents[numbers.start : numbers.stop], context, f"the text of {name}")
        for name, numbers in order.divided(len(documents), parts)
    ]
    return list(chain.from_iterable(of_parts)), order.in_sequences(parts, list(map(len, of_parts)))


def read(tokenizer, file: Path) -> list[list[int]]:
    """Tokens of each document of a file, in which control tokens are what they are: a document may be a chat."""
    return tokenizer([row["text"] for row in read_jsonl(file)], add_special_tokens=False).input_ids


def initial_model(section: Scratch, tokenizer):
    """The model before its first step, with random weights by the section's seed."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(section.seed)
    model = AutoModelForCausalLM.from_config(architecture(section, tokenizer), dtype=torch.float32)
    if section.locality and section.positions == "rope":
        look_back(model, section.locality)
    return model


def architecture(section: Scratch, tokenizer):
    """The model's configuration: Llama with RoPE, or BLOOM with ALiBi."""
    from transformers import BloomConfig, LlamaConfig

    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if section.positions == "alibi":
        return BloomConfig(hidden_size=section.hidden_size, n_layer=section.layers, n_head=section.heads, **special)
    return LlamaConfig(
        hidden_size=section.hidden_size,
        intermediate_size=section.intermediate_size,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        num_key_value_heads=section.heads,
        max_position_embeddings=section.context,
        rope_parameters={"rope_type": "default", "rope_theta": section.rope_theta},
        tie_word_embeddings=True,
        attention_bias=section.locality > 0,
        **special,
    )


def look_back(model, strength: float) -> None:
    """Make half of the heads of the first two layers attend to the previous token.

    With q = strength (cos f, -sin f) and k = strength (1, 0) in every frequency f of RoPE, the score of two tokens
    at distance d is strength^2 sum_f cos(f (d - 1)): highest at d = 1. Copying needs such heads (Olsson et al. 2022,
    arXiv 2209.11895), and a small model spends its first steps on learning them.
    """
    import torch

    config = model.config
    width = config.hidden_size // config.num_attention_heads
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    here, zero = torch.ones(width // 2), torch.zeros(width // 2)
    for layer in model.model.layers[:2]:
        for head in range(config.num_attention_heads // 2):
            part = slice(head * width, (head + 1) * width)
            with torch.no_grad():
                layer.self_attn.k_proj.bias[part] = strength * torch.cat([here, zero])
                layer.self_attn.q_proj.bias[part] = strength * torch.cat([frequencies.cos(), -frequencies.sin()])


def unigram_perplexity(train: list[dict], test: list[dict]) -> float:
    """Perplexity of the test tokens under a unigram model of the training tokens, with add-one smoothing."""
    counts = collections.Counter(token for block in train for token in block["input_ids"][1:])
    tokens = [token for block in test for token in block["input_ids"][1:]]
    total = sum(counts.values()) + len(set(counts) | set(tokens))
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens))
