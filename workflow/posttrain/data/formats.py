"""Check a document or a conversation, and convert it to canonical form.

A function for each format of the tasks `text`, `long` and `sft`. `where`: the field that a RowError names.
"""

import re
from difflib import get_close_matches
from itertools import pairwise

from posttrain.data.lines import RowError, json_kind
from posttrain.data.texts import is_blank
from posttrain.data.turns import CALLS, more_of

ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
MEDIUM = re.compile("image|video|audio")
SHAREGPT_ROLES |= {"tool_response": "tool", "function_call": "assistant", "tool_call": "assistant"}


def text(row: dict, allow_empty_user: bool) -> dict:
    """A document."""
    return {"text": visible_text(required(row, "text"), "text")}


def messages(row: dict, allow_empty_user: bool) -> dict:
    """A conversation in OpenAI's format."""
    turns = read_messages(required(row, "messages"), "messages", allow_empty_user)
    return {"messages": check_conversation(turns, "messages")}


def sharegpt(row: dict, allow_empty_user: bool) -> dict:
    """A conversation in ShareGPT's format; the system prompt may be a field of its own."""
    where = "conversation" if row.get("conversations") is None and "conversation" in row else "conversations"
    turns = read_messages(required(row, where), where, allow_empty_user, SHAREGPT_ROLES)
    return {"messages": check_conversation(_system(row) + turns, where)}


def _system(row: dict) -> list[dict]:
    """A list with the system turn from the row's field `system`; empty where the field is."""
    prompt = row.get("system")
    return [] if prompt is None or prompt == "" else [{"role": "system", "content": visible_text(prompt, "system")}]


def instruction(row: dict, allow_empty_user: bool) -> dict:
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


def prompt_completion(row: dict, allow_empty_user: bool) -> dict:
    """Two strings stay strings; two lists of messages become one conversation."""
    pair = prompt_and(row, "completion", allow_empty_user)
    return pair if isinstance(pair["prompt"], str) else {"messages": pair["prompt"] + pair["completion"]}


def prompt_and(row: dict, key: str, allow_empty_user: bool) -> dict:
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


def whole_text(row: dict, allow_empty_user: bool) -> dict:
    """A text without a prompt, for `sft`: all of it is trained on."""
    return {"prompt": "", "completion": visible_text(required(row, "text"), "text")}


def required(row: dict, name: str):
    """The field's value. Raises RowError, with the nearest key of the row, where it is absent or null."""
    if row.get(name) is not None:
        return row[name]
    near = get_close_matches(name, [key for key in row if isinstance(key, str) and key != name], 1, 0.75)
    hint = f"hint: did you mean {near[0]!r}" if near else f"keys found: {', '.join(map(str, row)) or 'none'}"
    raise RowError("missing_field", f"missing field {name}; {hint}")


def visible_text(value, where: str, reason: str = "empty_text") -> str:
    """The value, a string that is not blank. Raises RowError, with `reason` for a blank one."""
    if not isinstance(value, str):
        raise RowError("not_a_string", f"{where} must be a string, found {json_kind(value)}")
    if is_blank(value):
        raise RowError(reason, f"{where} empty" if reason == "empty_user" else f"{where} is empty")
    return value


def user_text(value, where: str, allow_empty_user: bool) -> str:
    """The value, the text of a user's turn; blank only where `allow_empty_user`. Raises RowError."""
    if allow_empty_user and isinstance(value, str):
        return value
    return visible_text(value, where, "empty_user")


def refuse_mixed(name: str, value, other_name: str, other) -> None:
    """Raise RowError unless both values are strings or both are lists."""
    for key, item in ((name, value), (other_name, other)):
        if not isinstance(item, str | list):
            raise RowError("not_a_string", f"{key} must be a string or a list of messages, found {json_kind(item)}")
    if type(value) is not type(other):
        raise RowError("mixed_types", f"{name} is {json_kind(value)} while {other_name} is {json_kind(other)}")


def read_messages(value, where: str, allow_empty_user: bool, roles: dict[str, str] = ROLES) -> list[dict]:
    """The value as a list of messages with role and content. roles: name in the data -> role. Raises RowError."""
    if not isinstance(value, list):
        hint = "; hint: JSON text inside a string" if isinstance(value, str) and value[:1] in "[{" else ""
        raise RowError("not_a_list", f"{where} must be a list, found {json_kind(value)}{hint}")
    if not value:
        raise RowError("empty_messages", f"{where} is empty")
    return [_message(item, f"{where}[{i}]", allow_empty_user, roles) for i, item in enumerate(value)]


def _message(item, where: str, allow_empty_user: bool, roles: dict[str, str]) -> dict:
    """One message in canonical form, from `role` and `content` or ShareGPT's `from` and `value`. Raises RowError."""
    if not isinstance(item, dict):
        raise RowError("not_an_object", f"{where} must be an object, found {json_kind(item)}")
    keys = ("from", "value") if item.get("role") is None and "from" in item else ("role", "content")
    role, content = (item.get(key) for key in keys)
    if not isinstance(role, str) or role not in roles:
        shown = repr(role)[:60]
        raise RowError("unknown_role", f"{where}.{keys[0]}: unknown role {shown}; allowed: {', '.join(roles)}")
    if role in CALLS:  # the text is a call, in JSON
        item, content = {key: part for key, part in item.items() if key != keys[1]} | {"tool_calls": content}, None
    more = more_of(item, where, roles[role])
    content = "" if content is None and "tool_calls" in more else content
    if isinstance(content, list):
        refuse_media(content, f"{where}.{keys[1]}")
    if not isinstance(content, str):
        raise RowError("not_a_string", f"{where}.{keys[1]} must be a string, found {json_kind(content)}")
    if roles[role] == "assistant" and is_blank(content) and "tool_calls" not in more:
        raise RowError("empty_reply", f"empty assistant turn: {where}.{keys[1]}")
    if roles[role] == "user":
        user_text(content, where, allow_empty_user)
    return {"role": roles[role], "content": content} | more


def refuse_media(parts: list, where: str) -> None:
    """Raise RowError where a part of a turn is an image, a video or sound, as in OpenAI's format."""
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and (medium := MEDIUM.search(kind)):
            raise RowError("media", f"{where}[{number}] is of type {kind}: rows with {medium[0]} are not trained on")


def check_order(turns: list[dict], where: str) -> list[dict]:
    """The turns. Raises RowError unless a user begins, after at most one system turn, and user and assistant never
    have two turns in a row."""
    roles = [turn["role"] for turn in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if "system" in talk:
        at = len(roles) - len(talk) + talk.index("system")
        raise RowError("turn_order", f"{where}[{at}]: a system turn must be the only one and come first")
    if not talk or talk[0] != "user":
        first = talk[0] if talk else "none"
        raise RowError("turn_order", f"{where}: first non-system turn must be user, found {first}")
    for i, (before, role) in enumerate(pairwise(roles), 1):
        if role == before != "tool":
            raise RowError("repeated_role", f"{where}[{i}]: two {role} turns in a row")
    return turns


def check_conversation(turns: list[dict], where: str) -> list[dict]:
    """The turns, in order and with a reply at the end, as a last user turn would not be trained on."""
    check_order(turns, where)
    if turns[-1]["role"] != "assistant":
        raise RowError("no_reply", f"{where}: last turn must be assistant, found {turns[-1]['role']}")
    return turns


def check_prompt(turns: list[dict], where: str) -> list[dict]:
    """The turns, in order and without a reply at the end."""
    check_order(turns, where)
    if turns[-1]["role"] == "assistant":
        raise RowError("turn_order", f"{where}: before the reply there must be a user or tool turn")
    return turns


def check_one_reply(turns: list[dict], where: str) -> list[dict]:
    """The turns, which must be a single assistant turn. Raises RowError."""
    roles = [turn["role"] for turn in turns]
    if roles != ["assistant"]:
        shown = ", ".join(roles) or "none"
        raise RowError("turn_order", f"{where} must be one assistant turn after the prompt, found {shown}")
    if turns[0].get("train") is False:
        raise RowError("turn_weight", f"{where}: the answer is not to be trained: nothing is left to train on")
    return turns
