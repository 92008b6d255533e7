"""What was read from a source: its rows, the lines that were dropped, and the warnings."""

from collections import Counter
from dataclasses import dataclass, field

from posttrain.data import turns
from posttrain.data.stored import Rows, store

SHOWN = 5  # lines with the same warning that are named; all are counted


class Row(dict):
    """A row that notes which of its keys are read."""

    def __init__(self, row: dict):
        super().__init__(row)
        self.read: set[str] = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def unread(self) -> set[str]:
        """The keys with a value that nothing has read, and those of turns."""
        keys = {key for key, value in self.items() if key not in self.read and value not in (None, "", [], {})}
        return keys.union(*(turns.unread(key, value) for key, value in self.items() if key in self.read))


@dataclass
class Report:
    """The rows of a source, and its dropped lines and warnings by reason: (line, message).

    dropped: all lines. warnings: the first SHOWN; `warned` counts all.
    """

    name: str
    task: str
    format: str
    rows: Rows = field(default_factory=lambda: store([]))
    total: int = 0
    dropped: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    warnings: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    warned: Counter[str] = field(default_factory=Counter)
    longer: Counter[bool] = field(default_factory=Counter)  # pairs whose chosen side is the longer one, and others
    unread: dict[str, int] = field(default_factory=dict)  # keys that nothing reads, each with the first line

    @property
    def kept(self) -> int:
        return len(self.rows)

    def blank(self) -> "Report":
        """A report on other lines of the same source, without rows."""
        return Report(self.name, self.task, self.format, Rows(None))

    def add(self, later: "Report") -> None:
        """Take in what was noted of lines that follow, without their rows."""
        self.total += later.total
        for reason, cases in later.dropped.items():
            self.dropped.setdefault(reason, []).extend(cases)
        for reason, cases in later.warnings.items():
            shown = self.warnings.setdefault(reason, [])
            shown += cases[: SHOWN - len(shown)]
        self.warned.update(later.warned)
        self.longer.update(later.longer)
        self.unread = later.unread | self.unread

    def drop(self, reason: str, line: int, message: str) -> None:
        """Note a dropped line."""
        self.dropped.setdefault(reason, []).append((line, message))

    def warn(self, reason: str, line: int, message: str) -> None:
        """Note a warning; line 0 is the file as a whole."""
        self.warned[reason] += 1
        if self.warned[reason] <= SHOWN:
            self.warnings.setdefault(reason, []).append((line, message))

    def describe(self, limit: int = SHOWN) -> list[str]:
        """Messages to print, at most `limit` for each reason; line 0 is the file as a whole."""
        sentences = []
        for verb, cases_by_reason in (("dropped", self.dropped), ("warning", self.warnings)):
            for reason, cases in cases_by_reason.items():
                sentences += [f"{self.name}{f':{n}' if n else ''}: {verb}: {text}" for n, text in cases[:limit]]
                more = (self.warned[reason] if verb == "warning" else len(cases)) - limit
                if more > 0:
                    sentences.append(f"{self.name}: {verb}: {reason}: {more:,} more lines")
        return sentences
