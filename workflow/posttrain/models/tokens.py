"""Convert rows to tokens and labels.

A row that the chat template would change, or whose reply has no tokens of its own, is a `Breach` of the token contract;
`token_contract.py` checks the rest of it.
"""

import hashlib
import json
from collections.abc import Iterable

from posttrain.ground.errors import UserError
from posttrain.models.control import plain, shielded, tokenize

MASKED = -100  # label of a token that is not trained on, in PyTorch's cross-entropy
SYSTEM = "; `prepare.system_turns: user` puts the system turn's text into the first user turn"
SPLIT = "; `prepare.conversations: split` makes a row of each reply, after the turns before it"


class Breach(UserError):
    """A row that breaks the token contract. `reason` is a short key, by which such rows are counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def template_digest(tokenizer) -> str | None:
    """sha256 of the chat template, as lm-eval records it."""
    template = tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest() if template else None


def opening(tokenizer) -> int:
    """The token that a text begins with: BOS, else EOS, as in lm-eval's likelihood of a text."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def row_name(row: dict) -> str:
    """A row's id and source, for messages."""
    return f"{row['id']} ({row['source']})" if "source" in row else row["id"]


def form_of(rows: Iterable[dict]) -> str:
    """`chat` where a row is a conversation, which the chat template writes; `plain` where all are plain text."""
    return "chat" if any("messages" in row or isinstance(row.get("prompt"), list) for row in rows) else "plain"


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


def breach(reason: str, row: dict, fault: str) -> Breach:
    """The error of a row that breaks the token contract."""
    return Breach(reason, f"token contract: row {row_name(row)}: {fault}")


def _shared(one: list[int], other: list[int]) -> list[int]:
    """The tokens that both begin with."""
    if other[: len(one)] == one:
        return one
    return one[: next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))]


def encode(tokenizer, row: dict) -> dict[str, list[int]]:
    """`input_ids` of a row, and `labels` that are masked except on the assistant's text.

    A row is a conversation (`messages`) or plain text (`prompt`, `completion`). An assistant's turn is trained up to
    and including its end-of-turn token. Raises Breach where the template is not prefix-preserving or changes the
    assistant's text.
    """
    if "messages" not in row:
        return _encode_plain(tokenizer, row)
    row = shielded(tokenizer, row)
    messages = row["messages"]
    text = write(tokenizer, row, messages)
    _refuse_lost(tokenizer, row, text)
    ids = tokenize(tokenizer, text)
    labels = [MASKED] * len(ids)
    for turn in trained_turns(row):
        whole = (text, ids) if turn + 1 == len(messages) else None
        start, stop = _reply(tokenizer, row, ids, messages[: turn + 1], whole)
        labels[start:stop] = ids[start:stop]
    return {"input_ids": ids, "labels": labels}


def trained_turns(row: dict) -> list[int]:
    """The numbers of the assistant's turns that are trained; at most the last of a row split from a `conversation`."""
    turns = [turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    turns = turns[-1:] if "conversation" in row else turns
    return [turn for turn in turns if row["messages"][turn].get("train", True)]


def _reply(tokenizer, row: dict, ids: list[int], messages: list[dict], whole: tuple | None) -> tuple[int, int]:
    """(start, stop) in `ids` of the tokens of the last of the messages, up to and including its end of turn.

    ids: tokens of a conversation that begins with the messages. A template may write a line break after a turn, and
    more at the end of the whole conversation. whole: text and tokens of the messages, where they are known.
    """
    before = write(tokenizer, row, messages[:-1], prompt=True)
    after = whole[0] if whole else write(tokenizer, row, messages)
    start = _common(tokenizer, ids, tokenize(tokenizer, before), row)
    shorter = whole[1] if whole else tokenize(tokenizer, after)
    _refuse_other_reply(tokenizer, row, messages[-1], after[len(before) :])
    reply = _shared(shorter, ids)[start:]
    if tokenizer.eos_token_id not in reply:
        _common(tokenizer, ids, shorter, row)
    return start, start + len(reply) - reply[::-1].index(tokenizer.eos_token_id)


def _refuse_lost(tokenizer, row: dict, text: str) -> None:
    """Raise Breach where the chat template leaves out a tool, or a turn: with other words its text is the same."""
    messages, words = row["messages"], _without_spaces(text)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" and _without_spaces(message["content"]) not in words:
            longer = message | {"content": message["content"] + " ..."}
            if write(tokenizer, row, [*messages[:turn], longer, *messages[turn + 1 :]]) == text:
                lost = f"leaves out the {message['role']} turn {message['content'][:60]!r}"
                way_out = SYSTEM if message["role"] == "system" else ""
                raise breach("lost_turn", row, f"the chat template {lost}{way_out}")
    names = [tool.get("function", tool)["name"] for tool in row.get("tools", [])]
    for name in names:
        if _without_spaces(name) not in words:
            raise breach(
                "lost_tools", row, f"the chat template leaves out the tool {name!r}; give one that writes tools"
            )


def _refuse_other_reply(tokenizer, row: dict, message: dict, written: str) -> None:
    """Raise Breach where the chat template changes the assistant's text, white space aside, or ends it with another
    token than the end-of-turn token."""
    if _without_spaces(message["content"]) not in _without_spaces(written):
        changed = f"changes the assistant's {message['content'][:60]!r} to {written[:60]!r}"
        raise breach("other_reply", row, f"the chat template {changed}")
    for part in parts_beside_text(message):
        if all(_without_spaces(form) not in _without_spaces(written) for form in part):
            lost = f"leaves out {part[0][:60]!r} of the assistant's reasoning or tool calls, in {written[:60]!r}"
            raise breach("lost_part", row, f"the chat template {lost}")
    text = message["content"].strip()
    last_line = text.splitlines()[-1].strip() if text and "tool_calls" not in message else ""
    end = written[written.rfind(last_line) + len(last_line) :].lstrip() if last_line else _end_of(tokenizer, written)
    if not end.startswith(tokenizer.eos_token):
        added = tokenizer.added_tokens_decoder
        token = next((added[n].content for n in tokenize(tokenizer, end) if n in added and added[n].special), None)
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


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _encode_plain(tokenizer, row: dict) -> dict[str, list[int]]:
    prompt = _plain_prompt(tokenizer, row["prompt"])
    ids = plain(tokenizer, row["prompt"] + row["completion"], add_special_tokens=True)
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    start = len(_shared(prompt, ids))
    return {"input_ids": ids, "labels": [MASKED] * start + ids[start:]}


def _plain_prompt(tokenizer, prompt: str) -> list[int]:
    ids = plain(tokenizer, prompt, add_special_tokens=True)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers end every text


def prompt_text(row: dict) -> str:
    """The prompt of a canonical row: everything before the last reply, the question, or a whole document."""
    if "messages" in row:
        return spoken(row["messages"][:-1])
    return spoken(row["text"] if "text" in row else row["prompt"] if "prompt" in row else row["question"])


def spoken(value) -> str:
    """A string itself; of a list of messages, the joined contents without the system turn."""
    if isinstance(value, str):
        return value
    return "\n".join(turn_text(turn) for turn in value if turn["role"] != "system")


def turn_text(turn: dict) -> str:
    """What a turn says: its reasoning, its text and its tool calls."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", [])]
    return "\n".join(filter(None, [turn.get("reasoning_content"), turn["content"], *calls]))


def encode_prompt(tokenizer, row: dict) -> list[int]:
    """Tokens of a row's prompt, up to the beginning of the assistant's text."""
    if isinstance(row.get("prompt"), str):
        return _plain_prompt(tokenizer, row["prompt"])
    row = shielded(tokenizer, row)
    prompt = row["messages"][:-1] if "messages" in row else row["prompt"]
    return tokenize(tokenizer, write(tokenizer, row, prompt, prompt=True))


def encode_answers(tokenizer, row: dict, sides: tuple[str, ...] = ("chosen", "rejected")) -> dict[str, list[int]]:
    """`prompt_ids` of a row and the tokens of its answers, `chosen_ids` and so on, up to and including the end of turn.

    sides: the row's keys that hold answers. Raises Breach where the template is not prefix-preserving or an answer has
    no end of turn.
    """
    prompt, written = encode_prompt(tokenizer, row), {}
    row = shielded(tokenizer, row) if isinstance(row["prompt"], list) else row
    for side in sides:
        if isinstance(row["prompt"], str):
            ids = _encode_plain(tokenizer, {"prompt": row["prompt"], "completion": row[side]})["input_ids"]
            prompt = _shared(prompt, ids)  # text that merges with the answer belongs to the answer
        else:
            before = write(tokenizer, row, row["prompt"], prompt=True)
            after = write(tokenizer, row, row["prompt"] + row[side])
            ids = tokenize(tokenizer, after)
            _common(tokenizer, ids, prompt, row)
            _refuse_other_reply(tokenizer, row, row[side][0], after[len(before) :])
        written[side] = ids
    end, encoded = tokenizer.eos_token_id, {"prompt_ids": prompt}
    for side, ids in written.items():
        answer = ids[len(prompt) :]
        if end not in answer:
            raise breach("end_of_turn", row, f"{side} answer without an end of turn")
        encoded[f"{side}_ids"] = answer[: answer.index(end) + 1]
    return encoded


def _common(tokenizer, ids: list[int], prefix: list[int], row: dict) -> int:
    """Length of `prefix`. Raises Breach where `ids` does not begin with it."""
    if ids[: len(prefix)] != prefix:
        at, roles = len(_shared(prefix, ids)), [turn["role"] for turn in row.get("messages") or row["prompt"]]
        way_out = (SYSTEM if "system" in roles else "") + (SPLIT if roles.count("assistant") > 1 else "")
        fault = (
            f"the chat template is not prefix-preserving: after "
            f"{tokenizer.decode(ids[max(0, at - 8) : at])!r} a shorter conversation continues with "
            f"{tokenizer.decode(prefix[at : at + 4])!r}, the whole one with {tokenizer.decode(ids[at : at + 4])!r}"
            f"{way_out}"
        )
        raise breach("prefix", row, fault)
    return len(prefix)
