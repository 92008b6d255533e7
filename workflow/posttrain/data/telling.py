"""The words of test rows' prompts, and those among them that tell a row from the other test rows."""

import re
from collections import Counter
from collections.abc import Sequence
from sys import intern

from posttrain.data.examples import question_asked
from posttrain.data.texts import words
from posttrain.models.tokens import prompt_text

PARTS = re.compile(r"\n+|:\s+")


def parted_prompts(test: Sequence[dict]) -> tuple[list[tuple], list[range]]:
    """(the words of each test row's prompt, the places of those that tell it from other test rows).

    These are the words of its last part (line, or what follows a colon) that no other test row has; all words of a
    document and of a conversation of several turns, and where other rows have every part.
    """
    split = [_parts(row) for row in test]
    counts = Counter(part for parts in split for part in {part for part, _ in parts})
    prompts, telling = [], []
    for row, parts in zip(test, split, strict=True):
        prompts.append(tuple(word for part, _ in parts for word in part))
        own = [n for n, (part, label) in enumerate(parts) if part and not label and counts[part] == 1]
        start, length = 0, len(prompts[-1])
        if own and _is_one_question(row):
            start, length = sum(len(part) for part, _ in parts[: own[-1]]), len(parts[own[-1]][0])
        telling.append(range(start, start + length))
    return prompts, telling


def _is_one_question(row: dict) -> bool:
    """Whether a row's prompt is one question, neither a document nor a conversation with earlier replies."""
    turns = row["messages"][:-1] if "messages" in row else row.get("prompt", [])
    earlier = isinstance(turns, list) and any(turn["role"] == "assistant" for turn in turns)
    return "text" not in row and not earlier


def _parts(row: dict) -> list[tuple[tuple, bool]]:
    """(the words of each part of a row's prompt, whether the part is a label such as `Answer:`)."""
    parts = PARTS.split(question_asked(prompt_text(row)))
    return [(interned(part), part.rstrip().endswith(":")) for part in parts]


def interned(text: str) -> tuple:
    """The words of a text; equal ones are one object."""
    return tuple(map(intern, words(text)))
