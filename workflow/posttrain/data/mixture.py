"""How often the rows of a mixture are read: sources with a `weight`, as shares of the training rows or their tokens."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from posttrain.config.sections import Prepare, Source
from posttrain.data.reading import name_of, named_files
from posttrain.ground.files import write_json
from posttrain.ground.progress import say

WORLD = "the built-in world"


def shares(
    section: Prepare, task: str, fetched: list[Path], places: Iterable[str], lengths: Iterable[int]
) -> list[dict]:
    """For each source, in the order of the rows: number of `rows` and `tokens`, `share` of all rows that are read, and
    `times` that each row is read while as many rows are read as there are.

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
    per_row = [weights[entry["source"]] for entry in entries]
    if section.weigh_by == "tokens":
        per_row = [weight * entry["rows"] / entry["tokens"] for weight, entry in zip(per_row, entries, strict=True)]
    total = sum(entry["rows"] for entry in entries)
    for entry, weight in zip(entries, per_row, strict=True):
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


def write(folder: Path, task: str, entries: list[dict]) -> None:
    """Write the shares of a task's rows beside them, for `training.order.parts_of`."""
    write_json(folder / task / "mixture.json", entries)
