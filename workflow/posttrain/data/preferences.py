"""Judged answers as the trainers read them: prepared rows, their tokens, and the labels of controls."""

import random
from pathlib import Path

from posttrain.config.sections import Pairs, Referenced
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl
from posttrain.models import tokens

# Task of `prepare` -> the answers that each of its rows has to one prompt, with the names that TRL gives the columns of
# their log-probabilities under the reference.
ANSWERS = {
    "preference": {"chosen": "ref_chosen_logps", "rejected": "ref_rejected_logps"},
    "kto": {"completion": "ref_logps"},
}
ROWS = {"preference": "pairs", "kto": "kto rows"}
KEYS = {"preference": "prepare.preference or prepare.world", "kto": "prepare.kto"}
OPPOSITE = {"chosen": "rejected", "rejected": "chosen"}


def tasks(data: Path) -> list[str]:
    """The tasks that there are rows of; where there are none, preference pairs, which `rows` then misses."""
    return [task for task in ANSWERS if _file(data, "train", task).is_file()] or ["preference"]


def _file(data: Path, side: str, task: str) -> Path:
    return data.parent / "data" / task / f"{side}.jsonl"


def rows(data: Path, side: str, task: str = "preference") -> list[dict]:
    """The prepared rows of one side, `train` or `test`. data: manifest of `prepare`.

    Raises UserError when there are none to train on.
    """
    file = _file(data, side, task)
    prepared = read_jsonl(file) if file.is_file() else []
    if not prepared and side == "train":
        raise UserError(f"{data}: holds no {task} {ROWS[task].split()[-1]}; set {KEYS[task]}")
    return prepared


def tokenized(tokenizer, data: Path, side: str, longest: int | None = None, task: str = "preference") -> list[dict]:
    """The rows as tokens: `prompt_ids` and, of each answer up to its end of turn, `chosen_ids`, `rejected_ids` or
    `completion_ids`; and their `id`, `kind` and `label`, where they have one.

    Raises UserError naming a row that breaks the token contract or is longer than `longest` tokens.
    """
    encoded = []
    for row in rows(data, side, task):
        ids = tokens.encode_answers(tokenizer, row, tuple(ANSWERS[task]))
        length = len(ids["prompt_ids"]) + max(len(ids[f"{answer}_ids"]) for answer in ANSWERS[task])
        if longest and length > longest:
            raise UserError(f"row {tokens.row_name(row)}: over max_length ({longest} tokens)")
        encoded.append(ids | {key: row[key] for key in ("id", "kind", "label") if key in row})
    return encoded


def referenced_rows(tokenizer, data: Path, reference: Path, section: Referenced) -> tuple[list[dict], list[dict]]:
    """The rows to train on, labelled as the section says, and those held out (see `with_reference`).

    Where the section is not for pairs, each pair becomes two rows.
    """
    train, test = (with_reference(tokenizer, data, reference, side, section) for side in ("train", "test"))
    if not isinstance(section, Pairs):
        train, test = unpaired(train), unpaired(test)
    return relabelled(train, section.labels, section.seed), test


def with_reference(tokenizer, data: Path, reference: Path, side: str, section: Referenced) -> list[dict]:
    """The rows as tokens, each with the log-probabilities of its answers under the SFT policy (`stages.reference`).

    Raises UserError where the reference was made from other rows, and as `tokenized` does.
    """
    task = getattr(section, "rows", "preference")
    encoded = tokenized(tokenizer, data, side, section.max_length, task)
    file = reference_file(reference.parent, side, task)
    log_probs = read_jsonl(file) if file.is_file() else []
    if [row["id"] for row in encoded] != [row["id"] for row in log_probs]:
        raise UserError(f"{reference}: was made from other rows than {data}; remake it: rm {reference}")
    return [row | known for row, known in zip(encoded, log_probs, strict=True)]


def reference_file(folder: Path, side: str, task: str) -> Path:
    """Where an artifact of `reference` keeps the log-probabilities of one side's rows."""
    return folder / "data" / (f"{side}.jsonl" if task == "preference" else f"{task}/{side}.jsonl")


def unpaired(rows: list[dict]) -> list[dict]:
    """Each pair as two rows with a label, `true` for the chosen answer; rows that have a label as they are."""
    return [single for row in rows for single in ([row] if "label" in row else halves(row))]


def halves(pair: dict) -> list[dict]:
    """A pair with its reference as a row for each of its answers, named as KTO's."""
    columns = ANSWERS["preference"]
    return [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{answer}_ids"], "ref_logps": pair[columns[answer]]}
        | {"label": answer == "chosen"}
        for answer in columns
    ]


def relabelled(rows: list[dict], labels: str, seed: int | None) -> list[dict]:
    """The rows with the labels of a control (`config.Judged.labels`): swapped, or shuffled by a random stream that
    nothing else draws from."""
    stream = random.Random(f"{seed}:labels")
    turn = {"chosen": lambda: False, "swapped": lambda: True, "shuffled": lambda: stream.random() < 0.5}[labels]
    return [swapped(row) if turn() else row for row in rows]


def swapped(row: dict) -> dict:
    """The row with the opposite `label`; a pair with its answers exchanged, in every key that names one of them."""
    if "label" in row:
        return row | {"label": not row["label"]}
    new_name = {key: key.replace(side, OPPOSITE[side]) for key in row for side in OPPOSITE if side in key}
    return {new_name.get(key, key): value for key, value in row.items()}
