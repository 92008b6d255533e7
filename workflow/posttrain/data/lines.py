"""Read a local file as numbered objects or paragraphs, in bounded memory; a file that is not text is an error."""

import gzip
import io
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from posttrain.ground.errors import UserError

PACKED = {".gz": ("gzip", b"\x1f\x8b"), ".zst": ("zstd", b"\x28\xb5\x2f\xfd")}  # with the first bytes of each
MAX_LINE_BYTES = 16 * 2**20
MAX_PROBLEMS = 20
BOM = "\ufeff"
# First bytes of files whose content does not match their name. Further checks recognise UTF-16 and JSON arrays.
MAGIC = {
    b"\x1f\x8b": "gzip data: name it .gz",
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2 data",
    b"\x28\xb5\x2f\xfd": "zstd data: name it .zst",
    b"\xfd7zXZ": "xz data",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF document",
    b"\x80\x02": "a pickle",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"\xff\xfe": "UTF-16 or UTF-32 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}


class RowError(Exception):
    """A row cannot be used. `reason` is a short key, by which such rows are counted; the message explains it."""

    def __init__(self, reason: str, message: str):
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return self.message


def json_kind(value) -> str:
    """The name of a value's type in JSON."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def read_lines(path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number, byte offset, line with its end) of a plain, gzip or zstd file; LF ends a line.

    Raises UserError where the file cannot be opened, is not text, is damaged, or has a line over the limit.
    """
    number = offset = 0
    try:
        with opened(path) as stream:
            check_head(path, stream.peek(4096)[:4096])
            while line := stream.readline(max_line_bytes + 1):
                number += 1
                if len(line) > max_line_bytes:
                    raise UserError(f"{path}:{number}: line over the size limit of {max_line_bytes:,} bytes")
                yield number, offset, line
                offset += len(line)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: cannot be read on, the file is damaged: {error}") from None


def read_objects(path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, object, bool]]:
    """Yield (line number, value or RowError, whether a byte order mark was stripped) for each line of JSON.

    Blank lines are skipped. Lines that are not JSON are reported together, after all lines were read.
    Raises UserError as read_lines does, for lines that are not UTF-8 or not JSON, and where there are no rows.
    """
    problems, empty = [], True
    for number, offset, data in read_lines(path, max_line_bytes):
        if not data.strip():
            continue
        try:
            text = without_end(data.decode("utf-8"))
            if empty and text.lstrip(BOM).lstrip().startswith("["):
                raise UserError(
                    f"{path}:{number}: top level is an array; hint: this is JSON, not JSON Lines "
                    "(one object on each line): name it .json"
                )
            yield number, parsed(text.removeprefix(BOM)), text.startswith(BOM)
        except UnicodeDecodeError as error:
            where = offset + error.start
            problems.append(f"{path}:{number}: not UTF-8 at line {number}, byte offset {where}")
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: invalid JSON at line {number}, {explain(error)}")
        empty = False
        if len(problems) == MAX_PROBLEMS:
            problems.append(f"{path}: reading stopped after {MAX_PROBLEMS} such lines")
            break
    if problems:
        raise UserError(*problems)
    if empty:
        raise UserError(f"{path}: file has no rows")


def read_paragraphs(path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, dict, bool]]:
    """Yield (number of its first line, {"text": paragraph}, whether a byte order mark was stripped) for each run of
    lines between blank ones.

    Raises UserError as read_lines does, for NUL bytes, for text that is not UTF-8, for a paragraph over the limit, and
    where there are no rows.
    """
    block: list[str] = []
    first, size, empty = 0, 0, True
    for number, line in chain(text_lines(path, max_line_bytes), [(0, "")]):
        line = without_end(line)
        if line.strip():
            first = first if block else number
            block.append(line)
            size += len(line)
        elif block:
            text = "\n".join(block)
            yield first, {"text": text.removeprefix(BOM)}, text.startswith(BOM)
            block, size, empty = [], 0, False
        if size > max_line_bytes:
            raise UserError(f"{path}:{first}: paragraph over the size limit of {max_line_bytes:,} characters")
    if empty:
        raise UserError(f"{path}: file has no rows")


def without_end(line: str) -> str:
    """The line without LF or CRLF."""
    return line.removesuffix("\n").removesuffix("\r")


def text_lines(path, max_line_bytes: int) -> Iterator[tuple[int, str]]:
    """Yield (line number, line with its end). Raises UserError for NUL bytes and for text that is not UTF-8."""
    for number, offset, data in read_lines(path, max_line_bytes):
        if b"\0" in data:
            raise UserError(f"{path}:{number}: not text (NUL bytes)")
        try:
            yield number, data.decode("utf-8")
        except UnicodeDecodeError as error:
            where = offset + error.start
            raise UserError(f"{path}:{number}: not UTF-8 at line {number}, byte offset {where}") from None


def opened(path):
    """A buffered binary stream of the file's (decompressed) bytes.

    Raises UserError for a missing file, a directory, a pipe or device, no permission, and for a file that is not what
    .gz or .zst says.
    """
    method, magic = next((PACKED[end] for end in PACKED if str(path).lower().endswith(end)), ("", b""))
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{path}: is a directory; name the files in it")
        if not stat.S_ISREG(mode):  # a pipe would block and a device would never end
            raise UserError(f"{path}: is not a regular file")
        with open(path, "rb") as stream:
            matches = stream.read(len(magic)) == magic
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    if not matches:
        raise UserError(f"{path}: not {method} data, although its name ends in {Path(path).suffix}")
    if method == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return gzip.open(path, "rb") if method else open(path, "rb")


def check_head(path, head: bytes) -> None:
    """Raise UserError where the first bytes are not those of a UTF-8 text file."""
    if not head:
        raise UserError(f"{path}: file has no rows (it is empty)")
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{path}:1: not text{' (NUL bytes)' if 0 in head else ''}: this is {name}")
    if head.count(0) * 10 > len(head):
        raise UserError(f"{path}:1: not text (NUL bytes): binary data, or UTF-16 without its mark")


def parsed(text: str):
    """The value of one line of JSON, or the RowError that drops the row. Raises json.JSONDecodeError."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        return RowError("too_deep", "brackets are nested too deeply")


def _object(pairs: list[tuple[str, object]]) -> dict | RowError:
    """A JSON object; a RowError in its place where a key occurs twice (json would silently keep the last)."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        return RowError("duplicate_key", f"key {twice!r} appears twice in one object")
    return value


def _integer(digits: str) -> int | float:
    """An integer; one that Python cannot convert becomes infinite, so that its row is dropped."""
    return int(digits) if len(digits) < 4300 else math.inf


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def explain(error: json.JSONDecodeError) -> str:
    """The JSON parser's message, with the likely cause where the line shows one."""
    text, message = error.doc, f"column {error.colno}: {error.msg[0].lower()}{error.msg[1:]}"
    if error.msg.startswith("Invalid control"):
        message = f"column {error.colno}: control character in string"
    elif error.msg == "Extra data":
        message = f"column {error.colno}: extra data after the first object"
    hints = {
        "CR line ends": "\r" in text,
        "trailing comma": re.search(r",\s*$", text[: error.pos]) and text[error.pos : error.pos + 1] in "}]",
        "an object over many lines is JSON, not JSON Lines": text.strip() == "{",
        "single quotes are Python, not JSON": re.match(r"\s*\{\s*'", text),
        "an HTML page": re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE),
        "a merge conflict": re.match(r"<{7} |={7}$|>{7} ", text),
        "a header line of CSV": re.match(r"\w+(,\w+)+$", text),
    }
    hint = next((name for name, holds in hints.items() if holds), "")
    return message + (f"; hint: {hint}" if hint else "")


def checked(value) -> dict:
    """The value of a row, an object with valid Unicode in every string and finite numbers only.

    All fields are checked, unknown ones too. Raises RowError.
    """
    if isinstance(value, dict) and _is_plain(value):
        return value
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
        elif isinstance(item, RowError):
            raise item
        elif isinstance(item, float) and not math.isfinite(item):
            raise RowError("not_finite", f"non-finite number in field {path} (NaN, Infinity or too large)")
    return value


def _is_plain(value: dict) -> bool:
    """Whether a value holds ASCII strings, integers, true, false and null alone, as most rows do; a third of the time
    of the search that names what is wrong."""
    waiting: list = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if not item.isascii():
                return False
        elif isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif not (item is None or isinstance(item, int)):
            return False
    return True


def _check_unicode(path: str, text: str) -> None:
    """Raise RowError for half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        message = f"field {ascii(path)[1:-1]} is not valid Unicode (cannot be written as UTF-8)"
        raise RowError("not_unicode", message) from None
