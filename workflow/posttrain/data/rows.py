"""Check rows: each that is valid becomes a canonical row, every other is dropped and counted.

Canonical rows hold "id", "group", "source" (file:line) and, by task,
    text        text
    sft         messages, or prompt and completion
    preference  prompt, chosen, rejected: all strings or all lists of messages
    kto         prompt, completion: both strings or both lists of messages; label
    eval        question, choices and the answer's index
    generation  question, answer; solution, where the answer is its end
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from posttrain.config.sections import Source
from posttrain.config.sources import without_packing
from posttrain.data import consistency, files, formats, judged, lines, stored, texts, transcripts, turns
from posttrain.data.lines import RowError, json_kind
from posttrain.data.shape import shaped, with_system
from posttrain.data.source import Report, Row
from posttrain.ground.errors import UserError
from posttrain.models import tokens

MAX_ROW_CHARACTERS = 1_000_000
PLAIN = Source()  # rows that need no other shape
# Task -> its formats, each with the function that checks a row and returns its content in canonical form, or raises
# RowError. A row that fits several formats has the first of them.
FORMATS: dict[str, dict[str, Callable[[dict, bool], dict]]] = {
    "text": {"text": formats.text},
    "long": {"text": formats.text},
    "sft": {
        "messages": formats.messages,
        "sharegpt": formats.sharegpt,
        "instruction": formats.instruction,
        "prompt_completion": formats.prompt_completion,
        "transcript": transcripts.transcript,
        "preference": judged.chosen,
        "text": formats.whole_text,
    },
    "preference": {"transcript": judged.transcript_pair, "preference": judged.preference},
    "kto": {"kto": judged.kto},
    "eval": {"choices": judged.choices},
    "generation": {"answers": judged.answers},
}


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
    path, task: str, format: str = "auto", max_line_bytes: int = lines.MAX_LINE_BYTES, name: str = "", **options
) -> Report:
    """Read a local file; `options` are those of _check_rows. name: of the file in rows, by default its path.

    Raises UserError, naming file:line, where the file as a whole cannot be used.
    """
    of_text = without_packing(path).lower().endswith((".csv", ".tsv"))
    return _check_rows(
        files.read(path, task, max_line_bytes), name or str(path), task, format, of_text=of_text, **options
    )


def read_rows(objects: Iterable[dict], source_name: str, task: str, format: str = "auto", **options) -> Report:
    """Read rows of a Hugging Face data set, numbered from 1; `options` are those of _check_rows."""
    numbered = ((number, row, False) for number, row in enumerate(objects, 1))
    return _check_rows(numbered, source_name, task, format, **options)


def _check_rows(
    numbered: Iterator[tuple],
    name: str,
    task: str,
    format: str,
    group_key: str = "group",
    allow_empty_user: bool = False,
    source: Source = PLAIN,
    of_text: bool = False,
    scratch: Path | None = None,
) -> Report:
    """Check rows: (line, object, whether a BOM was stripped). group_key: the key of a row's group. source: says how the
    rows are shaped, and how many are read at most. of_text: every cell of the file is text. scratch: folder for stored
    rows.

    Raises UserError for an unknown task or format, for an id of two different rows, and for a group key that no row
    has.
    """
    head = list(islice(numbered, 100))
    objects = [row for _, value, _ in head if (row := _shaped(value, source, of_text))]
    report = Report(name, task, _choose(objects, task, format))
    numbered = chain(head, numbered)
    report.rows = stored.store(_valid(report, numbered, group_key, allow_empty_user, source, of_text), scratch)
    consistency.refuse_no_group(report, group_key, objects)
    consistency.refuse_clashes(report)
    consistency.warn(report)
    return report


def _valid(
    report: Report, numbered: Iterable[tuple], group_key: str, allow_empty_user: bool, source: Source, of_text: bool
) -> Iterator[dict]:
    """The canonical rows of the valid lines, with the source's separator before each reply; the others are noted in the
    report."""
    for line, value, marked in numbered:
        report.total += 1
        if marked:
            report.warn("byte_order_mark", line, "byte order mark stripped")
        try:
            row = Row(shaped(lines.checked(value), source, of_text))
            content = with_system(_content(row, report.task, report.format, allow_empty_user), source.system)
            names = _names(row, content, report.name, line, group_key)
            _check_size(content, report.task)
        except RowError as error:
            report.drop(error.reason, line, str(error))
            continue
        for key in row.unread():
            report.unread.setdefault(key, line)
        for kind in texts.odd(texts.all_text(content)):
            report.warn(kind, line, texts.ODD_MEANING[kind])
        if "chosen" in content:
            chosen, rejected = map(len, texts.reply_texts(content))
            report.longer[chosen > rejected] += 1
        for key in ("completion", "chosen", "rejected") if source.separator else ():
            if isinstance(content.get(key), str):
                content[key] = source.separator + content[key]
        yield names | content


def _shaped(value, source: Source, of_text: bool) -> dict:
    """A row in its shape, empty where it has none."""
    try:
        return shaped(value, source, of_text) if isinstance(value, dict) else {}
    except RowError:
        return {}


def _choose(objects: list[dict], task: str, format: str) -> str:
    """The configured format; for "auto", the one that most of the objects (the file's first rows) have.

    Raises UserError for an unknown task and for a format that the task does not have.
    """
    if task not in FORMATS:
        raise UserError(f"task {task!r} is unknown; allowed: {', '.join(FORMATS)}")
    if format not in ("auto", *FORMATS[task]):
        allowed = ", ".join(("auto", *FORMATS[task]))
        raise UserError(f"format {format!r} is not read for task {task}; allowed: {allowed}")
    if format != "auto":
        return format
    guesses = Counter(filter(None, (_guess(row, task) for row in objects)))
    return guesses.most_common(1)[0][0] if guesses else "messages" if task == "sft" else list(FORMATS[task])[-1]


def _guess(row: dict, task: str) -> str | None:
    """The task's format that fits the row's keys, or None."""
    keys = {key for key, value in row.items() if value is not None}
    fits = {
        "text": "text" in keys and task != "sft",  # whole texts are trained on only where `format` says so
        "messages": "messages" in keys,
        "sharegpt": bool(keys & {"conversations", "conversation"}),
        "instruction": {"instruction", "output"} <= keys,
        "prompt_completion": {"prompt", "completion"} <= keys,
        "transcript": any(
            transcripts.form_of(row.get(key))
            for key in (("transcript", "text") if task == "sft" else ("chosen", "prompt"))
        ),
        "preference": {"chosen", "rejected"} <= keys,
        "kto": {"completion", "label"} <= keys,
        "choices": "choices" in keys,
        "answers": {"question", "answer"} <= keys,
    }
    return next((format for format in FORMATS[task] if fits[format]), None)


def _content(row: dict, task: str, format: str, allow_empty_user: bool = False) -> dict:
    """The row's content in canonical form. Raises RowError, naming the first defect and its place.

    The expected answer to a prompt (`answer`, a string) is kept for hand-written rewards, and a conversation's tools.
    A row that is labelled as unwanted (for `kto`) is an error: SFT would imitate it.
    """
    if task == "sft" and row.get("label") is False:
        raise RowError("label_false", "label is false: an unwanted reply, which sft would imitate; kto reads it")
    try:
        content = FORMATS[task][format](row, allow_empty_user)
    except RowError as error:
        other = _guess(row, task)
        if error.reason in ("missing_field", "not_a_transcript") and other not in (None, format):
            hint = f"hint: this row looks like {other}, not {format}"
            raise RowError(error.reason, f"{error}; {hint}") from None
        if task == "sft" and isinstance(row.get("text"), str):
            raise RowError(error.reason, f"{error}; hint: `format: text` trains on whole texts") from None
        raise
    answer = row.get("answer")
    if task in ("sft", "preference") and isinstance(answer, str) and answer not in ("", content.get("completion")):
        content["answer"] = answer
    if "messages" in content or isinstance(content.get("prompt"), list):
        content |= {"tools": tools} if (tools := turns.tools_of(row)) else {}
    return content


def _names(row: dict, content: dict, name: str, line: int, group_key: str) -> dict:
    """The row's id, group and source. Without a group of their own, rows with equal prompts share one.

    Raises RowError where id or group is neither a string nor an integer.
    """
    id, group = _label(row, "id"), _label(row, group_key)
    if group is None:
        prompt = tokens.prompt_text(content) or texts.full_text(content)
        group = f"prompt:{texts.digest(texts.words(prompt) or prompt)}"
    stem = Path(without_packing(name)).name.rsplit(".", 1)[0]
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
        raise RowError("too_long", f"row is over the max length: {size:,} characters, allowed {MAX_ROW_CHARACTERS:,}")
