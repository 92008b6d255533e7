"""Check rows: each that is valid becomes a canonical row, every other is dropped and counted.

Canonical rows hold "id", "group", "source" (file:line) and, by task,
    text        text
    sft         messages, or prompt and completion
    preference  prompt, chosen, rejected: all strings or all lists of messages; margin, where answers were rated
    kto         prompt, completion: both strings or both lists of messages; label
    eval        question, choices and the answer's index
    generation  question, answer; solution, where the answer is its end
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from posttrain.config.sections import DOCUMENTS, Source
from posttrain.config.sources import without_packing
from posttrain.data import consistency, files, lines, stored, texts, turns
from posttrain.data.judged import MARGIN, margin
from posttrain.data.layouts import FORMATS, choose, guess
from posttrain.data.lines import RowError, json_kind
from posttrain.data.rankings import joined
from posttrain.data.shape import stream, with_system
from posttrain.data.source import Report, Row
from posttrain.data.transcripts import form_of
from posttrain.ground.workers import in_order
from posttrain.models import tokens

MAX_ROW_CHARACTERS = 1_000_000
PLAIN = Source()  # rows that need no other shape
Check = Callable[[Report, Iterable[tuple]], Iterator[dict]]  # `_valid`


def card(name: str, task: str, dropped: dict, warnings: dict | None = None, total: int = 0, kept: int = 0) -> dict:
    """One entry of the data card; counts of zero are left out."""
    return {
        "name": name,
        "task": task,
        "total": total,
        "kept": kept,
        "dropped": {reason: count for reason, count in dropped.items() if count},
        "warnings": warnings or {},
    }


def read_file(
    path,
    task: str,
    format: str = "auto",
    max_line_bytes: int = lines.MAX_LINE_BYTES,
    name: str = "",
    source: Source = PLAIN,
    **options,
) -> Report:
    """Read a local file; `options` are those of _check_rows.

    name: of the file in rows, by default its path. source: says how rows are shaped.
    Raises UserError, naming file:line, where the file as a whole cannot be used.
    """
    of_text = without_packing(path).lower().endswith((".csv", ".tsv"))
    numbered = stream(files.read(path, task, max_line_bytes), source, of_text)
    return _check_rows(numbered, name or str(path), task, format, source=source, **options)


def read_rows(
    objects: Iterable[dict], name: str, task: str, format: str = "auto", source: Source = PLAIN, **options
) -> Report:
    """Read rows of a Hugging Face data set, numbered from 1; `options` are those of _check_rows."""
    numbered = ((number, row, False) for number, row in enumerate(objects, 1))
    return _check_rows(stream(numbered, source), name, task, format, source=source, **options)


def _check_rows(
    numbered: Iterator[tuple],
    name: str,
    task: str,
    format: str,
    group_key: str = "group",
    allow_empty_user: bool = False,
    source: Source = PLAIN,
    scratch: Path | None = None,
    most: int | None = None,
    processes: int = 1,
) -> Report:
    """Check rows: (line, row or RowError, whether a BOM was stripped). group_key: the key of a row's group. source: its
    system turn and separator are put in. scratch: folder for stored rows. most: valid rows after which reading ends.
    processes: that check rows, where all are read.

    Raises UserError for an unknown task or format, for an id of two different rows, and for a group key that no row
    has.
    """
    head = list(islice(numbered, 100))
    objects = [value for _, value, _ in head if isinstance(value, dict)]
    report = Report(name, task, choose(objects, task, format))
    numbered = chain(head, numbered)
    if report.format == "score" and task == "preference":
        numbered = joined(numbered)
    check = functools.partial(_valid, group_key=group_key, allow_empty_user=allow_empty_user, source=source)
    counted = stored.counted(numbered, name)
    if most is None:
        report.rows = stored.write(_records(report, counted, check, processes), scratch)
    else:
        report.rows = stored.store(islice(check(report, counted), most), scratch)
    consistency.refuse_no_group(report, group_key, objects)
    consistency.refuse_clashes(report)
    consistency.warn(report)
    return report


def _records(report: Report, numbered: Iterable[tuple], check: Check, processes: int) -> Iterator:
    """The records of the valid lines, see `stored.write`; the others are noted in the report, in the order of lines."""
    batches = stored.batches(numbered, stored.BATCH)
    for part, record in in_order(functools.partial(_record, report.blank(), check), batches, processes):
        report.add(part)
        yield record


def _record(blank: Report, check: Check, numbered: list[tuple]) -> tuple:
    """(a report on some lines, the record of the valid ones)."""
    part = blank.blank()
    return part, stored.record(check(part, numbered))


def _valid(
    report: Report, numbered: Iterable[tuple], group_key: str, allow_empty_user: bool, source: Source
) -> Iterator[dict]:
    """The canonical rows of the valid lines, with the source's separator before each reply; the others are noted in the
    report."""
    for line, value, marked in numbered:
        report.total += getattr(value, "count", 1)
        if marked:
            report.warn("byte_order_mark", line, "byte order mark stripped")
        try:
            if isinstance(value, RowError):
                raise value
            row = Row(value)
            contents = _contents(row, report.task, report.format, allow_empty_user)
            contents = [with_system(content, source.system) for content in contents]
            names = _names(row, contents[0], report.name, line, group_key)
            for content in contents:
                _check_size(content, report.task)
        except RowError as error:
            report.drop(error.reason, line, str(error))
            continue
        for key in row.unread():
            report.unread.setdefault(key, line)
        for number, content in enumerate(contents, 1):
            own = {"id": f"{names['id']}#{number}"} if len(contents) > 1 else {}
            yield names | own | _noted(report, line, content, source.separator)


def _noted(report: Report, line: int, content: dict, separator: str) -> dict:
    """The content of a row with the separator before each reply, after a note of what is odd in it."""
    for kind in texts.odd(texts.all_text(content)):
        report.warn(kind, line, texts.ODD_MEANING[kind])
    if "chosen" in content:
        chosen, rejected = map(len, texts.reply_texts(content))
        report.longer[chosen > rejected] += 1
    replies = [key for key in ("completion", "chosen", "rejected") if isinstance(content.get(key), str)]
    return content | {key: separator + content[key] for key in replies}


def _contents(row: dict, task: str, format: str, allow_empty_user: bool = False) -> list[dict]:
    """The row's content in canonical form, several where it holds several. Raises RowError, naming the first defect and
    its place.

    The expected answer to a prompt (`answer`, text or a number) is kept for rewards, and a conversation's tools.
    A row that is labelled as unwanted (for `kto`) is an error: SFT would imitate it.
    """
    if task == "sft" and row.get("label") is False:
        raise RowError("label_false", "label is false: an unwanted reply, which sft would imitate; kto reads it")
    try:
        held = FORMATS[task][format](row, allow_empty_user)
    except RowError as error:
        other = guess(row, task)
        if error.reason in ("missing_field", "not_a_transcript") and other not in (None, format):
            hint = f"hint: this row looks like {other}, not {format}"
            raise RowError(error.reason, f"{error}; {hint}") from None
        if task == "sft" and isinstance(row.get("text"), str) and not form_of(row["text"]):
            raise RowError(error.reason, f"{error}; hint: `format: text` trains on whole texts") from None
        raise
    contents = held if isinstance(held, list) else [held]
    return [content | _more(row, content, task) for content in contents]


def _more(row: dict, content: dict, task: str) -> dict:
    """The row's answer, tools and margin, where its content may have them."""
    more: dict = {}
    if task == "preference" and MARGIN not in content and (rated := margin(row)) is not None:
        more[MARGIN] = rated
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(answer, str) and "####" in answer and answer == content.get("completion"):
        answer = answer.rpartition("####")[2].strip()  # the reply as a whole is no answer to compare with (GSM8K)
    if task in ("sft", "preference") and isinstance(answer, str) and answer:
        more["answer"] = answer
    if ("messages" in content or isinstance(content.get("prompt"), list)) and (tools := turns.tools_of(row)):
        more["tools"] = tools
    return more


def _names(row: dict, content: dict, name: str, line: int, group_key: str) -> dict:
    """The row's id, group and source. Without a group of their own, rows with equal prompts share one.

    Raises RowError where id or group is neither a string nor an integer.
    """
    id, group = _label(row, "id"), _label(row, group_key)
    if group is None:
        prompt = tokens.prompt_text(content) or texts.full_text(content)
        group = f"prompt:{texts.digest(texts.words(prompt) or prompt)}"
    return {"id": f"{_stem(name)}-{line}" if id is None else id, "group": group, "source": f"{name}:{line}"}


@functools.lru_cache(maxsize=16)
def _stem(name: str) -> str:
    """The name of a file without its folder and its endings."""
    return Path(without_packing(name)).name.rsplit(".", 1)[0]


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
    if task not in DOCUMENTS and size > MAX_ROW_CHARACTERS:
        raise RowError("too_long", f"row is over the max length: {size:,} characters, allowed {MAX_ROW_CHARACTERS:,}")
