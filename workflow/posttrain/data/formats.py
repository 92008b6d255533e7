"""Checks one object against one format of the field and gives its content in its task's canonical form."""

import re
from collections import Counter
from difflib import get_close_matches
from itertools import pairwise

from posttrain.data.lines import RowError
from posttrain.data.texts import is_blank, spoken
from posttrain.ground.errors import UserError

# What is read for each task. Where a row fits several, the first is meant.
FORMATS = {
    "text": ("text",),
    "long": ("text",),
    "sft": ("messages", "sharegpt", "instruction", "prompt_completion", "transcript"),
    "preference": ("transcript", "preference"),
    "kto": ("kto",),
    "eval": ("choices",),
}
ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def choose(objects: list[dict], task: str, format: str) -> str:
    """The format asked for, or with "auto" the one that most of the objects (the file's first rows) have.

    Raises UserError for an unknown task, or a format that is not read for it.
    """
    if task not in FORMATS:
        raise UserError(f"task {task!r} is unknown; allowed: {', '.join(FORMATS)}")
    if format not in ("auto", *FORMATS[task]):
        allowed = ", ".join(("auto", *FORMATS[task]))
        raise UserError(f"format {format!r} is not read for task {task}; allowed: {allowed}")
    if format != "auto":
        return format
    seen = Counter(guess(row, task) for row in objects)
    seen.pop(None, None)
    return seen.most_common(1)[0][0] if seen else "messages" if task == "sft" else FORMATS[task][-1]


def guess(row: dict, task: str) -> str | None:
    """The format of the task that the row's keys show, or None."""
    has = {key for key, value in row.items() if value is not None}
    shown = {
        "text": "text" in has,
        "messages": "messages" in has,
        "sharegpt": bool(has & {"conversations", "conversation"}),
        "instruction": {"instruction", "output"} <= has,
        "prompt_completion": {"prompt", "completion"} <= has,
        "transcript": any(_is_transcript(row.get(key)) for key in ("transcript", "text", "chosen", "prompt")),
        "preference": {"chosen", "rejected"} <= has,
        "kto": {"completion", "label"} <= has,
        "choices": "choices" in has,
    }
    return next((format for format in FORMATS[task] if shown[format]), None)


def check_row(row: dict, task: str, format: str, allow_empty_user: bool = False) -> dict:
    """The row's content in canonical form. Raises RowError, naming the first defect and where it is.

    What a prompt's answer should be (`answer`, a string) stays with it, for rewards written by hand.
    """
    made = _checked_row(row, task, format, allow_empty_user)
    answer = row.get("answer")
    if task in ("sft", "preference") and isinstance(answer, str) and answer not in ("", made.get("completion")):
        made["answer"] = answer
    return made


def _checked_row(row: dict, task: str, format: str, allow_empty_user: bool) -> dict:
    """The row in canonical form."""
    try:
        match format:
            case "text":
                return {"text": _text(_field(row, "text"), "text")}
            case "messages" | "sharegpt":
                return {"messages": _conversation(row, format, allow_empty_user)}
            case "instruction":
                return {"messages": _instruction(row, allow_empty_user)}
            case "prompt_completion":
                return _prompt_completion(row, allow_empty_user)
            case "transcript" if task == "sft":
                text = row.get("transcript") or _field(row, "text")
                return {"messages": _check_reply(_transcript(text, "text", allow_empty_user), "text")}
            case "transcript":
                return _transcript_pair(row, allow_empty_user)
            case "preference":
                return _preference(row, allow_empty_user)
            case "kto":
                return _kto(row, allow_empty_user)
            case "choices":
                return _choices(row)
    except RowError as error:
        other = guess(row, task)
        if error.reason in ("missing_field", "not_a_transcript") and other not in (None, format):
            hint = f"hint: this row looks like {other}, not {format}"
            raise RowError(error.reason, f"{error}; {hint}") from None
        raise
    raise ValueError(format)


def kind(value) -> str:
    """What JSON calls the value."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def _field(row: dict, name: str):
    """The field's value. Raises RowError where it is absent or null, naming a key that was perhaps meant."""
    if row.get(name) is not None:
        return row[name]
    near = get_close_matches(name, [key for key in row if isinstance(key, str) and key != name], 1, 0.75)
    found = f"hint: did you mean {near[0]!r}" if near else f"keys found: {', '.join(map(str, row)) or 'none'}"
    raise RowError("missing_field", f"missing field {name}; {found}")


def _text(value, where: str, reason: str = "empty_text") -> str:
    """The value, a string in which something can be seen. Raises RowError."""
    if not isinstance(value, str):
        raise RowError("not_a_string", f"{where} must be a string, found {kind(value)}")
    if is_blank(value):
        raise RowError(reason, f"{where} empty" if reason == "empty_user" else f"{where} is empty")
    return value


def _asked(value, where: str, allow_empty_user: bool) -> str:
    """What a user says, which may be empty only where that is allowed. Raises RowError."""
    if allow_empty_user and isinstance(value, str):
        return value
    return _text(value, where, "empty_user")


def _messages(value, where: str, allow_empty_user: bool, roles: dict[str, str] = ROLES) -> list[dict]:
    """The value as a list of messages with role and content. Raises RowError."""
    if not isinstance(value, list):
        hint = "; hint: JSON text inside a string" if isinstance(value, str) and value[:1] in "[{" else ""
        raise RowError("not_a_list", f"{where} must be a list, found {kind(value)}{hint}")
    if not value:
        raise RowError("empty_messages", f"{where} is empty")
    return [_message(item, f"{where}[{i}]", allow_empty_user, roles) for i, item in enumerate(value)]


def _message(item, where: str, allow_empty_user: bool, roles: dict[str, str]) -> dict:
    """One message in canonical form; also ShareGPT's from and value. Raises RowError."""
    if not isinstance(item, dict):
        raise RowError("not_an_object", f"{where} must be an object, found {kind(item)}")
    if item.get("tool_calls") or item.get("function_call"):
        lost = "only role and content are kept, so the call would be lost"
        raise RowError("tool_calls", f"{where} calls a tool; {lost}")
    keys = ("from", "value") if item.get("role") is None and "from" in item else ("role", "content")
    role = item.get(keys[0])
    if not isinstance(role, str) or role not in roles:
        found, allowed = repr(role)[:60], ", ".join(roles)
        raise RowError("unknown_role", f"{where}.{keys[0]}: unknown role {found}; allowed: {allowed}")
    content, where = item.get(keys[1]), f"{where}.{keys[1]}"
    if not isinstance(content, str):
        raise RowError("not_a_string", f"{where} must be a string, found {kind(content)}")
    if roles[role] == "assistant" and is_blank(content):
        raise RowError("empty_reply", f"empty assistant turn: {where}")
    if roles[role] == "user":
        _asked(content, where.rpartition(".")[0], allow_empty_user)
    return {"role": roles[role], "content": content}


def _check_order(turns: list[dict], where: str) -> list[dict]:
    """The turns: one system turn at most, first; then a user; user and assistant never twice in a row."""
    roles = [turn["role"] for turn in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if "system" in talk:
        at = len(roles) - len(talk) + talk.index("system")
        raise RowError("turn_order", f"{where}[{at}]: a system turn must be the only one and come first")
    if not talk or talk[0] != "user":
        found = talk[0] if talk else "none"
        raise RowError("turn_order", f"{where}: first non-system turn must be user, found {found}")
    for i, (before, role) in enumerate(pairwise(roles), 1):
        if role == before != "tool":
            raise RowError("repeated_role", f"{where}[{i}]: two {role} turns in a row")
    return turns


def _check_reply(turns: list[dict], where: str) -> list[dict]:
    """The turns, in order and ending in a reply: a last user turn would be trained on as nothing."""
    _check_order(turns, where)
    if turns[-1]["role"] != "assistant":
        raise RowError("no_reply", f"{where}: last turn must be assistant, found {turns[-1]['role']}")
    return turns


def _check_prompt(turns: list[dict], where: str) -> list[dict]:
    """The turns, in order and waiting for a reply."""
    _check_order(turns, where)
    if turns[-1]["role"] == "assistant":
        raise RowError("turn_order", f"{where}: before the reply there must be a user or tool turn")
    return turns


def _conversation(row: dict, format: str, allow_empty_user: bool) -> list[dict]:
    """The messages of a chat row; ShareGPT may keep its system prompt beside them."""
    if format == "messages":
        turns = _messages(_field(row, "messages"), "messages", allow_empty_user)
        return _check_reply(turns, "messages")
    where = "conversation" if row.get("conversations") is None and "conversation" in row else "conversations"
    turns = _messages(_field(row, where), where, allow_empty_user, SHAREGPT_ROLES)
    return _check_reply(_system(row) + turns, where)


def _system(row: dict) -> list[dict]:
    """A system turn from the row's own field, if it says anything."""
    said = row.get("system")
    return [] if said is None or said == "" else [{"role": "system", "content": _text(said, "system")}]


def _instruction(row: dict, allow_empty_user: bool) -> list[dict]:
    """Instruction, blank line, input; then the output as the reply."""
    asked = _asked(_field(row, "instruction"), "instruction", allow_empty_user)
    more = row.get("input")
    if more is not None and not isinstance(more, str):
        raise RowError("not_a_string", f"input must be a string, found {kind(more)}")
    if more and not is_blank(more):
        asked = f"{asked}\n\n{more}"
    reply = _text(_field(row, "output"), "output", "empty_reply")
    return [*_system(row), {"role": "user", "content": asked}, {"role": "assistant", "content": reply}]


def _prompt_completion(row: dict, allow_empty_user: bool) -> dict:
    """Two strings stay strings, two lists of messages become one conversation.

    Raises RowError for a completion that is labelled as unwanted (a row for `kto`): it would be imitated.
    """
    if row.get("label") is False:
        raise RowError("label_false", "label is false: an unwanted completion, which sft would imitate; kto reads it")
    pair = _prompt_and(row, "completion", allow_empty_user)
    return pair if isinstance(pair["prompt"], str) else {"messages": pair["prompt"] + pair["completion"]}


def _prompt_and(row: dict, key: str, allow_empty_user: bool) -> dict:
    """The prompt and the reply under `key`: both strings or both lists."""
    prompt, reply = _field(row, "prompt"), _field(row, key)
    _check_same("prompt", prompt, key, reply)
    if isinstance(prompt, str):
        return {"prompt": _asked(prompt, "prompt", allow_empty_user), key: _text(reply, key, "empty_reply")}
    prompt = _check_prompt(_messages(prompt, "prompt", allow_empty_user), "prompt")
    return {"prompt": prompt, key: _one_reply(_messages(reply, key, allow_empty_user), key)}


def _check_same(one: str, value, other: str, value2) -> None:
    """Raise RowError unless both are strings or both are lists."""
    for name, found in ((one, value), (other, value2)):
        if not isinstance(found, str | list):
            said = f"{name} must be a string or a list of messages, found {kind(found)}"
            raise RowError("not_a_string", said)
    if type(value) is not type(value2):
        raise RowError("mixed_types", f"{one} is {kind(value)} while {other} is {kind(value2)}")


def _one_reply(turns: list[dict], where: str) -> list[dict]:
    """The turns, if they are a single assistant turn. Raises RowError."""
    if [turn["role"] for turn in turns] != ["assistant"]:
        found = ", ".join(turn["role"] for turn in turns) or "none"
        raise RowError("turn_order", f"{where} must be one assistant turn after the prompt, found {found}")
    return turns


def _preference(row: dict, allow_empty_user: bool) -> dict:
    """Prompt and two replies: strings, or messages with the prompt in its own field or before both."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    _check_same("chosen", chosen, "rejected", rejected)
    if isinstance(chosen, str):
        chosen_row, rejected_row = (_prompt_and(row, key, allow_empty_user) for key in ("chosen", "rejected"))
        return _check_signal(chosen_row | rejected_row)
    sides = [_messages(row[key], key, allow_empty_user) for key in ("chosen", "rejected")]
    prompt, sides = _shared_prompt(row.get("prompt"), sides, allow_empty_user)
    _check_prompt(prompt, "prompt")
    replies = [_one_reply(side, key) for side, key in zip(sides, ("chosen", "rejected"), strict=True)]
    return _check_signal({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]})


def _shared_prompt(prompt, sides: list[list[dict]], allow_empty_user: bool) -> tuple[list, list]:
    """(prompt, sides without it). A prompt as a string must be what both sides repeat as messages."""
    if isinstance(prompt, list):
        turns = _messages(prompt, "prompt", allow_empty_user)
        return turns, [side[len(turns) :] if side[: len(turns)] == turns else side for side in sides]
    before = sides[0][:-1]
    if prompt is not None and not any(turn == {"role": "user", "content": prompt} for turn in before):
        raise RowError("mixed_types", f"prompt is {kind(prompt)} while chosen is a list without it")
    if before != sides[1][:-1]:
        raise RowError("prompt_mismatch", "chosen and rejected: prompts differ before the last reply")
    if not before:
        raise RowError("missing_field", "missing field prompt: chosen and rejected hold only the reply")
    return before, [side[-1:] for side in sides]


def _check_signal(row: dict) -> dict:
    """The row, if its two sides differ in more than outer white space. Raises RowError."""
    chosen, rejected = (spoken(row[key]) for key in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise RowError("no_signal", "chosen equals rejected: no signal")
    return row


def _is_transcript(value) -> bool:
    return isinstance(value, str) and re.match(r"\s*Human:", value) is not None


def _transcript(text, where: str, allow_empty_user: bool) -> list[dict]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", without outer white space. Raises RowError."""
    if not isinstance(text, str):
        raise RowError("mixed_types", f"{where} is {kind(text)} while the file holds transcripts")
    lead, *parts = TURN.split(text)
    if lead.strip() or not parts:
        raise RowError("not_a_transcript", f"{where} must begin with Human: or Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    said = [
        {"role": roles[role], "content": content.strip()} for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return _messages(said, where, allow_empty_user)


def _transcript_pair(row: dict, allow_empty_user: bool) -> dict:
    """Two transcripts that differ in their last reply only; a prompt field is put before both."""
    sides = {key: _field(row, key) for key in ("chosen", "rejected")}
    _check_same("chosen", sides["chosen"], "rejected", sides["rejected"])
    if isinstance(sides["chosen"], list):
        raise RowError("mixed_types", "chosen and rejected are lists while the file holds transcripts")
    if isinstance(row.get("prompt"), str) and not _is_transcript(sides["chosen"]):
        sides = {key: row["prompt"] + side for key, side in sides.items()}
    if sides["chosen"].strip() == sides["rejected"].strip():
        raise RowError("no_signal", "chosen equals rejected: no signal")
    turns = {key: _check_reply(_transcript(side, key, allow_empty_user), key) for key, side in sides.items()}
    prompt, replies = _shared_prompt(None, list(turns.values()), allow_empty_user)
    return _check_signal({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]})


def _kto(row: dict, allow_empty_user: bool) -> dict:
    """Prompt, completion and a label that is really true or false: bool("false") is True."""
    pair, label = _prompt_and(row, "completion", allow_empty_user), row.get("label")
    if not isinstance(label, bool):
        found = "none" if "label" not in row else repr(label)
        raise RowError("bad_label", f"label must be true or false, found {found[:40]}")
    return pair | {"label": label}


def _choices(row: dict) -> dict:
    """A question, two or more different choices, and the index of the right one. Raises RowError."""
    question = _text(_field(row, "question"), "question")
    choices, answer = _field(row, "choices"), row.get("answer")
    if not isinstance(choices, list):
        raise RowError("bad_choices", f"choices must be a list, found {kind(choices)}")
    choices = [_text(choice, f"choices[{i}]", "bad_choices") for i, choice in enumerate(choices)]
    if len(choices) < 2 or len({choice.strip() for choice in choices}) < len(choices):
        found = f"{len(choices)}{' with repeats' if len(choices) > 1 else ''}"
        raise RowError("bad_choices", f"choices must be 2 or more, all different; found {found}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        allowed, found = f"from 0 to {len(choices) - 1}", repr(answer)[:60]
        raise RowError("bad_answer", f"answer must be an index in range, {allowed}, found {found}")
    return {"question": question, "choices": choices, "answer": answer}
