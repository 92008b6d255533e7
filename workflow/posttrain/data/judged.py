"""Check judged answers, or a question with its choices or answer, and convert them to canonical form.

A function for each format of the tasks `preference`, `kto`, `eval` and `generation`.
"""

import math
import re

from posttrain.data.formats import (
    check_conversation,
    check_one_reply,
    check_prompt,
    prompt_and,
    read_messages,
    refuse_mixed,
    required,
    visible_text,
)
from posttrain.data.lines import RowError, json_kind
from posttrain.data.transcripts import form_of, read_transcript
from posttrain.models.tokens import spoken

SIDES = ("chosen", "rejected")
MARGIN = "margin"  # key of a pair: by how much the chosen answer was rated better
# Names of the two scores of a pair.
SCORES = [f"{word}{mark}{{}}" for word in ("score", "rating", "reward") for mark in "_-"]
SCORES += [f"{{}}{mark}{word}" for word in ("score", "rating", "reward") for mark in "_-"]


def transcript_pair(row: dict, allow_empty_user: bool) -> dict:
    """Two transcripts that differ in their last reply only; the field `prompt` is put before both."""
    sides = {key: required(row, key) for key in ("chosen", "rejected")}
    refuse_reversed(row)
    refuse_mixed("chosen", sides["chosen"], "rejected", sides["rejected"])
    if isinstance(sides["chosen"], list):
        raise RowError("mixed_types", "chosen and rejected are lists while the file holds transcripts")
    if isinstance(row.get("prompt"), str) and not form_of(sides["chosen"]):
        sides = {key: row["prompt"] + side for key, side in sides.items()}
    if sides["chosen"].strip() == sides["rejected"].strip():
        raise RowError("no_signal", "chosen equals rejected: no signal")
    turns = {key: check_conversation(read_transcript(side, key, allow_empty_user), key) for key, side in sides.items()}
    prompt, replies = _shared_prompt(None, list(turns.values()), allow_empty_user)
    return _check_signal({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]})


def refuse_reversed(row: dict) -> None:
    """Raise RowError where the chosen answer has a lower score than the rejected one, by two keys of the row."""
    for name in SCORES:
        better, worse = name.format("chosen"), name.format("rejected")
        if better in row and worse in row:
            high, low = as_number(row[better]), as_number(row[worse])
            if high is not None and low is not None and high < low:
                lower = f"{better} {row[better]} is lower than {worse} {row[worse]}"
                raise RowError("reversed", f"{lower}: the pair is reversed")


def margin(row: dict) -> float | None:
    """By how much the chosen answer was rated better: the row's `margin`, or the difference of its two scores; None
    where it has neither. Raises RowError for a margin that is no number from 0."""
    if row.get(MARGIN) is not None:
        amount = as_number(row[MARGIN])
        if amount is None or not 0 <= amount < math.inf:
            raise RowError("scores", f"{MARGIN} must be a number from 0, found {repr(row[MARGIN])[:60]}")
        return float(amount)
    for name in SCORES:
        high, low = (as_number(row.get(name.format(side))) for side in SIDES)
        if high is not None and low is not None and math.isfinite(high - low):
            return float(high - low)
    return None


def as_number(value) -> float | None:
    """A number, which may be written as text; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value.strip()):
        return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def preference(row: dict, allow_empty_user: bool) -> dict:
    """A prompt and two replies: strings, or messages, with the prompt in its own field or at the start of both."""
    chosen, rejected = required(row, "chosen"), required(row, "rejected")
    refuse_mixed("chosen", chosen, "rejected", rejected)
    refuse_reversed(row)
    if isinstance(chosen, str):
        chosen_row, rejected_row = (prompt_and(row, key, allow_empty_user) for key in ("chosen", "rejected"))
        return _check_signal(chosen_row | rejected_row)
    sides = [read_messages(row[key], key, allow_empty_user) for key in ("chosen", "rejected")]
    prompt, sides = _shared_prompt(row.get("prompt"), sides, allow_empty_user)
    check_prompt(prompt, "prompt")
    replies = [check_one_reply(side, key) for side, key in zip(sides, ("chosen", "rejected"), strict=True)]
    return _check_signal({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]})


def chosen(row: dict, allow_empty_user: bool) -> dict:
    """The chosen answer of a pair, after its prompt, for `sft`: a conversation, or prompt and completion."""
    answer, prompt = required(row, "chosen"), row.get("prompt")
    row.get("rejected")  # of no use here, and known
    refuse_reversed(row)
    if isinstance(answer, list):
        turns = read_messages(answer, "chosen", allow_empty_user)
        before = read_messages(prompt, "prompt", allow_empty_user) if isinstance(prompt, list) else []
        turns = turns if turns[: len(before)] == before else before + turns
        return {"messages": check_conversation(turns, "chosen")}
    if form_of(whole := prompt + answer if isinstance(prompt, str) and not form_of(answer) else answer):
        return {"messages": check_conversation(read_transcript(whole, "chosen", allow_empty_user), "chosen")}
    pair = prompt_and(row, "chosen", allow_empty_user)
    return {"prompt": pair["prompt"], "completion": pair["chosen"]}


def _shared_prompt(prompt, sides: list[list[dict]], allow_empty_user: bool) -> tuple[list, list]:
    """(prompt, sides without it). A prompt that is a string must be a message of both sides."""
    if isinstance(prompt, list):
        turns = read_messages(prompt, "prompt", allow_empty_user)
        return turns, [side[len(turns) :] if side[: len(turns)] == turns else side for side in sides]
    before = sides[0][:-1]
    if prompt is not None and not any(turn == {"role": "user", "content": prompt} for turn in before):
        raise RowError("mixed_types", f"prompt is {json_kind(prompt)} while chosen is a list without it")
    if before != sides[1][:-1]:
        raise RowError("prompt_mismatch", "chosen and rejected: prompts differ before the last reply")
    if not before:
        raise RowError("missing_field", "missing field prompt: chosen and rejected hold only the reply")
    return before, [side[-1:] for side in sides]


def _check_signal(row: dict) -> dict:
    """The row. Raises RowError where its two sides differ in outer white space only."""
    chosen, rejected = (spoken(row[key]) for key in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise RowError("no_signal", "chosen equals rejected: no signal")
    return row


def kto(row: dict, allow_empty_user: bool) -> dict:
    """Prompt, completion and a boolean label; strings are refused, as bool("false") is True."""
    pair, label = prompt_and(row, "completion", allow_empty_user), row.get("label")
    if not isinstance(label, bool):
        shown = "none" if "label" not in row else repr(label)
        raise RowError("bad_label", f"label must be true or false, found {shown[:40]}")
    return pair | {"label": label}


def choices(row: dict, allow_empty_user: bool) -> dict:
    """A question, two or more different choices, and the index of the right one."""
    question, answer = visible_text(required(row, "question"), "question"), row.get("answer")
    if row.get("choices") is None and isinstance(answer, str):
        hint = "prepare.answers reads questions whose answer is text"
        raise RowError("missing_field", f"missing field choices; hint: {hint}")
    choices = required(row, "choices")
    if not isinstance(choices, list):
        raise RowError("bad_choices", f"choices must be a list, found {json_kind(choices)}")
    choices = [visible_text(choice, f"choices[{i}]", "bad_choices") for i, choice in enumerate(choices)]
    if len(choices) < 2 or len({choice.strip() for choice in choices}) < len(choices):
        shown = f"{len(choices)}{' with repeats' if len(choices) > 1 else ''}"
        raise RowError("bad_choices", f"choices must be 2 or more, all different; found {shown}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        allowed, shown = f"from 0 to {len(choices) - 1}", repr(answer)[:60]
        raise RowError("bad_answer", f"answer must be an index in range, {allowed}, found {shown}")
    return {"question": question, "choices": choices, "answer": answer}


def answers(row: dict, allow_empty_user: bool) -> dict:
    """A question, its answer as text and, where this is what follows `####`, the whole `solution` (as in GSM8K)."""
    question = visible_text(required(row, "question"), "question")
    whole = visible_text(required(row, "answer"), "answer", "bad_answer")
    if row.get("choices") is not None:
        raise RowError("bad_answer", "the row has choices: prepare.choices reads it")
    answer = visible_text(whole.rpartition("####")[2], "answer after ####", "bad_answer").strip()
    if re.fullmatch("[A-J]", answer):
        raise RowError("bad_answer", f"answer {answer!r} is the letter of a choice: prepare.choices reads choices")
    return {"question": question, "answer": answer} | ({"solution": whole} if "####" in whole else {})
