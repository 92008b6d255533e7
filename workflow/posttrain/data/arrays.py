"""Read a .json file: one array whose elements are the rows, numbered from 1, in bounded memory; or JSON Lines."""

import codecs
import json
import zlib
from collections.abc import Iterator

from posttrain.data import lines
from posttrain.ground.errors import UserError

CHUNK = 2**16
SPACE = " \t\n\r"
OF_A_NUMBER = "0123456789.eE+-"  # with these behind it, a number may go on in what was not yet read


def read_json(path, max_line_bytes: int = lines.MAX_LINE_BYTES) -> Iterator[tuple[int, object, bool]]:
    """Yield (number of the element or line, value or RowError, whether a byte order mark was stripped).

    Raises UserError for text that is not JSON or not UTF-8, for an element over the limit, and where there are no rows.
    """
    with lines.opened(path) as stream:
        head = stream.peek(4096)[:4096]
    marked = head.startswith(codecs.BOM_UTF8)
    if not head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from lines.read_objects(path, max_line_bytes)
        return
    number = 0
    for number, value in enumerate(Array(path, max_line_bytes).elements(), 1):
        yield number, value, marked and number == 1
    if not number:
        raise UserError(f"{path}: file has no rows (the array is empty)")


class Array:
    """The text of a file with an array, of which `rest` is held: it begins at `at`, in line `line` of the file."""

    def __init__(self, path, limit: int):
        self.path, self.limit = path, limit
        self.rest, self.at, self.line, self.ended = "", 0, 1, False

    def elements(self) -> Iterator[object]:
        """Yield the elements. Raises UserError, naming the line, where the text is not one array."""
        try:
            with lines.opened(self.path) as self.stream:
                self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
                self.next_sign()  # the bracket that opens the array
                self.at += 1
                if self.next_sign() != "]":
                    yield self.element()
                    while self.next_sign() == ",":
                        self.at += 1
                        self.next_sign()
                        yield self.element()
                self.close()
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{self.path}: cannot be read on, the file is damaged: {error}") from None

    def next_sign(self) -> str:
        """The next character that is not white space, at which the text then stands; "" at the end."""
        while True:
            while self.at < len(self.rest) and self.rest[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.rest):
                return self.rest[self.at]
            if not self.read_on():
                return ""

    def element(self):
        """The element at which the text stands; the text then stands behind it."""
        while True:
            try:
                value, end = lines.DECODER.raw_decode(self.rest, self.at)
            except RecursionError:
                raise self.refusal("brackets are nested too deeply") from None
            except json.JSONDecodeError as error:
                if self.read_on():
                    continue
                self.at = error.pos
                raise self.refusal(f"{error.msg[0].lower()}{error.msg[1:]}") from None
            goes_on = isinstance(value, int | float) and self.rest[end : end + 1] in OF_A_NUMBER
            if (end < len(self.rest) and not goes_on) or not self.read_on():
                self.at = end
                return value

    def close(self) -> None:
        """Raise UserError unless the array ends here, and the file with it."""
        if self.next_sign() != "]":
            raise self.refusal("a comma or the array's closing bracket is missing")
        self.at += 1
        if self.next_sign():
            raise self.refusal("extra data after the array")

    def read_on(self) -> bool:
        """Read as much again as is held, and forget what lies behind; False at the end of the file."""
        self.line += self.rest.count("\n", 0, self.at)
        self.rest, self.at = self.rest[self.at :], 0
        if self.ended:
            return False
        if len(self.rest) > self.limit:
            raise UserError(f"{self.path}:{self.line}: element over the size limit of {self.limit:,} characters")
        data = self.stream.read(max(CHUNK, len(self.rest)))
        self.ended = not data
        try:
            self.rest += self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8: {error.reason}, after line {self.line}") from None
        return True

    def refusal(self, fault: str) -> UserError:
        """The error for a fault at the place where the text stands."""
        line = self.line + self.rest.count("\n", 0, self.at)
        column = self.at - self.rest.rfind("\n", 0, self.at)
        return UserError(f"{self.path}:{line}: invalid JSON at line {line}, column {column}: {fault}")
