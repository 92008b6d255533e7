"""What a chat template writes of a conversation, and what of it the template leaves out or changes.

A row that the template cannot write, or changes, is a `Breach` of the token contract.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from posttrain.ground.errors import UserError
from posttrain.models.control import tokenize

SYSTEM = "; `prepare.system_turns: user` puts the system turn's text into the first user turn"
SPLIT = "; `prepare.conversations: split` makes a row of each reply, after the turns before it"


class Chat(NamedTuple):
    """Messages of a row that the chat template is to write. is_prompt: whether the beginning of the assistant's turn
    follows them."""

    row: dict
    messages: list[dict]
    is_prompt: bool = False


class Breach(UserError):
    """A row that breaks the token contract. `reason` is a short key, by which such rows are counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def row_name(row: dict) -> str:
    """A row's id and source, for messages."""
    return f"{row['id']} ({row['source']})" if "source" in row else row["id"]


def write(tokenizer, row: dict, messages: list[dict], prompt: bool = False, **options) -> str:
    """The text of a conversation by the chat template. prompt: whether to add the beginning of the assistant's turn;
    options: further ones of `apply_chat_template`. Raises Breach where the template raises an error."""
    try:
        options |= {"tools": row["tools"]} if "tools" in row else {}
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)
    except Exception as error:  # a template is a program of the user's; it can raise anything
        way_out = SYSTEM if messages[0]["role"] == "system" else ""
        message = f"chat template: row {row_name(row)}: {type(error).__name__}: {error}{way_out}"
        raise Breach("chat_template", message) from None


def write_all(tokenizer, chats: Sequence[Chat]) -> list[str | Breach]:
    """The text of each chat, or the Breach in its place; those without tools are written in one call, which takes less
    time a text."""
    texts: list[str | Breach] = [""] * len(chats)
    for is_prompt in (False, True):
        places = [n for n, chat in enumerate(chats) if chat.is_prompt == is_prompt and "tools" not in chat.row]
        for place, text in zip(places, _written(tokenizer, [chats[n] for n in places], is_prompt), strict=True):
            texts[place] = text
    for place, chat in enumerate(chats):
        if "tools" in chat.row:
            texts[place] = _text_or_breach(tokenizer, chat)
    return texts


def _written(tokenizer, chats: list[Chat], is_prompt: bool) -> Sequence[str | Breach]:
    """The text of each chat, all of them prompts or none; where the template raises an error, each is written alone."""
    if not chats:
        return []
    try:
        messages = [chat.messages for chat in chats]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
    except Exception:  # a template is a program of the user's; it can raise anything
        return [_text_or_breach(tokenizer, chat) for chat in chats]


def _text_or_breach(tokenizer, chat: Chat) -> str | Breach:
    try:
        return write(tokenizer, chat.row, chat.messages, chat.is_prompt)
    except Breach as fault:
        return fault


def breach(reason: str, row: dict, fault: str) -> Breach:
    """The error of a row that breaks the token contract."""
    return Breach(reason, f"token contract: row {row_name(row)}: {fault}")


def refuse_lost(tokenizer, row: dict, text: str) -> None:
    """Raise Breach where the chat template leaves out a tool, or a turn: with other words its text is the same."""
    messages = row["messages"]
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" and not _holds(text, message["content"]):
            longer = message | {"content": message["content"] + " ..."}
            if write(tokenizer, row, [*messages[:turn], longer, *messages[turn + 1 :]]) == text:
                lost = f"leaves out the {message['role']} turn {message['content'][:60]!r}"
                way_out = SYSTEM if message["role"] == "system" else ""
                raise breach("lost_turn", row, f"the chat template {lost}{way_out}")
    names = [tool.get("function", tool)["name"] for tool in row.get("tools", [])]
    for name in names:
        if not _holds(text, name):
            raise breach(
                "lost_tools", row, f"the chat template leaves out the tool {name!r}; give one that writes tools"
            )


def refuse_other_reply(tokenizer, row: dict, message: dict, written: str) -> None:
    """Raise Breach where the chat template changes the assistant's text, white space aside, or ends it with another
    token than the end-of-turn token."""
    if not _holds(written, message["content"]):
        changed = f"changes the assistant's {message['content'][:60]!r} to {written[:60]!r}"
        raise breach("other_reply", row, f"the chat template {changed}")
    for part in parts_beside_text(message):
        if not any(_holds(written, form) for form in part):
            lost = f"leaves out {part[0][:60]!r} of the assistant's reasoning or tool calls, in {written[:60]!r}"
            raise breach("lost_part", row, f"the chat template {lost}")
    text = message["content"].strip()
    last_line = text.splitlines()[-1].strip() if text and "tool_calls" not in message else ""
    end = written[written.rfind(last_line) + len(last_line) :].lstrip() if last_line else _end_of(tokenizer, written)
    if not end.startswith(tokenizer.eos_token):
        added = tokenizer.added_tokens_decoder
        token = next((added[n].content for n in tokenize(tokenizer, [end])[0] if n in added and added[n].special), None)
        way_out = f"set prepare.end_of_turn: {token!r}" if token else "give another prepare.chat_template"
        ends = f"ends a reply with {token or 'no special token'}, not with the end-of-turn token {tokenizer.eos_token}"
        raise breach("other_end", row, f"the chat template {ends}; {way_out}")


def parts_beside_text(message: dict) -> list[list[str]]:
    """What a chat template must write of an assistant's turn beside its text: its reasoning, and the names, words and
    numbers of its tool calls, each in the forms that it may have, as it is or as in JSON."""
    texts = [message.get("reasoning_content", "")]
    for call in message.get("tool_calls", []):
        texts += [call["function"]["name"], *_words_of(call["function"]["arguments"])]
    return [[text, json.dumps(text, ensure_ascii=False)[1:-1]] for text in texts]


def _words_of(value) -> list[str]:
    """The keys, strings and numbers of a JSON value, as text."""
    if isinstance(value, dict):
        return [word for key, part in value.items() for word in (key, *_words_of(part))]
    if isinstance(value, list):
        return [word for part in value for word in _words_of(part)]
    return [] if value is None or isinstance(value, bool) else [value if isinstance(value, str) else json.dumps(value)]


def _end_of(tokenizer, written: str) -> str:
    """A turn's text from its first end of turn on; from its last special token where it has none."""
    at = written.find(tokenizer.eos_token)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return written[at if at >= 0 else max((written.rfind(token) for token in special), default=len(written)) :]


def _holds(text: str, part: str) -> bool:
    """Whether a text holds a part of it, white space aside."""
    return part in text or "".join(part.split()) in "".join(text.split())
