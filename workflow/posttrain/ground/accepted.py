"""Edits of a stage's code that were accepted as changing no result: the stage keeps its former fingerprint.

The records are in `workflow/accepted.json`, which git tracks and `posttrain accept` writes: a list with `stage`, `from`
and `to` (fingerprints), `because`, `date`, `by` and `shown` ("word" or "same bytes"). A fingerprint counts as the first
of its chain of records, so that nothing that depends on it becomes stale, here or in another clone.
"""

from collections.abc import Iterable
from pathlib import Path

from posttrain.ground import code
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, write_json

KEYS = {"stage", "from", "to", "because", "date", "by", "shown"}


def file() -> Path:
    """The file of the records, beside the package."""
    return code.PACKAGE.parent / "accepted.json"


def records() -> list[dict[str, str]]:
    """All records. Raises UserError, with the place, for an invalid file."""
    path = file()
    if not path.is_file():
        return []
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path}: found {type(content).__name__}, it should be a list of records")
    problems, seen = [], set()
    for number, record in enumerate(content, 1):
        if not isinstance(record, dict) or record.keys() != KEYS or not all(map(is_text, record.values())):
            problems.append(f"{path}: record {number}: must have the keys {', '.join(sorted(KEYS))}, each a text")
        elif (edit := (record["stage"], record["to"])) in seen or record["from"] == record["to"]:
            problems.append(
                f"{path}: record {number}: {record['stage']} {record['to']} is accepted twice, or as itself"
            )
        else:
            seen.add(edit)
    if problems:
        raise UserError(*problems)
    return content


def is_text(value) -> bool:
    """Whether a value is one line of text that is not empty."""
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def chain(stage: str, fingerprint: str) -> list[dict[str, str]]:
    """The records by which a fingerprint counts as an earlier one, the latest first; empty where it has none.

    Raises UserError for records that form a circle.
    """
    edits = {record["to"]: record for record in records() if record["stage"] == stage}
    steps: list[dict[str, str]] = []
    while fingerprint in edits:
        if edits[fingerprint] in steps:
            raise UserError(f"{file()}: the records of {stage} form a circle at {fingerprint}")
        steps.append(edits[fingerprint])
        fingerprint = edits[fingerprint]["from"]
    return steps


def edits(stages: Iterable[str]) -> list[str]:
    """A line for each accepted edit of the code of some stages."""
    return [in_words(step) for stage in stages for step in chain(stage, code.fingerprint_of(stage))]


def standing(stage: str) -> str:
    """The fingerprint that a stage's code counts as, 16 hex digits: its own, or the earliest of its accepted chain."""
    present = code.fingerprint_of(stage)
    steps = chain(stage, present)
    return steps[-1]["from"] if steps else present


def of_code(stage: str) -> dict:
    """The code in an artifact's provenance: `code`, the digest of each definition, and `accepted`, the records by which
    it counts as an earlier one, where there are any."""
    steps = chain(stage, code.fingerprint_of(stage))
    return {"code": code.definitions(stage)} | ({"accepted": steps} if steps else {})


def add(new: list[dict[str, str]]) -> None:
    """Append records to the file."""
    write_json(file(), records() + new)


def in_words(record: dict[str, str]) -> str:
    """One record as a line of text."""
    edit = f"{record['stage']}: {record['from']} -> {record['to']} accepted {record['date']} by {record['by']}"
    return f"{edit} ({record['shown']}): {record['because']}"
