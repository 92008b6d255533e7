"""Put rows on the training and the held-out side; no row is on both or occurs twice.

`sides` is task -> side ("train", "test") -> rows, for each task of `config.sections.TRAINED`.
"""

from collections import Counter

from posttrain.config.sections import TRAINED, Prepare, Source
from posttrain.config.sources import sides as sides_with_source
from posttrain.data import overlap
from posttrain.data.sources import card
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say


def divide(section: Prepare, source: Source, rows: list[dict], sides: dict[str, list], cards: list) -> list[dict]:
    """Add a source's rows to the sides of its task, by `use`; returns the rows of a source with `use: test`."""
    if source.use == "split":
        train, test, warning = overlap.split(rows, section.test_fraction, section.seed)
        if warning:
            say(f"{cards[-1]['name']}: warning: {warning}")
            cards[-1]["warnings"][warning] = 1
        sides["train"] += train
        sides["test"] += test
        return []
    sides[source.use] += rows
    return rows if source.use == "test" else []


def without_repeats(rows: list[dict], task: str, cards: list) -> list[dict]:
    """The rows of all sources of a task without exact repeats, which the data card counts."""
    distinct, repeats = overlap.deduplicate(rows)
    cards.append(card(f"{task}: all sources", task, {"exact duplicate": repeats}))
    return distinct


def separate(sides: dict, cards: list, evaluation_rows: list[dict]) -> None:
    """Drop and count held-out rows that overlap with training rows (see overlap.overlap).

    Raises UserError, naming both places, where one of `evaluation_rows` overlaps: rows of sources with `use: test`,
    choices, and the world's questions.
    """
    train = [row for task in TRAINED for row in sides[task]["train"]]
    tests = [row for task in TRAINED for row in sides[task]["test"]]
    tests += [row for row in evaluation_rows if "choices" in row]
    seen = {finding.test: finding for finding in overlap.overlap(train, tests)} if tests else {}
    leaks = [seen[row["source"]] for row in evaluation_rows if row["source"] in seen]
    if leaks:
        raise UserError(
            f"prepare: {len(leaks)} evaluation rows are in the training rows too; remove them from one of the two",
            *map(str, leaks[:8]),
        )
    for task in TRAINED:
        unseen = [row for row in sides[task]["test"] if row["source"] not in seen]
        leaked = len(sides[task]["test"]) - len(unseen)
        cards.append(card("held out by the split", task, {"also in the training rows": leaked}))
        sides[task]["test"] = unseen


def refuse_empty(section: Prepare, sides: dict, cards: list) -> None:
    """Raise UserError for a kind of data with sources of which no training row is left."""
    for task in TRAINED:
        if "train" in sides_with_source(section, task) and not sides[task]["train"]:
            long = sum(entry["dropped"].get("too long", 0) for entry in cards if entry["task"] == task)
            raise UserError(
                f"prepare.{task}: no training row is left ({long} longer than max_tokens {section.max_tokens})"
            )


def warn_one_label(rows: list[dict], cards: list) -> None:
    """Warn where all KTO training rows have the same label: KTO then has nothing to contrast."""
    labels = Counter(str(row["label"]).lower() for row in rows)
    if len(labels) == 1:
        ((label, count),) = labels.items()
        say(f"prepare.kto: warning: all {count} training rows have label {label}: nothing to contrast")
        cards.append(card("kto: training rows", "kto", {}, {"one_label": count}))
