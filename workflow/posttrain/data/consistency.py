"""Checks of the rows of a source as a whole: groups, ids, rows that repeat or contradict others."""

from difflib import get_close_matches

import numpy as np

from posttrain.data import lines, repeats, stored, texts
from posttrain.data.examples import has_examples
from posttrain.data.source import SHOWN, Report
from posttrain.ground.errors import UserError
from posttrain.models import tokens


def refuse_no_group(report: Report, group_key: str, objects: list[dict]) -> None:
    """Raise UserError where no row has the configured group key: a typo would undo the split by group."""
    if group_key != "group" and report.kept and all(map(texts.DERIVED.fullmatch, report.rows.column("group"))):
        near = _nearest(group_key, objects)
        raise UserError(f"{report.name}: no row has the group key {group_key!r}{near}")


def refuse_clashes(report: Report) -> None:
    """Raise UserError where different rows have one id; equal rows are removed by deduplication."""
    ids, exact = report.rows.numbers("id", "exact")
    first = stored.first_with(ids)
    clashes = np.flatnonzero(exact != exact[first])
    problems = []
    for row, earlier in repeats.pairs(report.rows, clashes[: lines.MAX_PROBLEMS], first):
        what = f"id {row['id']} on lines {_line(earlier)} and {_line(row)} names different rows"
        problems.append(f"{report.name}:{_line(row)}: {what}")
    if problems:
        more = len(clashes) - lines.MAX_PROBLEMS
        raise UserError(*problems, *[f"{report.name}: {more:,} more"] * (more > 0))


def warn(report: Report) -> None:
    """Warn of unread keys, near-duplicates, contradictions, length bias and too few rows to split."""
    if report.unread:
        named = ", ".join(f"{key!r} (first in line {line})" for key, line in sorted(report.unread.items()))
        report.warn("unread_keys", 0, f"keys that are not read: {named}")
    for row in report.rows if report.task in ("eval", "generation") else ():
        warn_examples(report, row)
    for reason, what, search in (
        ("contradiction", "contradicts line", repeats.contradictions),
        ("near_duplicate", "near-duplicate of line", repeats.near_duplicates),
    ):
        places, first = search(report.rows)
        for row, earlier in repeats.pairs(report.rows, places[:SHOWN], first):
            report.warn(reason, _line(row), f"{what} {_line(earlier)}")
        if len(places):
            report.warned[reason] = len(places)
    pairs = report.longer.total()
    if pairs >= 10 and max(report.longer.values()) >= 0.8 * pairs:
        report.warn("length_bias", 0, f"chosen longer in {report.longer[True]}/{pairs} rows")
    if report.kept == 1:
        report.warn("too_few_rows", 0, "a single row: too few rows for a train/test split")


def warn_examples(report: Report, row: dict) -> None:
    """Warn of a row for evaluation that holds worked examples."""
    if has_examples(tokens.prompt_text(row)):
        advice = "`evaluate.tasks[].shots` would add more; overlap is searched for without them"
        report.warn("few_shot", _line(row), f"worked examples before the question: {advice}")


def _line(row: dict) -> int:
    """The line number of a row in its source."""
    return int(row["source"].rsplit(":", 1)[1])


def _nearest(key: str, objects: list[dict]) -> str:
    """A hint at the nearest key that the rows have."""
    keys = sorted({name for row in objects for name in row if isinstance(name, str)})
    near = get_close_matches(key, keys, 1)
    return f"; hint: did you mean {near[0]!r}" if near else f"; keys found: {', '.join(keys[:20])}"
