"""Rewards that a program can check: the answer, a pattern, tags in order, the length. Each is 1 or 0.

How each can be gamed: `exact` by a reply that ends in many numbers, of which only the last counts, and by a row whose
answer can be guessed; `pattern` and `tags` by the form without content, which they do not read; `length` by an empty
reply, which is short too. None reads how an answer was found.
"""

import re
import string
from collections.abc import Callable, Sequence

import regex

from posttrain.config.sections import RewardPart
from posttrain.ground.progress import say

SECONDS = 1.0  # longest search of a user's regular expression, some of which take time exponential in the reply
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
Check = Callable[[str, str | None], bool]  # (reply, the row's answer) -> whether it holds


def check(part: RewardPart) -> Check:
    """The check of a term of a reward. Raises ValueError for a term that is no check."""
    if part.kind == "exact":
        return exact(same_number if part.answer == "number" else same_text, part.pattern)
    if part.kind == "pattern":
        wanted = regex.compile(part.pattern or "", regex.DOTALL)
        return lambda reply, _: bool(wanted.search(reply, timeout=SECONDS))
    if part.kind == "tags":
        ordered = re.compile("".join(rf".*?<{tag}>.*?</{tag}>" for tag in part.tags or []), re.DOTALL)
        marks = [mark for tag in part.tags or [] for mark in (f"<{tag}>", f"</{tag}>")]
        return lambda reply, _: bool(ordered.match(reply)) and all(reply.count(mark) == 1 for mark in marks)
    if part.kind == "length":
        longest = part.words or 0
        return lambda reply, _: len(reply.split()) <= longest
    raise ValueError(f"{part.kind} is no check")


def scores(part: RewardPart, rows: list[dict], replies: list[str]) -> list[float]:
    """Whether a term holds for each reply to a row, 1 or 0; 0, which is told, where its regular expression takes too
    long."""
    holds, late = check(part), []
    found: list[float] = []
    for row, reply in zip(rows, replies, strict=True):
        try:
            found.append(float(holds(reply, row["answer"])))
        except TimeoutError:
            found.append(0.0)
            late.append(f"the row {row.get('id')}, reply {reply[:80]!r}")
    if late:
        problem = f"took over {SECONDS:g} s for {len(late)} of {len(rows)} replies, the first to {late[0]}"
        say(f"warning: the pattern {part.pattern!r} {problem}: they count as 0")
    return found


def answerable(part: RewardPart, answer: str | None) -> bool:
    """Whether a row's answer can be compared with."""
    return answer is not None and (part.answer == "text" or last_number(answer.rpartition("####")[2]) is not None)


def measured(parts: Sequence[RewardPart] | None, rows: list[dict], replies: list[str]) -> dict[str, list[float | None]]:
    """Whether each term holds for each reply, 1 or 0, and None where it needs an answer that the row has not; by the
    term's name, `exact_reward`, that of a second one of its kind `exact_reward_2`."""
    found: dict[str, list[float | None]] = {}
    for number, part in enumerate(parts or ()):
        before = sum(other.kind == part.kind for other in (parts or ())[:number])
        values = zip(rows, scores(part, rows, replies), strict=True)
        found[f"{part.kind}_reward" + (f"_{before + 1}" if before else "")] = [
            None if part.kind == "exact" and row["answer"] is None else value for row, value in values
        ]
    return found


def summed(parts: Sequence[RewardPart], found: dict[str, list[float | None]]) -> list[float]:
    """The reward of each reply: the terms' weighted sum, in which None is 0. found: by `measured`."""
    terms = zip(*found.values(), strict=True)
    return [sum(part.weight * (value or 0.0) for part, value in zip(parts, term, strict=True)) for term in terms]


def exact(same: Check, pattern: str | None) -> Check:
    """A comparison of the reply, or of the first group of a pattern in it, with the row's answer."""
    if pattern is None:
        return same
    wanted = regex.compile(pattern, regex.DOTALL)

    def holds(reply: str, answer: str | None) -> bool:
        match = wanted.search(reply, timeout=SECONDS)
        return match is not None and same(match[1], answer)

    return holds


def last_number(text: str) -> float | None:
    """The last number of a text, where commas group digits; None without one."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def same_number(reply: str, answer: str | None) -> bool:
    """Whether the last number of the reply is that of the answer, or of what follows its `####`, as in GSM8K (arXiv
    2110.14168). False for a row without an answer."""
    expected = last_number((answer or "").rpartition("####")[2])
    return expected is not None and last_number(reply) == expected


def same_text(reply: str, answer: str | None) -> bool:
    """Whether reply and answer are equal without case, punctuation, articles and spaces (the exact match of SQuAD,
    arXiv 1606.05250). False for a row without an answer."""
    return answer is not None and bool(plain(answer)) and plain(reply) == plain(answer)


def plain(text: str) -> str:
    """A text in lower case, without punctuation and articles, with single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())
