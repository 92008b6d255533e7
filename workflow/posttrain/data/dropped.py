"""The rows that `prepare` does not use: each with file, line and reason, for `data/dropped.jsonl`."""

from collections import Counter

REPEAT = "exact duplicate"


def entry(source: str, task: str, reason: str, message: str) -> dict:
    """A line of the list. source: file:line, as in a row; the line is a number, but for the built-in world's rows."""
    file, _, line = source.rpartition(":")
    place = {"file": file, "line": int(line) if line.isdecimal() else line}
    return place | {"task": task, "reason": reason, "message": message}


def repeated(repeats: list[tuple[dict, dict]], task: str) -> list[dict]:
    """Lines for exact duplicates. repeats: each row with the earlier one of which it is a duplicate."""
    return [entry(row["source"], task, REPEAT, f"exact duplicate of {first['source']}") for row, first in repeats]


def first_of_each_kind(entries: list[dict]) -> list[str]:
    """For each reason: how many rows have it, with the place and the message of the first of them."""
    counts = Counter(one["reason"] for one in entries)
    first = {one["reason"]: f"{one['file']}:{one['line']}: {one['message']}" for one in reversed(entries)}
    return [f"{reason}, {counts[reason]:,} rows, first {first[reason]}" for reason in counts]
