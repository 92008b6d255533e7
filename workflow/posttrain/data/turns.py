"""Check conversations: lists of messages with role and content, and the order of their roles.

`where`: the field that a RowError names.
"""

import re
from itertools import pairwise

from posttrain.data.fields import json_kind, user_text
from posttrain.data.lines import RowError
from posttrain.data.texts import is_blank

ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


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
    if item.get("tool_calls") or item.get("function_call"):
        lost = "only role and content are kept, so the call would be lost"
        raise RowError("tool_calls", f"{where} calls a tool; {lost}")
    keys = ("from", "value") if item.get("role") is None and "from" in item else ("role", "content")
    role, content = (item.get(key) for key in keys)
    if not isinstance(role, str) or role not in roles:
        shown = repr(role)[:60]
        raise RowError("unknown_role", f"{where}.{keys[0]}: unknown role {shown}; allowed: {', '.join(roles)}")
    if not isinstance(content, str):
        raise RowError("not_a_string", f"{where}.{keys[1]} must be a string, found {json_kind(content)}")
    if roles[role] == "assistant" and is_blank(content):
        raise RowError("empty_reply", f"empty assistant turn: {where}.{keys[1]}")
    if roles[role] == "user":
        user_text(content, where, allow_empty_user)
    return {"role": roles[role], "content": content}


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
    return turns


def is_transcript(value) -> bool:
    """Whether the value is text that begins with `Human:`."""
    return isinstance(value, str) and re.match(r"\s*Human:", value) is not None


def read_transcript(text, where: str, allow_empty_user: bool) -> list[dict]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ...", without outer white space. Raises RowError."""
    if not isinstance(text, str):
        raise RowError("mixed_types", f"{where} is {json_kind(text)} while the file holds transcripts")
    lead, *parts = SPEAKER.split(text)
    if lead.strip() or not parts:
        raise RowError("not_a_transcript", f"{where} must begin with Human: or Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    speeches = zip(parts[::2], parts[1::2], strict=True)
    turns = [{"role": roles[speaker], "content": content.strip()} for speaker, content in speeches]
    return read_messages(turns, where, allow_empty_user)
