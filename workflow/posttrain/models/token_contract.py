"""The token contract: what must hold of the tokens of every row before it is trained on."""

from collections.abc import Sequence
from operator import eq
from typing import NamedTuple

from posttrain.models.chat import Breach, breach
from posttrain.models.control import control_text
from posttrain.models.tokens import MASKED, Encoding, answers, demonstration, together, trained_turns

CONTROL_TEXT = "control_text"
TEXTS = ("text", "messages", "prompt", "completion", "chosen", "rejected")  # keys of a row that hold what is read


class Special(NamedTuple):
    """Ids of a tokenizer's special tokens, and whether it writes a beginning-of-sequence token before a text."""

    eos: int
    bos: int | None
    pad: int | None
    begins_texts: bool


def special_of(tokenizer) -> Special:
    """The special tokens, which are looked up once for many rows."""
    bos = tokenizer.bos_token_id
    return Special(tokenizer.eos_token_id, bos, tokenizer.pad_token_id, tokenizer("").input_ids[:1] == [bos])


def refuse_control_text(tokenizer, row: dict) -> None:
    """Raise Breach for text that the tokenizer would read as a control token: an end of turn within an answer."""
    found = control_text(tokenizer, {key: row[key] for key in TEXTS if key in row})
    if found:
        what = "the end-of-turn token" if found == tokenizer.eos_token else "a control token"
        chat = "; give a chat as messages" if isinstance(row.get("prompt"), str) else ""
        way_out = f"`prepare.control_text: plain` reads it as plain text{chat}"
        raise breach(CONTROL_TEXT, row, f"its text holds {found!r}, {what} of the tokenizer; {way_out}")


def check(tokenizer, row: dict) -> int:
    """Number of tokens of a row (see `size`). Raises Breach where `encode_all` gives one."""
    (encoded,) = encode_all(tokenizer, [row])
    if isinstance(encoded, Breach):
        raise encoded
    return size(encoded)


def encode_all(tokenizer, rows: Sequence[dict]) -> list[dict[str, list[int]] | Breach]:
    """Rows as the trainers read them: of `sft` by `tokens.demonstration`, others by `tokens.answers`.

    In place of a row that cannot be trained on stands the Breach that says why.
    """
    special = special_of(tokenizer)
    results = together(tokenizer, [encoding(tokenizer, row) for row in rows])
    return [
        item if isinstance(item, Breach) else _fault(tokenizer, special, row, item) or item
        for row, item in zip(rows, results, strict=True)
    ]


def encoding(tokenizer, row: dict) -> Encoding:
    """How `encode_all` encodes a row."""
    return answers(tokenizer, row, sides) if (sides := answers_of(row)) else demonstration(tokenizer, row)


def answers_of(row: dict) -> tuple[str, ...]:
    """The keys of a row's answers; none for a row of `sft`."""
    return ("chosen", "rejected") if "chosen" in row else ("completion",) if "label" in row else ()


def size(encoded: dict[str, list[int]]) -> int:
    """Number of tokens of a row, chat template included; of a pair, with the longer answer."""
    return max(len(ids) for ids, _ in _trained(encoded))


def prompt_size(encoded: dict[str, list[int]]) -> int:
    """Number of tokens before the last reply that is trained."""
    if "prompt_ids" in encoded:
        return len(encoded["prompt_ids"])
    return _last_reply(encoded["labels"])[0]


def answer_size(encoded: dict[str, list[int]]) -> int:
    """Number of tokens of the last reply that is trained, its end of turn included; of a pair, of the longer answer."""
    if "prompt_ids" in encoded:
        return max(len(ids) for key, ids in encoded.items() if key != "prompt_ids")
    start, stop = _last_reply(encoded["labels"])
    return stop - start


def _last_reply(labels: list[int]) -> tuple[int, int]:
    """The places of the first token of the last reply and of the one behind it."""
    stop = next((n for n in range(len(labels), 0, -1) if labels[n - 1] != MASKED), 0)
    start = next((n for n in range(stop, 0, -1) if labels[n - 1] == MASKED), 0)
    return start, stop


def _trained(encoded: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of a row, or of a prompt with each of its answers."""
    if "input_ids" in encoded:
        return [(encoded["input_ids"], encoded["labels"])]
    prompt = encoded["prompt_ids"]
    masked = [MASKED] * len(prompt)
    return [(prompt + ids, masked + ids) for key, ids in encoded.items() if key != "prompt_ids"]


def _fault(tokenizer, special: Special, row: dict, encoded: dict[str, list[int]]) -> Breach | None:
    """The first fault of a row's tokens; None where there is none."""
    for ids, labels in _trained(encoded):
        for reason, fault in faults_of(tokenizer, special, row, ids, labels).items():
            return breach(reason, row, fault)
    if "chosen_ids" in encoded and encoded["chosen_ids"] == encoded["rejected_ids"]:
        return breach("equal_answers", row, "chosen and rejected have the same tokens: nothing to tell apart")
    return None


def faults_of(tokenizer, special: Special, row: dict, input_ids: list[int], labels: list[int]) -> dict[str, str]:
    """The faults of a row's tokens and labels, by a short key; empty where the token contract holds."""
    eos, bos, pad, begins_texts = special
    trained = len(labels) - labels.count(MASKED)
    faults = {}
    if not trained:
        faults["untrained"] = "has no token to train on"
    turns, ends = len(trained_turns(row)) if "messages" in row else 1, labels.count(eos)
    if ends != turns:
        times = f"{ends} times in {turns} turns"
        faults["end_of_turn"] = f"the end-of-turn token {tokenizer.eos_token!r} is trained {times}"
    if bos is not None and bos != eos:
        count = input_ids.count(bos)
        expected = 1 if begins_texts else min(1, count)
        if count != expected or (expected and input_ids[0] != bos):
            tokens_of_bos = f"{count} beginning-of-sequence tokens {tokenizer.bos_token!r}"
            faults["beginning"] = f"has {tokens_of_bos}, not one"
    if pad is not None and pad != eos and pad in labels:
        faults["padding"] = f"padding {tokenizer.pad_token!r} is a label"
    if not _labels_are_tokens(input_ids, labels, trained):
        faults["label"] = "a label differs from its token"
    return faults


def _labels_are_tokens(input_ids: list[int], labels: list[int], trained: int) -> bool:
    """Whether each label that is not masked is its token. trained: their number."""
    if len(labels) != len(input_ids):
        return False
    start = len(labels) - trained  # most rows end with all that is trained, and no token is MASKED
    return labels[start:] == input_ids[start:] or sum(map(eq, labels, input_ids)) == trained
