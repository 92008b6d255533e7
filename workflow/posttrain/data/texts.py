"""The texts of a row, their words and odd characters; rows with equal texts, or with another verdict on the same.

Nothing here changes a text.
"""

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable

import orjson

from posttrain.models.control import strings
from posttrain.models.tokens import prompt_text, spoken, turn_text

ENCODER = json.JSONEncoder(sort_keys=True)
DERIVED = re.compile(r"prompt:[0-9a-f]{32}")  # the group of a row that declares none
# The bytes 80-BF decoded as cp1252. After a capital, quotes and dashes do not count: they may end a word.
_FOLLOWS = bytes(range(0x80, 0xC0)).decode("cp1252", "ignore") + "\u0080-\u009f"
_AFTER_A = re.sub("[\u2013\u2014\u2018\u2019\u201c\u201d\u2026]", "", _FOLLOWS)
ODD = {
    # Joiners (U+200C, U+200D) and direction marks are left out: emoji, Persian, Hebrew and Arabic need them.
    "zero_width": re.compile("[\u200b\u2060\ufeff\u00ad]"),
    "bidi_override": re.compile("[\u202a-\u202e\u2066-\u2069]"),
    "mojibake": re.compile(
        f"â€[{_FOLLOWS}]|Ã[{_AFTER_A}]|Â[\u00a0-\u00bf]|ðŸ[{_FOLLOWS}]|ï¿½|ï»¿|(?:[ÐÑ][{_FOLLOWS}]){{2}}|\ufffd"
    ),
    "control_character": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"),
    "special_token": re.compile(r"<\|[a-z0-9_]+\|>|</s>|\[/?INST\]|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"),
}
_IN_ASCII = ("control_character", "special_token")  # the kinds of ODD that a text of ASCII alone can have
ODD_MEANING = {
    "zero_width": "zero-width characters, kept",
    "bidi_override": "bidi override characters (such as U+202E), kept: the text is not what it looks like",
    "mojibake": "likely mojibake (UTF-8 once read as something else), kept",
    "control_character": "control characters, kept",
    "special_token": "text that looks like a tokenizer's special token",
}
_INVISIBLE = set("\u115f\u1160\u2800\u3164\uffa0")
# In scripts without spaces, each character is a word. Sentence punctuation is not a word; an operator is.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
_SENTENCE = ".,;:!?'\"`\u2013\u2014\u2018\u2019\u201c\u201d\u2026\u00ab\u00bb\u00bf\u00a1\u3001\u3002"
_OPERATOR = f"[^\\w\\s{_SENTENCE}]"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+|{_OPERATOR}")
_SPACED = {  # what a character of ASCII becomes so that spaces stand between the words
    **{ord(sign): " " for sign in _SENTENCE if sign.isascii()},
    **{code: f" {chr(code)} " for code in range(128) if re.fullmatch(_OPERATOR, chr(code))},
}


def is_blank(text: str) -> bool:
    """Whether the text is invisible: white space, zero-width and lone combining characters only."""
    unseen = ("Cc", "Cf", "Zs", "Zl", "Zp", "Mn")
    return all(c in _INVISIBLE or unicodedata.category(c) in unseen for c in text)


@functools.lru_cache(maxsize=16)  # a row's texts are asked for several times
def words(text: str) -> tuple[str, ...]:
    """The text's words and operators, without case, spaces and sentence punctuation."""
    if text.isascii():  # a third of the time that the pattern takes
        return tuple(text.lower().translate(_SPACED).split())
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def odd(text: str) -> list[str]:
    """The kinds of ODD characters in the text."""
    kinds: Iterable[str] = _IN_ASCII if text.isascii() else ODD
    if "<" not in text and "[" not in text:  # as in most texts; found in less time than by the pattern
        kinds = [kind for kind in kinds if kind != "special_token"]
    return [kind for kind in kinds if ODD[kind].search(text)]


def reply_texts(row: dict) -> list[str]:
    """The replies of a canonical row: one text, or both sides of a preference."""
    if "messages" in row:
        return [turn_text(row["messages"][-1])]
    if "choices" in row:
        return [row["choices"][row["answer"]]]
    if "question" in row:
        return [row.get("solution", row["answer"])]
    if "chosen" in row:
        return [spoken(row["chosen"]), spoken(row["rejected"])]
    return [spoken(row[key]) for key in ("completion", "answer") if key in row][:1]


def full_text(row: dict) -> str:
    """Prompt and replies, system turns included."""
    turns = row["messages"] if "messages" in row else row.get("prompt")
    prompt = [turn_text(turn) for turn in turns] if isinstance(turns, list) else [prompt_text(row)]
    return "\n".join(prompt if "messages" in row else [*prompt, *reply_texts(row)])


def word_parts(row: dict) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the words of `full_text`, those of `prompt_text`)."""
    prompt = words(prompt_text(row))
    turns = row["messages"] if "messages" in row else row.get("prompt")
    if isinstance(turns, list) and any(turn["role"] == "system" for turn in turns):
        return words(full_text(row)), prompt
    return sum(map(words, reply_texts(row)), prompt), prompt


def all_text(value) -> str:
    """Every string in a row's content, system turns and wrong choices too."""
    return "\n".join(strings(value))


def digest(value) -> str:
    """A short stable fingerprint of a JSON value."""
    return hashlib.sha256(ENCODER.encode(value).encode()).hexdigest()[:32]


def content(row: dict) -> dict:
    """The row without id, group, source and margin; rows with equal content are exact duplicates."""
    return {key: value for key, value in row.items() if key not in ("id", "group", "source", "margin")}


def fingerprints(row: dict) -> dict[str, int]:
    """64-bit numbers of a row, which are equal for two others with a chance of 2^-64:

    exact    its content
    near     its content but for case, space and sentence punctuation
    judged   what it judges: two answers, a completion, or a question; 0 for rows without a verdict
    verdict  its judgement of that
    id       its id
    """
    replies = [words(text) for text in reply_texts(row)]
    judged, verdict = _judgement(row) or (None, None)
    return {
        "exact": number(content(row)),
        "near": number([words(prompt_text(row)), replies, row.get("choices")]),
        "judged": number(judged) if judged else 0,
        "verdict": number(verdict) if judged else 0,
        "id": number(row["id"]),
    }


def number(value) -> int:
    """A 64-bit fingerprint of a JSON value."""
    try:
        written = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:  # an integer of more than 64 bits
        written = json.dumps(value, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(written, digest_size=8).digest(), "big")


def _judgement(row: dict) -> tuple[list, str] | None:
    """(what a row judges, its verdict), but for case, space and punctuation; None without a verdict.

    Two rows contradict each other that judge the same otherwise: the opposite choice between two answers, the other
    label of a completion, another answer to a question with the same choices.
    """
    if not row.keys() & {"chosen", "label", "question"}:
        return None
    asked = [_bare(all_text(row.get("prompt", row.get("question")))), row.get("tools")]
    replies = [_bare(reply) for reply in reply_texts(row)]
    if "chosen" in row:
        return [asked, sorted(replies)], replies[0]
    if "label" in row:
        return [asked, replies], str(row["label"])
    if "choices" in row:
        return [asked, sorted(map(_bare, row["choices"]))], replies[0]
    return asked, _bare(row["answer"])


def _bare(text: str) -> str:
    """The text's words; the text itself where it has none."""
    return " ".join(words(text)) or text.strip()
