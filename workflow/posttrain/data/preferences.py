"""Preference pairs as the trainers read them: prepared rows, their tokens, and the labels of controls."""

import random
from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl
from posttrain.models import tokens

OPPOSITE = {"chosen": "rejected", "rejected": "chosen"}


def pairs(data: Path, side: str) -> list[dict]:
    """The prepared pairs of one side, `train` or `test`. data: manifest of `prepare`.

    Raises UserError when there are none to train on.
    """
    file = data.parent / "data" / "preference" / f"{side}.jsonl"
    rows = read_jsonl(file) if file.is_file() else []
    if not rows and side == "train":
        raise UserError(f"{data}: holds no preference pairs; set prepare.preference or prepare.world")
    return rows


def tokenized(tokenizer, data: Path, side: str, longest: int) -> list[dict]:
    """The pairs as tokens: `chosen_ids` and `rejected_ids`, each prompt and answer up to the end of turn, and `kind`.

    Raises UserError naming a row that breaks the token contract or is longer than `longest` tokens.
    """
    encoded = []
    for row in pairs(data, side):
        pair = tokens.encode_pair(tokenizer, row)
        whole = {f"{answer}_ids": pair["prompt_ids"] + pair[f"{answer}_ids"] for answer in OPPOSITE}
        if max(map(len, whole.values())) > longest:
            raise UserError(f"row {tokens.row_name(row)}: over max_length ({longest} tokens)")
        encoded.append({**whole, "kind": row.get("kind", "pairs")})
    return encoded


def relabelled(rows: list[dict], labels: str, seed: int) -> list[dict]:
    """The pairs with the labels of a control (`config.Pairs.labels`): swapped, or shuffled by a random stream that
    nothing else draws from."""
    stream = random.Random(f"{seed}:labels")
    return [
        swapped(row) if labels == "swapped" or (labels == "shuffled" and stream.random() < 0.5) else row for row in rows
    ]


def swapped(row: dict) -> dict:
    """The pair with its chosen and its rejected answer exchanged, in every key that names one of them."""
    new_name = {key: key.replace(side, OPPOSITE[side]) for key in row for side in OPPOSITE if side in key}
    return {new_name.get(key, key): value for key, value in row.items()}
