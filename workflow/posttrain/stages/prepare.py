"""Read the data, check it line by line, split it by group and count it; write benchmark tasks of held-out rows.

python -m posttrain prepare --config results/NAME/prepare/config.yaml --output results/NAME/prepare/manifest.json

`sides` is task -> side ("train", "test") -> rows, for each task of TRAINED.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config.sections import ANSWERED, ASKED, TRAINED, Prepare, Source
from posttrain.config.sources import sides as sides_with_source
from posttrain.data import lengths, mixture, repeats
from posttrain.data.conversations import suited
from posttrain.data.dropped import REPEAT, Dropped, entry, repeated
from posttrain.data.layouts import TASKS
from posttrain.data.overlap import Finding, overlap
from posttrain.data.reading import read_source
from posttrain.data.rows import card
from posttrain.data.stored import Rows, join, store
from posttrain.data.tokenizer import load_tokenizer, make_tokenizer
from posttrain.data.usable import askable, usable
from posttrain.evaluation.tasks import generated, multiple_choice, rolling, write_task
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say
from posttrain.models import tokens
from posttrain.models.control import control_text
from posttrain.world import rows as world_rows
from posttrain.world import tasks as world_tasks
from posttrain.world.longtext import Count, size

LEAKED = "also in the training rows"  # why a held-out row is dropped
NAMED = 5  # contradictions between sources that are named; all are counted
WORLD_DOCUMENTS = 200  # held-out documents whose likelihood is measured


def prepare(section: Prepare, work: Path, checkpoints: Path, fetched: Sequence[Path] = (), processes: int = 1) -> dict:
    """Write `work/data` (a folder for each of TRAINED, tasks, tokenizer) and return the data card.

    processes: that check, search and encode rows at the same time; what they write is the same however many they are.
    Rows pass through files in `checkpoints`, so that memory holds a few numbers of each. Raises UserError, naming
    file:line, for data that cannot be used and for rows in both training and evaluation.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, list[Rows]]] = {task: {"train": [], "test": []} for task in TRAINED}
    cards: list[dict] = []
    dropped = Dropped(work / "data" / "dropped.jsonl")
    brought = list(fetched)
    read = partial(
        read_source, section, cards=cards, dropped=dropped, fetched=brought, scratch=checkpoints, processes=processes
    )
    count = counter(section, brought)
    questions = add_world(section, parts, cards, count, checkpoints) if section.world else []
    evaluation_rows = [store(questions, checkpoints)]  # rows of benchmarks: an overlap with training rows is an error
    for task in TRAINED:
        for source in getattr(section, task):
            only_test = divide(section, source, read(source, task), parts[task], cards)
            evaluation_rows += [] if section.overlap == "drop" else only_test
    asked = {kind: read_asked(section, kind, read, cards, dropped) for kind in ASKED}
    sides = {
        task: {side: without_repeats(join(rows), task, cards, dropped) for side, rows in of_task.items()}
        for task, of_task in parts.items()
    }
    for task in TRAINED:
        warn_contradictions(join(list(sides[task].values())), task, cards)
    separate(sides, cards, dropped, join([*evaluation_rows, *asked.values()]), processes)
    suited(section, sides, cards, checkpoints)
    tokenizer = make_tokenizer(section, sides, brought)
    sizes = {
        task: usable(section, tokenizer, task, sides[task], work / "data", dropped, cards, checkpoints, processes)
        for task in TRAINED
    }
    asked = {kind: askable(tokenizer, kind, rows, dropped, cards) for kind, rows in asked.items()}
    refuse_empty(section, sides, dropped)
    warn_one_label(sides["kto"]["train"], cards)
    names = write_data(section, work, sides, tokenizer, questions, asked, count)
    mixtures = {
        task: mixture.weigh(section, task, sides[task]["train"], tokenizer, brought, work / "data") for task in TRAINED
    }
    if dropped:
        say(f"{len(dropped):,} rows are dropped: data/dropped.jsonl lists each with file, line and reason")
    return data_card(sides, cards, tokenizer, names, tokens=sizes, mixture=mixtures)


def data_card(sides: dict, cards: list, tokenizer, names: list[str], **of_tasks: dict[str, Any]) -> dict:
    """The data card. names: of the benchmark tasks; of_tasks: figures of each task, which are left out where empty."""
    splits = {
        task: {side: len(rows) for side, rows in sides[task].items()} for task in TRAINED if any(sides[task].values())
    }
    say(", ".join(f"{n['train']}+{n['test']} {task} rows" for task, n in splits.items()) + f"; tasks {names}")
    figures = {name: {task: of for task, of in tasks.items() if of} for name, tasks in of_tasks.items()}
    answered = join([rows for task in ANSWERED for rows in sides[task].values()])
    return {
        "sources": [entry for entry in cards if entry["total"] or entry["dropped"] or entry["warnings"]],
        "splits": splits,
        **{name: tasks for name, tasks in figures.items() if tasks or name == "tokens"},
        "vocabulary": len(tokenizer),
        "tasks": names,
        **({"form": "plain"} if answered and tokens.form_of(answered) == "plain" else {}),
    }


def counter(section: Prepare, fetched: list[Path]) -> Count:
    """Counts the tokens of a text; its words, where a tokenizer is trained on the built-in world."""
    chosen = section.tokenizer
    if chosen is None or chosen.vocab_size or not (section.world and section.world.long):
        return size
    tokenizer = load_tokenizer(chosen.hub, chosen.path, fetched)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def add_world(section: Prepare, parts: dict, cards: list, count: Count, scratch: Path) -> list[dict]:
    """Add the built-in world's rows to both sides; returns its held-out questions."""
    assert section.world
    world = world_rows.generate(section.seed, section.world, count)
    for task, of_sides in world.items():
        for side, rows in of_sides.items():
            parts[task][side].append(store(rows, scratch))
            cards.append(card(f"world, {side}", task, {}, total=len(rows), kept=len(rows)))
    return list(filter(world_rows.is_of_world, world["sft"]["test"]))


def read_asked(section: Prepare, kind: str, read: Callable[..., Rows], cards: list, dropped: Dropped) -> Rows:
    """The questions of all sources of `choices` or `answers`, without repeats."""
    rows = join([read(source, TASKS[kind]) for source in getattr(section, kind)])
    distinct = without_repeats(rows, kind, cards, dropped)
    warn_contradictions(distinct, kind, cards)
    return distinct


def divide(section: Prepare, source: Source, rows: Rows, sides: dict[str, list[Rows]], cards: list) -> list[Rows]:
    """Add a source's rows to the sides of its task, by `use`; returns the rows of a source with `use: test`."""
    if source.use == "split":
        train, test, warning = split(rows, section.test_fraction, section.seed)
        if warning:
            say(f"{cards[-1]['name']}: warning: {warning}")
            cards[-1]["warnings"][warning] = 1
        sides["train"].append(train)
        sides["test"].append(test)
        return []
    sides[source.use].append(rows)
    return [rows] if source.use == "test" else []


def split(rows: Rows, test_fraction: float, seed: int) -> tuple[Rows, Rows, str | None]:
    """(train, test, warning). A group's side depends on seed and group only, so that new rows move no others.

    With two or more groups, neither side is empty. With fewer there is no test set but a warning.
    Raises ValueError unless 0 <= test_fraction < 1.
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction must be at least 0 and under 1, found {test_fraction}")
    places = np.fromiter((_place(seed, group) for group in rows.column("group")), np.float64, len(rows))
    none, groups = rows.take(np.arange(0)), np.unique(places)
    if test_fraction == 0:
        return rows, none, None
    if len(groups) < 2:
        count = f"{len(rows)} rows in {len(groups)} groups"
        return rows, none, f"{count}: too few rows for a train/test split, no test set is made"
    held_out = (places < min(test_fraction, groups[-1])) | (places == groups[0])
    return rows.take(np.flatnonzero(~held_out)), rows.take(np.flatnonzero(held_out)), None


def _place(seed: int, group: str) -> float:
    """A number in [0, 1) drawn from seed and group."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:6], "big") / 2**48


def without_repeats(rows: Rows, task: str, cards: list, dropped: Dropped) -> Rows:
    """The rows of all sources of a task without exact repeats, which are counted and listed."""
    distinct, again = repeats.without_repeats(rows)
    cards.append(card(f"{task}: all sources", task, {REPEAT: len(rows) - len(distinct)}))
    dropped.add(repeated(again, task))
    return distinct


def warn_contradictions(rows: Rows, task: str, cards: list) -> None:
    """Warn of rows of one source that contradict those of another; each source was searched when it was read."""
    count = 0
    for row, earlier in repeats.pairs(rows, *repeats.contradictions(rows)):
        if row["source"].rpartition(":")[0] != earlier["source"].rpartition(":")[0]:
            count += 1
            if count <= NAMED:
                say(f"{row['source']}: warning: contradicts {earlier['source']}")
    if count > NAMED:
        say(f"prepare.{task}: warning: {count - NAMED:,} more rows contradict those of another source")
    if count:
        cards.append(card(f"{task}: all sources", task, {}, {"contradiction": count}))


def warn_examples(findings: list[Finding], cards: list) -> None:
    """Warn of test rows with training rows among their worked examples."""
    for finding in findings[:NAMED]:
        say(f"warning: {finding}")
    if len(findings) > NAMED:
        say(f"warning: {len(findings) - NAMED:,} more test rows have training rows among their worked examples")
    if findings:
        cards.append(card("rows for evaluation", "eval", {}, {"training rows as examples": len(findings)}))


def separate(
    sides: dict[str, dict[str, Rows]], cards: list, dropped: Dropped, evaluation_rows: Rows, processes: int
) -> None:
    """Drop, count and list held-out rows that overlap with training rows (see data/overlap.py).

    Raises UserError, naming both places, where one of `evaluation_rows` overlaps: rows of sources with `use: test`
    unless `prepare.overlap` is `drop`, questions with choices or answers, and the world's questions.
    """
    train = join([sides[task]["train"] for task in TRAINED])
    questions = [place for place, row in enumerate(evaluation_rows) if "question" in row]
    tests = join([*(sides[task]["test"] for task in TRAINED), evaluation_rows.take(np.array(questions, int))])
    findings = overlap(train, tests, processes) if tests else []
    warn_examples([finding for finding in findings if not finding.is_leak], cards)
    seen = {finding.test: finding for finding in findings if finding.is_leak}
    leaks = [seen[row["source"]] for row in evaluation_rows if row["source"] in seen] if seen else []
    if leaks:
        raise UserError(
            f"prepare: {len(leaks)} evaluation rows are in the training rows too; remove them from one of the two, or "
            "set prepare.overlap: drop, which drops rows of use: test",
            *map(str, leaks[:20]),
        )
    for task in TRAINED if seen else ():
        is_leaked = np.array([row["source"] in seen for row in sides[task]["test"]], bool)
        leaked = [seen[row["source"]] for row in sides[task]["test"].take(np.flatnonzero(is_leaked))]
        cards.append(card("held out by the split", task, {LEAKED: len(leaked)}))
        dropped.add(entry(finding.test, task, LEAKED, str(finding)) for finding in leaked)
        sides[task]["test"] = sides[task]["test"].take(np.flatnonzero(~is_leaked))


def refuse_empty(section: Prepare, sides: dict, dropped: Dropped) -> None:
    """Raise UserError, with the first row of each reason, for a kind of data with sources of which no training row is
    left."""
    for task in TRAINED:
        if "train" in sides_with_source(section, task) and not sides[task]["train"]:
            lost = dropped.kinds[task]
            what = f"no training row is left ({lengths.counted(section, lost.counts)})"
            raise UserError(*(f"prepare.{task}: {sentence}" for sentence in [what, *lost.sentences()]))


def warn_one_label(rows: Rows, cards: list) -> None:
    """Warn where all KTO training rows have the same label: KTO then has nothing to contrast."""
    labels = Counter(str(row["label"]).lower() for row in rows)
    if len(labels) == 1:
        ((label, count),) = labels.items()
        say(f"prepare.kto: warning: all {count} training rows have label {label}: nothing to contrast")
        cards.append(card("kto: training rows", "kto", {}, {"one_label": count}))


def write_data(
    section: Prepare, work: Path, sides: dict, tokenizer, questions: list, asked: dict[str, Rows], count: Count
) -> list[str]:
    """Write rows, tokenizer and benchmark tasks below `work/data`; returns the names of the tasks.

    questions: those of the built-in world; asked: those with `choices` and with `answers`.
    """
    folder, home = work / "data", f"{os.path.relpath(work.parent)}/data/tasks"  # home: of the tasks, once published
    for task in TRAINED:
        for side, rows in sides[task].items():
            if rows:
                rows.write(folder / task / f"{side}.jsonl")
    tokenizer.save_pretrained(folder / "tokenizer")
    names = world_tasks.write_questions(folder / "tasks", home, questions)
    for name, documents in held_out(section, sides, tokenizer).items():
        if documents:
            write_task(folder / "tasks", rolling(name, home), [{"text": text} for text in documents])
            names.append(name)
    if asked["choices"]:
        write_task(folder / "tasks", multiple_choice("choices", home), asked["choices"])
        names.append("choices")
    if asked["answers"]:
        answers = [row["answer"] for row in asked["answers"]]
        write_task(folder / "tasks", generated("answers", home, answers), asked["answers"])
        names.append("answers")
    names += world_tasks.write_retrieval(folder / "tasks", home, sides["long"]["test"], count)
    if names:  # the tasks that evaluation runs by default
        (folder / "tasks" / "default.json").write_text(json.dumps(names) + "\n")
    return names


def held_out(section: Prepare, sides: dict[str, dict[str, Rows]], tokenizer) -> dict[str, list[str]]:
    """Documents whose likelihood evaluation measures: held-out text, and held-out rows of local sft data without roles
    and template, of a conversation that was split the whole. Rows with control text are left out, which lm-eval would
    read as control tokens."""
    text = [row["text"] for row in sides["text"]["test"]]
    if section.world:
        return {"heldout_text": text[:WORLD_DOCUMENTS]}
    conversations = [
        " ".join(map(tokens.turn_text, row["messages"])) if "messages" in row else row["prompt"] + row["completion"]
        for row in sides["sft"]["test"]
        if row.get("conversation", row["id"]) == row["id"] and not control_text(tokenizer, row)
    ]
    return {"heldout_text": text, "heldout_sft": conversations}
