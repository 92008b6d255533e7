"""Data: read, checked line by line, split by group, measured; and the benchmark tasks of what is held out.

python -m posttrain prepare --config results/NAME/prepare/config.yaml --output results/NAME/prepare/manifest.json
"""

import os
from pathlib import Path

from posttrain.config.sections import TRAINED, Prepare
from posttrain.data.limits import limit_length, prove
from posttrain.data.sides import divide, refuse_empty, separate, warn_one_label, without_repeats
from posttrain.data.sources import card, read_source
from posttrain.data.tokenizer import make_tokenizer
from posttrain.evaluation import tasks
from posttrain.ground.files import write_jsonl
from posttrain.ground.progress import say

WORLD_DOCUMENTS = 200  # held-out documents whose likelihood is measured


def prepare(section: Prepare, work: Path, checkpoints: Path, fetched: list[Path] = ()) -> dict:
    """Write `work/data` (a folder for each of TRAINED, tasks, tokenizer) and return the data card.

    Raises UserError naming file:line for what cannot be used, and for rows that training and evaluation share.
    """
    sides = {task: {"train": [], "test": []} for task in TRAINED}
    cards, questions = [], []
    if section.world:
        questions = add_world(section, sides, cards)
    evaluation_rows = [*questions]  # they become a benchmark, so what training knows of them is an error
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
    made = write_data(section, work, sides, tokenizer, questions, choices)
    splits = {
        task: {side: len(rows) for side, rows in sides[task].items()} for task in TRAINED if any(sides[task].values())
    }
    say(", ".join(f"{n['train']}+{n['test']} {task} rows" for task, n in splits.items()) + f"; tasks {made}")
    return {
        "sources": [entry for entry in cards if entry["total"] or entry["dropped"] or entry["warnings"]],
        "splits": splits,
        "tokens": {task: counts for task, counts in lengths.items() if counts},
        "vocabulary": len(tokenizer),
        "tasks": made,
    }


def write_data(section: Prepare, work: Path, sides: dict, tokenizer, questions: list, choices: list) -> list[str]:
    """Write rows, tokenizer and benchmark tasks below `work/data`; returns the names of the tasks."""
    folder = work / "data"
    for task in TRAINED:
        for side, rows in sides[task].items():
            if rows:
                write_jsonl(folder / task / f"{side}.jsonl", rows)
    tokenizer.save_pretrained(folder / "tokenizer")
    retrieval = [row for row in sides["long"]["test"] if "answer" in row]
    home, texts = f"{os.path.relpath(work.parent)}/data/tasks", held_out(section, sides)
    return tasks.write_tasks(folder / "tasks", home, questions, texts, choices, retrieval)


def add_world(section: Prepare, sides: dict, cards: list) -> list[dict]:
    """Add the built-in world's rows to both sides; returns its held-out questions."""
    from posttrain.world import longtext, world

    made = vars(world.generate(section.seed, **section.world.model_dump(exclude={"long"})))
    if section.world.long:
        made = made | longtext.generate(section.seed, section.world.documents, section.world.long)
    for task in made:
        for side, found in made[task].items():
            sides[task][side] += [{"group": row["id"], **row, "source": f"world:{row['id']}"} for row in found]
            cards.append(card(f"world, {side}", task, {}, total=len(found), kept=len(found)))
    return [row for row in sides["sft"]["test"] if row["source"].startswith("world:")]


def held_out(section: Prepare, sides: dict) -> dict[str, list[str]]:
    """Documents whose likelihood evaluation measures: held-out text, and held-out rows of local sft data."""
    documents = [row["text"] for row in sides["text"]["test"]]
    written = [] if section.world else [" ".join(t for t in spoken(row)) for row in sides["sft"]["test"]]
    return {
        "heldout_text": documents[:WORLD_DOCUMENTS] if section.world else documents,
        "heldout_sft": written,
    }


def spoken(row: dict) -> list[str]:
    """What stands in a row, without roles and template."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    return [row["prompt"] + row["completion"]]
