"""Read the data, check it line by line, split it by group and count it; write benchmark tasks of held-out rows.

python -m posttrain prepare --config results/NAME/prepare/config.yaml --output results/NAME/prepare/manifest.json
"""

import os
from collections.abc import Sequence
from pathlib import Path

from posttrain.config.sections import TRAINED, Prepare
from posttrain.data.limits import limit_length, prove
from posttrain.data.sides import divide, refuse_empty, separate, warn_one_label, without_repeats
from posttrain.data.sources import card, read_source
from posttrain.data.tokenizer import make_tokenizer
from posttrain.evaluation import tasks
from posttrain.ground.files import write_jsonl
from posttrain.ground.progress import say
from posttrain.world import rows as world_rows
from posttrain.world import tasks as world_tasks

WORLD_DOCUMENTS = 200  # held-out documents whose likelihood is measured


def prepare(section: Prepare, work: Path, checkpoints: Path, fetched: Sequence[Path] = ()) -> dict:
    """Write `work/data` (a folder for each of TRAINED, tasks, tokenizer) and return the data card.

    Raises UserError, naming file:line, for data that cannot be used and for rows in both training and evaluation.
    """
    sides: dict[str, dict[str, list]] = {task: {"train": [], "test": []} for task in TRAINED}
    cards: list[dict] = []
    questions = add_world(section, sides, cards) if section.world else []
    evaluation_rows = [*questions]  # rows of benchmarks: an overlap with training rows is an error
    for task in TRAINED:
        for source in getattr(section, task):
            rows = read_source(section, source, task, cards, list(fetched))
            evaluation_rows += divide(section, source, rows, sides[task], cards)
    choices = [row for source in section.choices for row in read_source(section, source, "eval", cards, list(fetched))]
    for task in TRAINED:
        sides[task] = {side: without_repeats(rows, task, cards) for side, rows in sides[task].items()}
    choices = without_repeats(choices, "choices", cards)
    separate(sides, cards, evaluation_rows + choices)
    tokenizer = make_tokenizer(section, sides, list(fetched))
    limited = ("sft", "preference", "kto")
    lengths = {task: limit_length(section, tokenizer, task, sides[task], cards) for task in limited}
    refuse_empty(section, sides, cards)
    warn_one_label(sides["kto"]["train"], cards)
    for task in ("sft", "kto"):
        prove(tokenizer, sides[task])
    names = write_data(section, work, sides, tokenizer, questions, choices)
    splits = {
        task: {side: len(rows) for side, rows in sides[task].items()} for task in TRAINED if any(sides[task].values())
    }
    say(", ".join(f"{n['train']}+{n['test']} {task} rows" for task, n in splits.items()) + f"; tasks {names}")
    return {
        "sources": [entry for entry in cards if entry["total"] or entry["dropped"] or entry["warnings"]],
        "splits": splits,
        "tokens": {task: counts for task, counts in lengths.items() if counts},
        "vocabulary": len(tokenizer),
        "tasks": names,
    }


def write_data(section: Prepare, work: Path, sides: dict, tokenizer, questions: list, choices: list) -> list[str]:
    """Write rows, tokenizer and benchmark tasks below `work/data`; returns the names of the tasks."""
    folder = work / "data"
    for task in TRAINED:
        for side, rows in sides[task].items():
            if rows:
                write_jsonl(folder / task / f"{side}.jsonl", rows)
    tokenizer.save_pretrained(folder / "tokenizer")
    home = f"{os.path.relpath(work.parent)}/data/tasks"
    return write_tasks(folder / "tasks", home, section, sides, questions, choices)


def add_world(section: Prepare, sides: dict, cards: list) -> list[dict]:
    """Add the built-in world's rows to both sides; returns its held-out questions."""
    assert section.world
    for task, split in world_rows.generate(section.seed, section.world).items():
        for side, rows_of_side in split.items():
            sides[task][side] += rows_of_side
            cards.append(card(f"world, {side}", task, {}, total=len(rows_of_side), kept=len(rows_of_side)))
    return list(filter(world_rows.is_of_world, sides["sft"]["test"]))


def write_tasks(
    folder: Path, home: str, section: Prepare, sides: dict, questions: list[dict], choices: list[dict]
) -> list[str]:
    """Write the lm-eval tasks of the held-out rows into `folder`; returns their names.

    home: the folder's path after publishing. questions: those of the built-in world.
    """
    names = world_tasks.write_questions(folder, home, questions)
    names += tasks.write_texts(folder, home, held_out(section, sides))
    names += tasks.write_choices(folder, home, choices)
    names += world_tasks.write_retrieval(folder, home, sides["long"]["test"])
    tasks.write_default(folder, names)
    return names


def held_out(section: Prepare, sides: dict) -> dict[str, list[str]]:
    """Documents whose likelihood evaluation measures: held-out text, and held-out rows of local sft data."""
    documents = [row["text"] for row in sides["text"]["test"]]
    conversations = [] if section.world else [" ".join(texts_of(row)) for row in sides["sft"]["test"]]
    return {
        "heldout_text": documents[:WORLD_DOCUMENTS] if section.world else documents,
        "heldout_sft": conversations,
    }


def texts_of(row: dict) -> list[str]:
    """The texts of an `sft` row, without roles and template."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    return [row["prompt"] + row["completion"]]
