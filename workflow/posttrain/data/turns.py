"""What a turn of a conversation says beside its text: whether it is trained, its tool calls and its reasoning; and the
tools of a conversation. All of it reaches the chat template in one form."""

import json

from posttrain.data.lines import RowError, json_kind

TRAINED = ("train", "weight", "loss")  # keys that say whether a turn is trained (Axolotl, OpenAI, ms-swift)
READ = {"role", "content", "from", "value", "tool_calls", "function_call", "reasoning_content", *TRAINED}
CALLS = ("function_call", "tool_call")  # ShareGPT's names of a turn that is a call
OF_A_RESULT = ("tool_call_id", "name")  # keys of a tool's turn


def more_of(item: dict, where: str, role: str) -> dict:
    """The keys of a turn beside role and text: `train` (only where false), `tool_calls`, `reasoning_content`, and of a
    tool's turn the call that it answers. Raises RowError."""
    more: dict = {} if is_trained(item, where, role) else {"train": False}
    if calls := item.get("tool_calls") or [call for call in [item.get("function_call")] if call]:
        if role != "assistant":
            raise RowError("tool_calls", f"{where} is a {role} turn and calls a tool; only an assistant's turn can")
        calls = parsed(calls) if isinstance(calls, str) else calls
        calls = [calls] if isinstance(calls, dict) else calls
        if not isinstance(calls, list):
            raise RowError("tool_calls", f"{where}.tool_calls must be a list, found {json_kind(calls)}")
        more["tool_calls"] = [tool_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
    reasoning = item.get("reasoning_content")
    if reasoning and role == "assistant":
        if not isinstance(reasoning, str):
            kind = json_kind(reasoning)
            raise RowError("not_a_string", f"{where}.reasoning_content must be a string, found {kind}")
        more["reasoning_content"] = reasoning
    if role == "tool":
        more |= {key: item[key] for key in OF_A_RESULT if isinstance(item.get(key), str)}
    return more


def is_trained(item: dict, where: str, role: str) -> bool:
    """Whether a turn is trained: not where `train` or `loss` is false or `weight` is 0. Raises RowError for others."""
    given = {key: item[key] for key in TRAINED if item.get(key) is not None}
    for key, value in given.items():
        allowed = (0, 1) if key == "weight" else (False, True)
        if isinstance(value, bool) != isinstance(allowed[0], bool) or value not in allowed:
            words = "0 or 1" if key == "weight" else "true or false"
            raise RowError("turn_weight", f"{where}.{key} must be {words}, found {value!r}")
        if value is True and role != "assistant":
            raise RowError("turn_weight", f"{where}.{key} is true: of a {role} turn nothing can be trained")
    return all(given.values()) or role != "assistant"


def tool_call(call, where: str) -> dict:
    """A call as chat templates read it: `function` with its name and its arguments as an object. Raises RowError."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError("tool_calls", f"{where} must be an object with the name of a function")
    arguments = function.get("arguments")
    arguments = parsed(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        kind = json_kind(arguments) if arguments is not None else "none, or text that is not JSON"
        raise RowError("tool_calls", f"{where}.arguments must be an object, found {kind}")
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **kept, "function": {"name": function["name"], "arguments": arguments}}


def tools_of(row: dict) -> list[dict]:
    """The tools that a conversation may call, which may be a list or JSON text of one. Raises RowError."""
    tools = row.get("tools")
    tools = parsed(tools) if isinstance(tools, str) and tools.strip() else tools
    if tools is None or tools == "" or tools == []:
        if isinstance(row.get("tools"), str) and row["tools"].strip() not in ("", "[]", "null"):
            raise RowError("tools", "tools is text that is not JSON")
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool_name(tool) for tool in tools):
        raise RowError("tools", "tools must be a list of objects, each with the name of a function")
    return tools


def tool_name(tool: dict) -> str:
    """The name of a tool; empty where it has none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def parsed(text: str):
    """The value of JSON text; None where it is not JSON. An empty text is an object without keys."""
    try:
        return json.loads(text) if text.strip() else {}
    except ValueError:
        return None


def unread(key: str, value) -> set[str]:
    """The keys of the turns in a list of messages that nothing reads, as `messages[].key`."""
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    if all(turn.keys() <= READ for turn in turns):
        return set()
    names = {
        name for turn in turns for name, part in turn.items()
        if part not in (None, "", [], {}) and name not in READ and not (name in OF_A_RESULT and is_result(turn))
    }  # fmt: skip
    return {f"{key}[].{name}" for name in names if {"role", "from"} & set().union(*turns)}


def is_result(turn: dict) -> bool:
    """Whether a turn holds what a tool returned."""
    return turn.get("role", turn.get("from")) in ("tool", "observation")
