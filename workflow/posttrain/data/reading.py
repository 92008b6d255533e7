"""Read the sources of `prepare`, file by file; what is dropped is printed, listed and counted in the data card."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.config.sections import Prepare, Source
from posttrain.config.sources import data_files
from posttrain.data import hub
from posttrain.data.consistency import warn_examples
from posttrain.data.dropped import REPEAT, Dropped, entry, repeated
from posttrain.data.repeats import without_repeats
from posttrain.data.rows import card, read_file, read_rows
from posttrain.data.source import Report
from posttrain.data.stored import Rows, join
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say


def read_source(
    section: Prepare,
    source: Source,
    task: str,
    cards: list,
    dropped: Dropped,
    fetched: list[Path],
    scratch: Path | None = None,
) -> Rows:
    """The canonical rows of a source without repeats. What is dropped is printed, listed and counted in the data card.

    `fetched`: manifests of `fetch`, one of which lists the data set. scratch: folder for stored rows. Raises UserError
    where no row can be used.
    """
    rows: list[Rows] = []
    counts, warnings, total, sentences = Counter[str](), Counter[str](), 0, list[str]()
    for report in reports(section, source, task, fetched, scratch):
        for row in report.rows if source.use == "test" else ():
            warn_examples(report, row)
        for sentence in report.describe():
            say(sentence)
        sentences += report.describe()
        rows.append(report.rows)
        total += report.total
        counts.update({reason: len(cases) for reason, cases in report.dropped.items()})
        warnings.update(report.warned)
        dropped.add(
            entry(f"{report.name}:{line}", task, reason, message)
            for reason, cases in report.dropped.items()
            for line, message in cases
        )
    kept = join(rows)
    distinct, again = without_repeats(kept)
    counts[REPEAT] = len(kept) - len(distinct)
    dropped.add(repeated(again, task))
    cards.append(card(name_of(source), task, counts, dict(warnings), total, len(distinct)))
    if not kept:
        raise UserError(f"{name_of(source)}: no row of {total} can be used", *sentences[:5])
    return distinct


def name_of(source: Source) -> str:
    """A source as messages and the data card name it."""
    if source.files:
        return f"{source.dataset}/{' '.join(source.files)}"
    return source.path or "/".join(filter(None, (source.dataset, source.subset, source.rows)))


def reports(section: Prepare, source: Source, task: str, fetched: list[Path], scratch: Path | None) -> Iterator[Report]:
    """What was read from each file of a source, or from a data set as a whole."""
    options: dict[str, Any] = {
        "group_key": section.group_key,
        "allow_empty_user": section.allow_empty_user,
        "source": source,
        "scratch": scratch,
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
