"""How often the rows of a mixture are read: sources with a `weight`, as shares of the training rows or their tokens."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from posttrain.config.sections import DOCUMENTS, Prepare, Source
from posttrain.config.sources import is_mixture
from posttrain.data import tokenized
from posttrain.data.reading import name_of, named_files
from posttrain.data.stored import BATCH, Rows, batches
from posttrain.ground.files import write_json
from posttrain.ground.progress import say
from posttrain.models import control

WORLD = "the built-in world"


def weigh(section: Prepare, task: str, rows: Rows, tokenizer, fetched: list[Path], folder: Path) -> list[dict]:
    """The `shares` of a task's training rows, which are told and written beside the rows; nothing without weights.

    folder: that of the prepared data.
    """
    if not is_mixture(section, task):
        return []
    places = (row["source"] for row in rows)
    entries = shares(section, task, fetched, places, sizes(tokenizer, task, rows, folder))
    tell(task, entries)
    write_json(folder / task / "mixture.json", entries)  # for `training.order.parts_of`
    return entries


def sizes(tokenizer, task: str, rows: Rows, folder: Path) -> Iterator[int]:
    """The number of tokens of each row; of a document, as its trainer reads it."""
    if task not in DOCUMENTS:
        yield from tokenized.lengths(tokenized.mapped(folder / task / "train.arrow")).tolist()
        return
    for batch in batches(rows, BATCH):
        texts = [row["text"] for row in batch]
        if task == "long":
            yield from map(len, control.plain(tokenizer, texts))
        else:  # in `text`, control tokens are what they are
            yield from map(len, tokenizer(texts, add_special_tokens=False).input_ids)


def shares(
    section: Prepare, task: str, fetched: list[Path], places: Iterable[str], lengths: Iterable[int]
) -> list[dict]:
    """For each source, in the order of the rows: number of `rows` and `tokens`, `weight` as a share of all weights,
    `share` of all rows that are read, and `times` that each row is read while as many rows are read as there are.

    places: the `source` (file:line) of each training row; lengths: its tokens.
    """
    weights: dict[str, float] = {WORLD: 1.0}
    of_file: dict[str, str] = {}
    for source in getattr(section, task):
        weights[name_of(source)] = 1.0 if source.weight is None else source.weight
        of_file |= {file: name_of(source) for file in files_of(source, task, fetched)}
    owners = (of_file.get(place.rpartition(":")[0], WORLD) for place in places)
    entries = []
    for name, run in groupby(zip(owners, lengths, strict=True), key=lambda pair: pair[0]):
        sizes = [length for _, length in run]
        entries.append({"source": name, "rows": len(sizes), "tokens": sum(sizes)})
    of_all = sum(weights[entry["source"]] for entry in entries)
    per_row = [weights[entry["source"]] for entry in entries]
    if section.weigh_by == "tokens":
        per_row = [weight * entry["rows"] / entry["tokens"] for weight, entry in zip(per_row, entries, strict=True)]
    total = sum(entry["rows"] for entry in entries)
    for entry, weight in zip(entries, per_row, strict=True):
        entry["weight"] = weights[entry["source"]] / of_all
        entry["share"] = weight / sum(per_row)
        entry["times"] = entry["share"] * total / entry["rows"]
    return entries


def files_of(source: Source, task: str, fetched: list[Path]) -> list[str]:
    """The names of a source's files in the places of its rows."""
    return [name_of(source)] if source.dataset and not source.files else list(named_files(source, task, fetched))


def tell(task: str, entries: list[dict]) -> None:
    """Print the shares."""
    for entry in entries:
        share, times = f"{entry['share']:.1%} of the rows that are read", f"each {entry['times']:.2f} times a pass"
        say(f"prepare.{task}: {entry['source']}: {share} ({entry['rows']:,} rows, {entry['tokens']:,} tokens; {times})")
