"""Turn each valid line of a source into a canonical row, and report why each other line was dropped.

Canonical rows hold "id", "group", "source" (file:line) and, by task,
    text        text
    sft         messages, or prompt and completion
    preference  prompt, chosen, rejected: all strings or all lists of messages
    kto         prompt, completion: both strings or both lists of messages; label
    eval        question, choices and the answer's index
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path

from posttrain.data import formats, lines, texts
from posttrain.data.fields import json_kind
from posttrain.data.lines import RowError
from posttrain.ground.errors import UserError

MAX_ROW_CHARACTERS = 1_000_000
DERIVED = re.compile(r"prompt:[0-9a-f]{32}")  # the group of a row that declares none


@dataclass
class Report:
    """The rows of a source, and its dropped lines and warnings by reason: (line, message)."""

    name: str
    task: str
    format: str
    rows: list[dict] = field(default_factory=list)
    total: int = 0
    dropped: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    warnings: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        return len(self.rows)

    def describe(self, limit: int = 5) -> list[str]:
        """Messages to print, at most `limit` for each reason; line 0 is the file as a whole."""
        sentences = []
        for verb, cases_by_reason in (("dropped", self.dropped), ("warning", self.warnings)):
            for reason, cases in cases_by_reason.items():
                sentences += [f"{self.name}{f':{n}' if n else ''}: {verb}: {text}" for n, text in cases[:limit]]
                if len(cases) > limit:
                    sentences.append(f"{self.name}: {verb}: {reason}: {len(cases) - limit} more lines")
        return sentences


def read_file(
    path, task: str, format: str = "auto", *, max_line_bytes: int = lines.MAX_LINE_BYTES, **options
) -> Report:
    """Read a local .jsonl, .ndjson or .txt file, also with .gz; `options` are those of _check_rows.

    Raises UserError, naming file:line, where the file as a whole cannot be used.
    """
    if not lines.is_text(path):
        numbered = lines.read_objects(path, max_line_bytes)
    elif task in ("text", "long"):
        numbered = lines.read_paragraphs(path, max_line_bytes)
    else:
        raise UserError(f"{path}: plain text is read for text and long only; for {task} allowed: .jsonl")
    return _check_rows(numbered, str(path), task, format, **options)


def read_rows(objects: Iterable[dict], source_name: str, task: str, format: str = "auto", **options) -> Report:
    """Read rows of a Hugging Face data set, numbered from 1; `options` are those of _check_rows."""
    numbered = ((number, row, False) for number, row in enumerate(objects, 1))
    return _check_rows(numbered, source_name, task, format, **options)


def _check_rows(
    numbered: Iterator[tuple[int, object, bool]],
    name: str,
    task: str,
    format: str,
    *,
    group_key: str = "group",
    allow_empty_user: bool = False,
) -> Report:
    """Check rows: (line, object, whether a BOM was stripped). group_key: the key of a row's group.

    Raises UserError for an unknown task or format, for an id of two different rows, and for a group key that no row
    has.
    """
    head = list(islice(numbered, 100))
    objects = [value for _, value, _ in head if isinstance(value, dict)]
    report = Report(name, task, formats.choose(objects, task, format))
    for line, value, marked in chain(head, numbered):
        report.total += 1
        if marked:
            _note(report.warnings, "byte_order_mark", line, "byte order mark stripped")
        try:
            row = _checked(value)
            content = formats.check_row(row, task, report.format, allow_empty_user)
            names = _names(row, content, name, line, group_key)
            _check_size(content, task)
        except RowError as error:
            _note(report.dropped, error.reason, line, str(error))
        else:
            report.rows.append(names | content)
            for kind in texts.odd(texts.all_text(content)):
                _note(report.warnings, kind, line, texts.ODD_MEANING[kind])
    _check_groups(report, group_key, objects)
    _check_ids(report)
    _warn_whole(report)
    return report


def _note(cases_by_reason: dict, reason: str, line: int, message: str) -> None:
    cases_by_reason.setdefault(reason, []).append((line, message))


def _checked(value) -> dict:
    """The value, an object with valid Unicode in every string and finite numbers only.

    All fields are checked, unknown ones too. Raises RowError.
    """
    if isinstance(value, RowError):
        raise value
    if not isinstance(value, dict):
        raise RowError("not_an_object", f"a row must be an object, found {json_kind(value)}")
    pending = [("", value)]
    while pending:  # a loop, not recursion: a deeply nested row must not overflow the stack
        path, item = pending.pop()
        if isinstance(item, dict):
            pending += [(f"{path}.{key}" if path else str(key), part) for key, part in item.items()]
            pending += [(f"{path or 'row'} (a key)", key) for key in item if not str(key).isascii()]
        elif isinstance(item, list):
            pending += [(f"{path}[{i}]", part) for i, part in enumerate(item)]
        elif isinstance(item, str) and not item.isascii():
            _check_unicode(path, item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise RowError("not_finite", f"non-finite number in field {path} (NaN, Infinity or too large)")
    return value


def _check_unicode(path: str, text: str) -> None:
    """Raise RowError for half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        message = f"field {ascii(path)[1:-1]} is not valid Unicode (cannot be written as UTF-8)"
        raise RowError("not_unicode", message) from None


def _names(row: dict, content: dict, name: str, line: int, group_key: str) -> dict:
    """The row's id, group and source. Without a group of their own, rows with equal prompts share one.

    Raises RowError where id or group is neither a string nor an integer.
    """
    id, group = _label(row, "id"), _label(row, group_key)
    if group is None:
        prompt = texts.prompt_text(content)
        group = f"prompt:{texts.digest(texts.words(prompt) or prompt)}"
    stem = Path(name).name.removesuffix(".gz").rsplit(".", 1)[0]
    return {"id": f"{stem}-{line}" if id is None else id, "group": group, "source": f"{name}:{line}"}


def _label(row: dict, key: str) -> str | None:
    """An id or group as a string; None where it is absent, null or empty. Raises RowError for other types."""
    value = row.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError("bad_name", f"{key} must be a string or an integer, found {json_kind(value)}")
    return str(value)


def _check_size(content: dict, task: str) -> None:
    """Raise RowError for a row too long for any context; plain text is exempt, as it is cut into blocks."""
    size = len(texts.full_text(content))
    if task not in ("text", "long") and size > MAX_ROW_CHARACTERS:
        allowed = f"{MAX_ROW_CHARACTERS:,}"
        raise RowError("too_long", f"row is over the max length: {size:,} characters, allowed {allowed}")


def _check_groups(report: Report, group_key: str, objects: list[dict]) -> None:
    """Raise UserError where no row has the configured group key: a typo would undo the split by group."""
    if group_key != "group" and report.rows and all(DERIVED.fullmatch(row["group"]) for row in report.rows):
        near = _nearest(group_key, objects)
        raise UserError(f"{report.name}: no row has the group key {group_key!r}{near}")


def _check_ids(report: Report) -> None:
    """Raise UserError where different rows have one id; equal rows are removed by deduplication."""
    first: dict[str, dict] = {}
    clashes = []
    for row in report.rows:
        earlier = first.setdefault(row["id"], row)
        if earlier is not row and texts.content(earlier) != texts.content(row):
            line, first_line = _line(row), _line(earlier)
            what = f"id {row['id']} on lines {first_line} and {line} names different rows"
            clashes.append(f"{report.name}:{line}: {what}")
    if clashes:
        more = len(clashes) - lines.MAX_PROBLEMS
        raise UserError(*clashes[: lines.MAX_PROBLEMS], *[f"{report.name}: {more} more"] * (more > 0))


def _warn_whole(report: Report) -> None:
    """Warn of near-duplicates, of length bias and of too few rows to split."""
    for row, earlier in texts.near_duplicates(report.rows):
        _note(report.warnings, "near_duplicate", _line(row), f"near-duplicate of line {_line(earlier)}")
    longer, pairs = texts.chosen_longer(report.rows)
    if pairs >= 10 and max(longer, pairs - longer) >= 0.8 * pairs:
        _note(report.warnings, "length_bias", 0, f"chosen longer in {longer}/{pairs} rows")
    if report.kept == 1:
        _note(report.warnings, "too_few_rows", 0, "a single row: too few rows for a train/test split")


def _line(row: dict) -> int:
    """The line number of a row in its source."""
    return int(row["source"].rsplit(":", 1)[1])


def _nearest(key: str, objects: list[dict]) -> str:
    """A hint at the nearest key that the rows have."""
    keys = sorted({name for row in objects for name in row if isinstance(name, str)})
    near = get_close_matches(key, keys, 1)
    return f"; hint: did you mean {near[0]!r}" if near else f"; keys found: {', '.join(keys[:20])}"
