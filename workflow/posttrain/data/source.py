"""What was read from a source: its rows, the lines that were dropped, and the warnings."""

from dataclasses import dataclass, field

from posttrain.data import turns


def note(cases_by_reason: dict, reason: str, line: int, message: str) -> None:
    """Add a dropped line or a warning."""
    cases_by_reason.setdefault(reason, []).append((line, message))


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
    """The rows of a source, and its dropped lines and warnings by reason: (line, message)."""

    name: str
    task: str
    format: str
    rows: list[dict] = field(default_factory=list)
    total: int = 0
    dropped: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    warnings: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)  # keys that nothing reads, each with the first line

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
