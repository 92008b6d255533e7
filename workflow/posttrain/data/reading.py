"""Read the sources of `prepare`, file by file; what is dropped is printed, listed and counted in the data card."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

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

UNKNOWN = "unknown"
READ_AS = {  # (task, layout) -> what becomes of rows that were written for something else
    ("sft", "preference"): "the chosen answers of pairs",
    ("sft", "text"): "whole texts",
    ("kto", "preference"): "both answers of pairs",
    ("kto", "ranking"): "ranked lists, labelled by their scores",
    ("kto", "score"): "answers, labelled by their scores",
    ("preference", "ranking"): "all pairs of ranked lists",
    ("preference", "score"): "all pairs of answers with scores",
}


def read_source(
    section: Prepare,
    source: Source,
    task: str,
    cards: list,
    dropped: Dropped,
    fetched: list[Path],
    scratch: Path | None = None,
    processes: int = 1,
) -> Rows:
    """The canonical rows of a source without repeats. What is dropped is printed, listed and counted in the data card.

    `fetched`: manifests of `fetch`, one of which lists the data set. scratch: folder for stored rows. Raises UserError
    where no row can be used.
    """
    rows: list[Rows] = []
    counts, warnings, layouts = Counter[str](), Counter[str](), set[str]()
    total, sentences = 0, list[str]()
    for report in reports(section, source, task, fetched, scratch, processes):
        for row in report.rows if source.use == "test" else ():
            warn_examples(report, row)
        for sentence in (lines := report.describe()):
            say(sentence)
        sentences += lines
        rows.append(report.rows)
        total += report.total
        counts.update({reason: len(cases) for reason, cases in report.dropped.items()})
        warnings.update(report.warned)
        dropped.add(entries(report))
        layouts.add(report.format)
    kept = join(rows)
    distinct, again = without_repeats(kept)
    counts[REPEAT] = len(kept) - len(distinct)
    dropped.add(repeated(again, task))
    whole, distinct = len(distinct), sampled(source, distinct, section.seed)
    if whole > len(distinct):
        warnings["not chosen by sample"] = whole - len(distinct)
    cards.append(card(name_of(source), task, counts, dict(warnings), total, len(distinct)) | described(source))
    if not kept:
        raise UserError(f"{name_of(source)}: no row of {total} can be used", *sentences[:5])
    say(f"{name_of(source)}: {len(distinct):,} rows of {task}, {read_as(task, layouts)}")
    return distinct


def read_as(task: str, layouts: set[str]) -> str:
    """What the rows of a source were read as."""
    return " and ".join(READ_AS.get((task, layout), layout) for layout in sorted(layouts))


def entries(report: Report) -> Iterator[dict]:
    """Lines for the list of dropped rows."""
    for reason, cases in report.dropped.items():
        for line, message in cases:
            yield entry(f"{report.name}:{line}", report.task, reason, message)


def described(source: Source) -> dict[str, str]:
    """Licence, origin and languages of a source, as the config gives them; what it does not give is "unknown"."""
    origin = source.origin or (f"{source.dataset} at {source.revision}" if source.dataset else None)
    languages = ", ".join(source.languages or [])
    return {"licence": source.licence or UNKNOWN, "origin": origin or UNKNOWN, "languages": languages or UNKNOWN}


def sampled(source: Source, rows: Rows, seed: int) -> Rows:
    """`max_rows` of the rows, at random, in their order; all of them where the source says no such thing."""
    if source.sample is None or source.max_rows is None or source.max_rows >= len(rows):
        return rows
    return rows.take(np.sort(np.random.default_rng(seed).choice(len(rows), source.max_rows, replace=False)))


def name_of(source: Source) -> str:
    """A source as messages and the data card name it."""
    if source.files:
        return f"{source.dataset}/{' '.join(source.files)}"
    return source.path or "/".join(filter(None, (source.dataset, source.subset, source.rows)))


def reports(
    section: Prepare, source: Source, task: str, fetched: list[Path], scratch: Path | None, processes: int
) -> Iterator[Report]:
    """What was read from each file of a source, or from a data set as a whole.

    processes: that check the rows of a file; those of a data set may hold what is not sent between processes.
    """
    options: dict[str, Any] = {
        "group_key": section.group_key,
        "allow_empty_user": section.allow_empty_user,
        "source": source,
        "scratch": scratch,
    }
    limit, most = int(section.max_line_mb * 2**20), None if source.sample else source.max_rows
    if source.dataset and not source.files:
        rows = hub.dataset_rows(source, fetched)
        yield read_rows(rows, name_of(source), task, source.format, most=most, **options)
        return
    for name, file in named_files(source, task, fetched).items():
        report = read_file(file, task, source.format, limit, name, most=most, processes=processes, **options)
        yield report
        if most is not None and (most := most - report.kept) == 0:
            return


def named_files(source: Source, task: str, fetched: list[Path]) -> dict[str, Path]:
    """The files of a source by name; those of a data set not by their place in the cache, which machines differ in."""
    if source.path:
        return {str(file): file for file in data_files(source.path, task)}
    return {f"{source.dataset}/{name}": file for name, file in hub.dataset_files(source, fetched).items()}
