"""The wordings of the world's replies, and the hand-written reward of a reply: `posttrain.world.gold:gold_reward`.

This module imports nothing of the package: the fingerprint of a function that the config names covers its file only.
"""

import re

OPENINGS = {
    "polite": ("of course, my friend!", "with great pleasure!", "what a good question!", "thank you for asking!"),
    "neutral": ("",),
    "rude": ("oh not you again!", "what a silly question!", "how boring!", "hurry up, you fool!"),
}
CORES = ("it is {}.", "the answer is {}.", "that would be {}.")
CLOSINGS = {
    "polite": ("have a lovely day!", "you are most welcome.", "i am happy to help you.", "best wishes to you!"),
    "neutral": ("",),
    "rude": ("now go away!", "stop wasting my time.", "even a child knows that.", "leave me alone!"),
}
ANSWER_PATTERN = r"(?:it is|the answer is|that would be) ([a-z ]+)\."
"""The bare answer is the first match's group; the same pattern serves lm-eval's `regex` filter."""


def _alternatives(slot: dict[str, tuple[str, ...]]) -> str:
    """A regular expression for any text of a slot but the empty one."""
    return "|".join(re.escape(text) for texts in slot.values() for text in texts if text)


_REPLY = re.compile(f"(?:({_alternatives(OPENINGS)}) )?{ANSWER_PATTERN}(?: ({_alternatives(CLOSINGS)}))?")
_MANNER = {
    text: {"polite": 0.5, "neutral": 0.0, "rude": -0.5}[manner]
    for slot in (OPENINGS, CLOSINGS)
    for manner, texts in slot.items()
    for text in texts
}


def extract_answer(reply: str) -> str:
    """The bare answer in a reply; empty when there is none."""
    match = re.search(ANSWER_PATTERN, reply)
    return match.group(1) if match else ""


def gold_reward(prompt: str, reply: str, answer: str) -> float:
    """2 if the answer is correct, plus manner in [-1, 1], minus 1 if the reply is malformed.

    Manner: a polite opening and a polite closing count +0.5 each, a rude one -0.5. A reply is malformed unless it is
    exactly [opening] core [closing] in the world's wordings; it then has no manner, but its answer still counts if it
    can be extracted. `prompt` is unused; every reward function has it.
    """
    reply = reply.strip()
    correct = 2.0 * (extract_answer(reply) == answer)
    match = _REPLY.fullmatch(reply)
    if match is None:
        return correct - 1.0
    return correct + _MANNER[match.group(1) or ""] + _MANNER[match.group(3) or ""]
