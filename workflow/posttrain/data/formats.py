"""Check an object against a row format, and convert its content to the canonical form of its task."""

from collections import Counter
from collections.abc import Callable

from posttrain.data.fields import json_kind, refuse_mixed, required, user_text, visible_text
from posttrain.data.lines import RowError
from posttrain.data.texts import is_blank, spoken
from posttrain.data.turns import (
    SHAREGPT_ROLES,
    check_conversation,
    check_one_reply,
    check_prompt,
    is_transcript,
    read_messages,
    read_transcript,
)
from posttrain.ground.errors import UserError

# The formats of each task. A row that fits several has the first of them.
FORMATS = {
    "text": ("text",),
    "long": ("text",),
    "sft": ("messages", "sharegpt", "instruction", "prompt_completion", "transcript"),
    "preference": ("transcript", "preference"),
    "kto": ("kto",),
    "eval": ("choices",),
}


def choose(objects: list[dict], task: str, format: str) -> str:
    """The configured format; for "auto", the one that most of the objects (the file's first rows) have.

    Raises UserError for an unknown task and for a format that the task does not have.
    """
    if task not in FORMATS:
        raise UserError(f"task {task!r} is unknown; allowed: {', '.join(FORMATS)}")
    if format not in ("auto", *FORMATS[task]):
        allowed = ", ".join(("auto", *FORMATS[task]))
        raise UserError(f"format {format!r} is not read for task {task}; allowed: {allowed}")
    if format != "auto":
        return format
    guesses = Counter(filter(None, (guess(row, task) for row in objects)))
    return guesses.most_common(1)[0][0] if guesses else "messages" if task == "sft" else FORMATS[task][-1]


def guess(row: dict, task: str) -> str | None:
    """The task's format that fits the row's keys, or None."""
    keys = {key for key, value in row.items() if value is not None}
    fits = {
        "text": "text" in keys,
        "messages": "messages" in keys,
        "sharegpt": bool(keys & {"conversations", "conversation"}),
        "instruction": {"instruction", "output"} <= keys,
        "prompt_completion": {"prompt", "completion"} <= keys,
        "transcript": any(is_transcript(row.get(key)) for key in ("transcript", "text", "chosen", "prompt")),
        "preference": {"chosen", "rejected"} <= keys,
        "kto": {"completion", "label"} <= keys,
        "choices": "choices" in keys,
    }
    return next((format for format in FORMATS[task] if fits[format]), None)


def check_row(row: dict, task: str, format: str, allow_empty_user: bool = False) -> dict:
    """The row's content in canonical form. Raises RowError, naming the first defect and its place.

    The expected answer to a prompt (`answer`, a string) is kept for hand-written rewards.
    """
    check = _transcript_pair if (task, format) == ("preference", "transcript") else CHECKS[format]
    try:
        content = check(row, allow_empty_user)
    except RowError as error:
        other = guess(row, task)
        if error.reason in ("missing_field", "not_a_transcript") and other not in (None, format):
            hint = f"hint: this row looks like {other}, not {format}"
            raise RowError(error.reason, f"{error}; {hint}") from None
        raise
    answer = row.get("answer")
    if task in ("sft", "preference") and isinstance(answer, str) and answer not in ("", content.get("completion")):
        content["answer"] = answer
    return content


# One function for each format. Each returns the row's content in canonical form, or raises RowError.


def _text(row: dict, allow_empty_user: bool) -> dict:
    """A document."""
    return {"text": visible_text(required(row, "text"), "text")}


def _messages(row: dict, allow_empty_user: bool) -> dict:
    """A conversation in OpenAI's format."""
    turns = read_messages(required(row, "messages"), "messages", allow_empty_user)
    return {"messages": check_conversation(turns, "messages")}


def _sharegpt(row: dict, allow_empty_user: bool) -> dict:
    """A conversation in ShareGPT's format; the system prompt may be a field of its own."""
    where = "conversation" if row.get("conversations") is None and "conversation" in row else "conversations"
    turns = read_messages(required(row, where), where, allow_empty_user, SHAREGPT_ROLES)
    return {"messages": check_conversation(_system(row) + turns, where)}


def _system(row: dict) -> list[dict]:
    """A list with the system turn from the row's field `system`; empty where the field is."""
    prompt = row.get("system")
    return [] if prompt is None or prompt == "" else [{"role": "system", "content": visible_text(prompt, "system")}]


def _instruction(row: dict, allow_empty_user: bool) -> dict:
    """A prompt of instruction, blank line and input, with the output as the reply."""
    prompt = user_text(required(row, "instruction"), "instruction", allow_empty_user)
    more = row.get("input")
    if more is not None and not isinstance(more, str):
        raise RowError("not_a_string", f"input must be a string, found {json_kind(more)}")
    if more and not is_blank(more):
        prompt = f"{prompt}\n\n{more}"
    reply = visible_text(required(row, "output"), "output", "empty_reply")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return {"messages": [*_system(row), *turns]}


def _prompt_completion(row: dict, allow_empty_user: bool) -> dict:
    """Two strings stay strings; two lists of messages become one conversation.

    A completion labelled as unwanted (a row for `kto`) is an error: SFT would imitate it.
    """
    if row.get("label") is False:
        raise RowError("label_false", "label is false: an unwanted completion, which sft would imitate; kto reads it")
    pair = _prompt_and(row, "completion", allow_empty_user)
    return pair if isinstance(pair["prompt"], str) else {"messages": pair["prompt"] + pair["completion"]}


def _prompt_and(row: dict, key: str, allow_empty_user: bool) -> dict:
    """The prompt and the reply under `key`: both strings or both lists of messages."""
    prompt, reply = required(row, "prompt"), required(row, key)
    refuse_mixed("prompt", prompt, key, reply)
    if isinstance(prompt, str):
        return {
            "prompt": user_text(prompt, "prompt", allow_empty_user),
            key: visible_text(reply, key, "empty_reply"),
        }
    prompt = check_prompt(read_messages(prompt, "prompt", allow_empty_user), "prompt")
    return {"prompt": prompt, key: check_one_reply(read_messages(reply, key, allow_empty_user), key)}


def _transcript(row: dict, allow_empty_user: bool) -> dict:
    """A conversation as one text."""
    text = row.get("transcript") or required(row, "text")
    return {"messages": check_conversation(read_transcript(text, "text", allow_empty_user), "text")}


def _transcript_pair(row: dict, allow_empty_user: bool) -> dict:
    """Two transcripts that differ in their last reply only; the field `prompt` is put before both."""
    sides = {key: required(row, key) for key in ("chosen", "rejected")}
    refuse_mixed("chosen", sides["chosen"], "rejected", sides["rejected"])
    if isinstance(sides["chosen"], list):
        raise RowError("mixed_types", "chosen and rejected are lists while the file holds transcripts")
    if isinstance(row.get("prompt"), str) and not is_transcript(sides["chosen"]):
        sides = {key: row["prompt"] + side for key, side in sides.items()}
    if sides["chosen"].strip() == sides["rejected"].strip():
        raise RowError("no_signal", "chosen equals rejected: no signal")
    turns = {key: check_conversation(read_transcript(side, key, allow_empty_user), key) for key, side in sides.items()}
    prompt, replies = _shared_prompt(None, list(turns.values()), allow_empty_user)
    return _check_signal({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]})


def _preference(row: dict, allow_empty_user: bool) -> dict:
    """A prompt and two replies: strings, or messages, with the prompt in its own field or at the start of both."""
    chosen, rejected = required(row, "chosen"), required(row, "rejected")
    refuse_mixed("chosen", chosen, "rejected", rejected)
    if isinstance(chosen, str):
        chosen_row, rejected_row = (_prompt_and(row, key, allow_empty_user) for key in ("chosen", "rejected"))
        return _check_signal(chosen_row | rejected_row)
    sides = [read_messages(row[key], key, allow_empty_user) for key in ("chosen", "rejected")]
    prompt, sides = _shared_prompt(row.get("prompt"), sides, allow_empty_user)
    check_prompt(prompt, "prompt")
    replies = [check_one_reply(side, key) for side, key in zip(sides, ("chosen", "rejected"), strict=True)]
    return _check_signal({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]})


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


def _kto(row: dict, allow_empty_user: bool) -> dict:
    """Prompt, completion and a boolean label; strings are refused, as bool("false") is True."""
    pair, label = _prompt_and(row, "completion", allow_empty_user), row.get("label")
    if not isinstance(label, bool):
        shown = "none" if "label" not in row else repr(label)
        raise RowError("bad_label", f"label must be true or false, found {shown[:40]}")
    return pair | {"label": label}


def _choices(row: dict, allow_empty_user: bool) -> dict:
    """A question, two or more different choices, and the index of the right one."""
    question = visible_text(required(row, "question"), "question")
    choices, answer = required(row, "choices"), row.get("answer")
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


CHECKS: dict[str, Callable[[dict, bool], dict]] = {
    "text": _text,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "instruction": _instruction,
    "prompt_completion": _prompt_completion,
    "transcript": _transcript,
    "preference": _preference,
    "kto": _kto,
    "choices": _choices,
}
