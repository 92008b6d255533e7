"""Bring the rows of a source into a known form: columns by other names, texts from a template, a system prompt."""

import contextlib
import json
import string
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from posttrain.config.sections import Source
from posttrain.data import lines
from posttrain.data.judged import MARGIN, SCORES, SIDES
from posttrain.data.lines import RowError, json_kind

_CONVERSATION = {"messages", "conversations", "conversation", "system", "tools"}
_PAIR = {"prompt", "chosen", "rejected", "answer", "tools", *(name.format(side) for name in SCORES for side in SIDES)}
_RATED = {"completion", "score", "completions", "scores", "ratings", "ranks", "best"}
# Kind of data -> the keys that its rows are read by, beside id and group.
KEYS: dict[str, set[str]] = {
    "text": {"text"},
    "long": {"text"},
    "sft": {"instruction", "input", "output", "completion", "transcript", "text", "label", *_CONVERSATION, *_PAIR},
    "preference": {MARGIN, *_PAIR, *_RATED},
    "kto": {"label", *_PAIR, *_RATED},
    "choices": {"question", "choices", "answer"},
    "answers": {"question", "answer"},
}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
LISTS = ("messages", "conversations", "completions", "scores", "ratings", "ranks", "choices")
# Keys that a row may lack, whatever `columns` says.
OPTIONAL = {"id", "group", "system", "tools", "input", "answer", MARGIN}
ABSENT = object()
Columns = dict[str, str | list[str]]


def stream(numbered: Iterable[tuple], source: Source, of_text: bool = False) -> Iterator[tuple]:
    """The numbered rows of a file in the source's shape; a RowError in the place of one that cannot be used.

    of_text: every cell of the file is text (CSV).
    """
    for line, value, marked in numbered:
        try:
            value = shaped(lines.checked(value), source, of_text)
        except RowError as error:
            value = error
        yield line, value, marked


def shaped(row: dict, source: Source, of_text: bool) -> dict:
    """A row with the keys that `columns` and `template` name, and the source's `threshold` for its scores.

    Raises RowError where a column is missing, and for a row with images, video or sound.
    """
    refuse_media(row)
    row = renamed(row, source.columns) if source.columns else row
    row = filled(row, source.template) if source.template else row
    row = typed(row) if of_text else row
    has_scores = "score" in row or "completions" in row
    return row | {"threshold": source.threshold} if source.threshold is not None and has_scores else row


def typed(row: dict) -> dict:
    """A row of text alone with its label as true or false, and with its lists, which are written as JSON. Raises
    RowError for what a list must not hold."""
    values: dict[str, Any] = {}
    for key in LISTS:
        with contextlib.suppress(json.JSONDecodeError):
            if str(row.get(key, "")).startswith("["):
                values[key] = lines.parsed(row[key])
    if isinstance(label := row.get("label"), str):
        values["label"] = {"true": True, "false": False}.get(label.strip().lower(), label)
    return row | lines.checked(values)


def refuse_media(row: dict) -> None:
    """Raise RowError for a row with a key for images, video or sound that holds something."""
    for key in MEDIA:
        if row.get(key) not in (None, "", [], {}):
            raise RowError("media", f"{key} is not empty: rows with images, video or sound are not trained on")


def renamed(row: dict, columns: Columns) -> dict:
    """The row with the value of each column under its new key, and without those columns. Raises RowError."""
    values: dict[str, Any] = {}
    for key, column in named(columns):
        value = value_at(row, column)
        if value is ABSENT and key not in OPTIONAL:
            raise RowError("missing_field", f"missing column {column} (columns.{key}); {near(column, row)}")
        if value is not ABSENT:
            values[key] = [*values.get(key, []), value] if isinstance(columns[key], list) else value
    taken = {top(row, column) for _, column in named(columns)}
    return {key: value for key, value in row.items() if key not in taken} | values


def named(columns: Columns) -> list[tuple[str, str]]:
    """(key, column), for a key with a list of columns each of them."""
    listed = {key: column if isinstance(column, list) else [column] for key, column in columns.items()}
    return [(key, column) for key, several in listed.items() for column in several]


def filled(row: dict, template: dict[str, str]) -> dict:
    """The row with the texts of a template, and without the columns that it names. Raises RowError."""
    texts = {key: "".join(literal + inserted(row, name, key) for literal, name in pieces(text))
             for key, text in template.items()}  # fmt: skip
    taken = {top(row, name) for text in template.values() for name in placeholders(text)}
    return {key: value for key, value in row.items() if key not in taken or key in ("id", "group")} | texts


def inserted(row: dict, name: str, key: str) -> str:
    """The text that stands for a placeholder, as it is in the row; "" for none. Raises RowError."""
    if not name:
        return ""
    value = value_at(row, name)
    if value is ABSENT or value is None:
        raise RowError("missing_field", f"missing column {name} (template.{key}); {near(name, row)}")
    if isinstance(value, bool):
        return str(value).lower()  # as in JSON
    if not isinstance(value, str | int | float):
        raise RowError("not_a_string", f"{name} (template.{key}) must be text or a number, found {json_kind(value)}")
    return str(value)


def pieces(text: str) -> list[tuple[str, str]]:
    """A template's parts: (text, the name of the placeholder after it or ""). `{{` and `}}` are braces.

    Raises ValueError for a brace that stands alone and for a placeholder without a name or with more than a name.
    """
    parts = []
    for literal, name, form, conversion in string.Formatter().parse(text):
        if name is not None and (not name.strip() or form or conversion):
            raise ValueError("a placeholder is the name of a column in braces, and braces of the text are doubled")
        parts.append((literal, name or ""))
    return parts


def placeholders(text: str) -> list[str]:
    """The columns that a template names."""
    return [name for _, name in pieces(text) if name]


def value_at(row: dict, column: str):
    """The value of a column, or below it by a dotted path (`answers.text.0`); ABSENT where there is none."""
    if column in row:
        return row[column]
    value: object = row
    for part in column.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return ABSENT
    return value


def top(row: dict, column: str) -> str:
    """The key of a row that holds a column."""
    return column if column in row else column.partition(".")[0]


def near(column: str, row: dict) -> str:
    """A hint at the nearest key of a row, or at all of them."""
    nearest = get_close_matches(column, [key for key in row if isinstance(key, str)], 1, 0.75)
    return f"hint: did you mean {nearest[0]!r}" if nearest else f"keys found: {', '.join(map(str, row)) or 'none'}"


def with_system(content: dict, system: str | None) -> dict:
    """The content of a row whose conversation begins with a system turn, by default with the source's.

    Raises RowError for plain text, which has no turns.
    """
    key = "messages" if "messages" in content else "prompt"
    if system is None or (isinstance(content.get(key), list) and content[key][0]["role"] == "system"):
        return content
    if not isinstance(content.get(key), list):
        raise RowError("plain_text", "the row is plain text, which has no system turn; `template` can begin its prompt")
    return content | {key: [{"role": "system", "content": system}, *content[key]]}
