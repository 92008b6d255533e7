"""Read the sources of `prepare`, file by file; what is dropped is printed, listed and counted in the data card."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.config.sections import Prepare, Source
from posttrain.config.sources import data_files
from posttrain.data import hub, texts
from posttrain.data.dropped import REPEAT, entry, repeated
from posttrain.data.rows import card, note_examples, read_file, read_rows
from posttrain.data.source import Report
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say


def read_source(
    section: Prepare, source: Source, task: str, cards: list, dropped: list, fetched: list[Path]
) -> list[dict]:
    """The canonical rows of a source without repeats. What is dropped is printed, listed and counted in the data card.

    `fetched`: manifests of `fetch`, one of which lists the data set. Raises UserError where no row can be used.
    """
    rows: list[dict] = []
    counts, warnings, total, sentences = Counter[str](), Counter[str](), 0, list[str]()
    for report in reports(section, source, task, fetched):
        for row in report.rows if source.use == "test" else ():
            note_examples(report, row)
        for sentence in report.describe():
            say(sentence)
        sentences += report.describe()
        rows += report.rows
        total += report.total
        counts.update({reason: len(cases) for reason, cases in report.dropped.items()})
        warnings.update({reason: len(cases) for reason, cases in report.warnings.items()})
        dropped += [
            entry(f"{report.name}:{line}", task, reason, message)
            for reason, cases in report.dropped.items()
            for line, message in cases
        ]
    distinct, repeats = texts.deduplicate(rows)
    counts[REPEAT] = len(repeats)
    cards.append(card(name_of(source), task, counts, dict(warnings), total, len(distinct)))
    dropped += repeated(repeats, task)
    if not rows:
        raise UserError(f"{name_of(source)}: no row of {total} can be used", *sentences[:5])
    for row in distinct if source.separator else ():
        for key in ("completion", "chosen", "rejected"):
            if isinstance(row.get(key), str):
                row[key] = source.separator + row[key]
    return distinct


def name_of(source: Source) -> str:
    """A source as messages and the data card name it."""
    if source.files:
        return f"{source.dataset}/{' '.join(source.files)}"
    return source.path or "/".join(filter(None, (source.dataset, source.subset, source.rows)))


def reports(section: Prepare, source: Source, task: str, fetched: list[Path]) -> Iterator[Report]:
    """What was read from each file of a source, or from a data set as a whole."""
    options: dict[str, Any] = {
        "group_key": section.group_key,
        "allow_empty_user": section.allow_empty_user,
        "source": source,
    }
    limit = int(section.max_line_mb * 2**20)
    if source.path:
        for file in data_files(source.path, task):
            yield read_file(str(file), task, source.format, max_line_bytes=limit, **options)
    elif source.files:
        for name, file in hub.dataset_files(source, fetched).items():
            named = f"{source.dataset}/{name}"  # not by its place in the cache, which differs between machines
            yield read_file(file, task, source.format, max_line_bytes=limit, name=named, **options)
    else:
        yield read_rows(hub.dataset_rows(source, fetched), name_of(source), task, source.format, **options)
