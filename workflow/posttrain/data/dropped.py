"""The rows that `prepare` does not use: each with file, line and reason, for `data/dropped.jsonl`."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from posttrain.data.stored import batches

REPEAT = "exact duplicate"
FIRST = 5  # rows of a reason that are named


class Kinds:
    """Dropped rows by reason: their number, and the first FIRST of each."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[dict]] = {}

    def note(self, one: dict) -> None:
        """Count a row (see `entry`)."""
        self.counts[one["reason"]] += 1
        if self.counts[one["reason"]] <= FIRST:
            self.first.setdefault(one["reason"], []).append(one)

    def sentences(self) -> list[str]:
        """For each reason: how many rows have it, with the place and the message of the first of them."""
        firsts = {reason: f"{of[0]['file']}:{of[0]['line']}: {of[0]['message']}" for reason, of in self.first.items()}
        return [f"{reason}, {count:,} rows, first {firsts[reason]}" for reason, count in self.counts.items()]


class Dropped:
    """The list of dropped rows: a file that is written as they are dropped. kinds: task -> its dropped rows."""

    def __init__(self, file: Path):
        self.file = file
        self.kinds: dict[str, Kinds] = defaultdict(Kinds)

    def __len__(self) -> int:
        return sum(kinds.counts.total() for kinds in self.kinds.values())

    def add(self, entries: Iterable[dict]) -> None:
        """Append rows (see `entry`); there is no file while there are none."""
        for batch in batches(entries, 1000):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a" if len(self) else "w", encoding="utf-8") as file:
                file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in batch)
            for one in batch:
                self.kinds[one["task"]].note(one)


def entry(source: str, task: str, reason: str, message: str) -> dict:
    """A line of the list. source: file:line, as in a row; the line is a number, but for the built-in world's rows."""
    file, _, line = source.rpartition(":")
    place = {"file": file, "line": int(line) if line.isdecimal() else line}
    return place | {"task": task, "reason": reason, "message": message}


def repeated(repeats: Iterable[tuple[dict, dict]], task: str) -> Iterator[dict]:
    """Lines for exact duplicates. repeats: each row with the earlier one of which it is a duplicate."""
    for row, first in repeats:
        yield entry(row["source"], task, REPEAT, f"exact duplicate of {first['source']}")
