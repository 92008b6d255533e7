"""The prompts that policies answer, as tokens, and SFT rows as prompts with replies."""

from pathlib import Path

import numpy as np

from posttrain.config.sections import Compare, Sampled
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl
from posttrain.models import tokens
from posttrain.rl.answers import refuse_long
from posttrain.rl.batches import group_of


def training_prompts(section: Sampled, data: Path, tokenizer, model) -> list[dict]:
    """The distinct training prompts of `section.prompts`.

    Raises UserError where they are fewer than an iteration's answers, or one is too long for the model.
    """
    file = _file(data, section.prompts, "train")
    rows = _prompts(file, tokenizer)
    refuse_long(model, rows, section.max_new_tokens)
    if len(rows) < (asked := section.batch_size // group_of(section)):
        name = section.__class__.__name__.lower()
        raise UserError(f"{name}: {file} has {len(rows)} different prompts, and an iteration asks {asked}")
    return rows


def held_out_prompts(section: Compare, data: Path, tokenizer, model) -> list[dict]:
    """Distinct held-out prompts of judged answers, or of SFT rows where there are none of those.

    Raises UserError where there are no prompts, or one is too long for the model.
    """
    for kind in ("preference", "kto", "sft"):
        if rows := _prompts(_file(data, kind, "test"), tokenizer):
            order = np.random.default_rng(section.seed).permutation(len(rows))[: section.prompts]
            chosen = [rows[n] for n in sorted(order)]
            refuse_long(model, chosen, section.max_new_tokens)
            return chosen
    raise UserError(f"compare: {data} holds out no prompts; raise prepare.test_fraction")


def given_replies(data: Path) -> dict[str, str]:
    """Id of a held-out row -> its given reply: a pair's chosen answer, a good completion, an SFT row's last reply."""
    for kind in ("preference", "kto", "sft"):
        if rows := [row for row in _rows(_file(data, kind, "test")) if row.get("prompt") != ""]:
            return {row["id"]: tokens.spoken(_given(row)) for row in rows if row.get("label") is not False}
    return {}


def _given(row: dict) -> str | list[dict]:
    """The reply that a row gives to its prompt."""
    if "messages" in row:
        return row["messages"][-1:]
    return row["chosen"] if "chosen" in row else row["completion"]


def demonstrations(data: Path, tokenizer) -> list[tuple[list[int], list[int]]]:
    """The SFT rows as tokens: (prompt, the assistant's last turn). Raises UserError where there are none."""
    file, pairs = _file(data, "sft", "train"), []
    for row in _rows(file):
        encoded = tokens.encode(tokenizer, row)
        ids, labels = encoded["input_ids"], encoded["labels"]
        stop = max(n for n, label in enumerate(labels) if label != tokens.MASKED) + 1
        start = max((n for n in range(stop) if labels[n] == tokens.MASKED), default=-1) + 1
        pairs.append((ids[:start], ids[start:stop]))
    if not pairs:
        raise UserError(f"ppo.sft_coefficient: there are no rows of supervised fine-tuning in {file}")
    return pairs


def _file(data: Path, kind: str, side: str) -> Path:
    return data.parent / "data" / kind / f"{side}.jsonl"


def _rows(file: Path) -> list[dict]:
    return list(read_jsonl(file)) if file.is_file() else []


def _prompts(file: Path, tokenizer) -> list[dict]:
    """The distinct prompts of a file: id, tokens (`ids`), text (`prompt`), and `answer` or None."""
    prompts: dict[tuple[int, ...], dict] = {}
    for row in _rows(file):
        if row.get("prompt") == "":  # a whole text, which asks nothing
            continue
        ids = tokens.encode_prompt(tokenizer, row)
        prompt = {"id": row["id"], "ids": ids, "prompt": tokens.prompt_text(row), "answer": row.get("answer")}
        prompt["form"] = tokens.form_of([row])
        prompts.setdefault(tuple(ids), prompt)
    return list(prompts.values())
