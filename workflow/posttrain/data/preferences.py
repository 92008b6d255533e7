"""Judged answers for the trainers: prepared rows, their tokens, and the labels of controls."""

import random
from pathlib import Path

from posttrain.config.sections import Pairs, Referenced
from posttrain.data.tokenized import load
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl

# Task of `prepare` -> the keys of a row's answers, each with TRL's column of its log-probability under the reference.
ANSWERS = {
    "preference": {"chosen": "ref_chosen_logps", "rejected": "ref_rejected_logps"},
    "kto": {"completion": "ref_logps"},
}
ROWS = {"preference": "pairs", "kto": "kto rows"}
KEYS = {"preference": "prepare.preference or prepare.world", "kto": "prepare.kto"}
OPPOSITE = {"chosen": "rejected", "rejected": "chosen"}


def tasks(data: Path) -> list[str]:
    """The tasks that have training rows; where none has, `preference`, for which `rows` then raises."""
    return [task for task in ANSWERS if _file(data, "train", task).is_file()] or ["preference"]


def _file(data: Path, side: str, task: str) -> Path:
    return data.parent / "data" / task / f"{side}.jsonl"


def rows(data: Path, side: str, task: str = "preference") -> list[dict]:
    """The prepared rows of one side, `train` or `test`. data: manifest of `prepare`.

    Raises UserError where there are no rows to train on.
    """
    file = _file(data, side, task)
    prepared = read_jsonl(file) if file.is_file() else []
    if not prepared and side == "train":
        raise UserError(f"{data}: holds no {task} {ROWS[task].split()[-1]}; set {KEYS[task]}")
    return prepared


def tokenized(
    tokenizer, data: Path, side: str, longest: int | None = None, task: str = "preference", more: tuple[str, ...] = ()
) -> list[dict]:
    """The rows as tokens: `prompt_ids`, and each answer up to its end of turn as `chosen_ids`, `rejected_ids` or
    `completion_ids`; with their `id`, `source`, `kind`, `label` and the keys `more`, where they have one.

    Raises UserError as `data.tokenized.load` does.
    """
    prepared, tokens = rows(data, side, task), load(tokenizer, data, task, side, longest) or ()
    names = ("id", "source", "kind", "label", *more)
    return [ids | {key: row[key] for key in names if key in row} for row, ids in zip(prepared, tokens, strict=True)]


def referenced_rows(tokenizer, data: Path, reference: Path, section: Referenced) -> tuple[list[dict], list[dict]]:
    """(training rows, with the section's labels; held-out rows); see `with_reference`.

    Where the section is not for pairs, each pair becomes two rows.
    """
    train, test = (with_reference(tokenizer, data, reference, side, section) for side in ("train", "test"))
    if not isinstance(section, Pairs):
        train, test = unpaired(train), unpaired(test)
    return relabelled(train, section.labels, section.seed), test


def with_reference(tokenizer, data: Path, reference: Path, side: str, section: Referenced) -> list[dict]:
    """The rows as tokens, each with the log-probabilities of its answers under the SFT policy (`stages.reference`).

    Raises UserError as `tokenized` does, and where the reference was computed on other rows.
    """
    task = getattr(section, "rows", "preference")
    encoded = tokenized(tokenizer, data, side, section.max_length, task)
    file = reference_file(reference.parent, side, task)
    log_probs = read_jsonl(file) if file.is_file() else []
    if [row["id"] for row in encoded] != [row["id"] for row in log_probs]:
        raise UserError(f"{reference}: was computed on other rows than those of {data}; remake it: rm {reference}")
    return [row | reference_row for row, reference_row in zip(encoded, log_probs, strict=True)]


def reference_file(folder: Path, side: str, task: str) -> Path:
    """The file of a `reference` artifact with the log-probabilities of one side's rows."""
    return folder / "data" / (f"{side}.jsonl" if task == "preference" else f"{task}/{side}.jsonl")


def unpaired(rows: list[dict]) -> list[dict]:
    """Each pair as two rows with a label, `true` for the chosen answer; rows with a label are unchanged."""
    return [single for row in rows for single in ([row] if "label" in row else halves(row))]


def halves(pair: dict) -> list[dict]:
    """A pair with its reference as two rows, one for each answer, with the keys of KTO's rows."""
    columns = ANSWERS["preference"]
    return [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{answer}_ids"], "ref_logps": pair[columns[answer]]}
        | {"label": answer == "chosen"}
        for answer in columns
    ]


def relabelled(rows: list[dict], labels: str, seed: int | None) -> list[dict]:
    """The rows with the labels of a control (`config.Judged.labels`): swapped, or shuffled by a random stream of its
    own."""
    stream = random.Random(f"{seed}:labels")
    swaps = {"chosen": lambda: False, "swapped": lambda: True, "shuffled": lambda: stream.random() < 0.5}[labels]
    return [swapped(row) if swaps() else row for row in rows]


def swapped(row: dict) -> dict:
    """The row with the opposite `label`, or the pair with its answers exchanged in every key that names one."""
    if "label" in row:
        return row | {"label": not row["label"]}
    new_name = {key: key.replace(side, OPPOSITE[side]) for key in row for side in OPPOSITE if side in key}
    return {new_name.get(key, key): value for key, value in row.items()}
