"""Convert rows to tokens and labels.

A row that the chat template would change, or whose reply has no tokens of its own, is a `Breach` of the token contract;
`token_contract.py` checks the rest of it.
"""

import json
from collections.abc import Generator, Iterable
from itertools import chain, islice
from typing import Any

from posttrain.models.chat import (
    SPLIT,
    SYSTEM,
    Breach,
    Chat,
    breach,
    refuse_lost,
    refuse_other_reply,
    write,
    write_all,
)
from posttrain.models.control import plain, shielded, tokenize

# Encodes a row: yields its chats, is sent the text of each or its Breach, yields whether its texts are plain and the
# texts, is sent the tokens of each, and returns the result.
Encoding = Generator[Any, Any, dict[str, list[int]]]
MASKED = -100  # label of a token that is not trained on, in PyTorch's cross-entropy


def form_of(rows: Iterable[dict]) -> str:
    """`chat` where a row is a conversation, which the chat template writes; `plain` where all are plain text."""
    return "chat" if any("messages" in row or isinstance(row.get("prompt"), list) for row in rows) else "plain"


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
    return alone(tokenizer, demonstration(tokenizer, row))


def alone(tokenizer, encoding: Encoding) -> dict[str, list[int]]:
    """What one row is encoded to. Raises Breach as its encoding does."""
    (encoded,) = together(tokenizer, [encoding])
    if isinstance(encoded, Breach):
        raise encoded
    return encoded


def together(tokenizer, encodings: Iterable[Encoding]) -> list[dict[str, list[int]] | Breach]:
    """What rows are encoded to, with the Breach of each that raised one; chat template and tokenizer are called once
    for all."""
    encodings = list(encodings)
    chats: list[list[Chat]] = list(map(next, encodings))
    written = iter(write_all(tokenizer, list(chain.from_iterable(chats))))
    results: list = [None] * len(encodings)
    texts: dict[bool, list[str]] = {True: [], False: []}  # by whether a text is plain
    places = {}
    for n, (encoding, of_chats) in enumerate(zip(encodings, chats, strict=True)):
        try:
            is_plain, of_row = encoding.send(list(islice(written, len(of_chats))))
        except Breach as fault:
            results[n] = fault
        else:
            places[n] = (is_plain, len(texts[is_plain]), len(of_row))
            texts[is_plain] += of_row
    ids = {
        True: plain(tokenizer, texts[True], add_special_tokens=True) if texts[True] else [],
        False: tokenize(tokenizer, texts[False]),
    }
    for n, (is_plain, start, count) in places.items():
        try:
            encodings[n].send(ids[is_plain][start : start + count])
        except StopIteration as end:
            results[n] = end.value
        except Breach as fault:
            results[n] = fault
    return results


def demonstration(tokenizer, row: dict) -> Encoding:
    """The encoding of a row as `encode` gives it."""
    if "messages" not in row:
        return (yield from _plain_demonstration(tokenizer, row))
    row = shielded(tokenizer, row)
    messages, turns = row["messages"], trained_turns(row)
    within = [turn for turn in turns if turn + 1 < len(messages)]  # replies after which others follow
    prompts = [Chat(row, messages[:turn], is_prompt=True) for turn in turns]
    text, *others = yield [Chat(row, messages), *prompts, *(Chat(row, messages[: turn + 1]) for turn in within)]
    refuse_lost(tokenizer, row, checked(text))
    before, after = others[: len(turns)], others[len(turns) :]
    list(map(checked, others))
    ids, *parts = yield False, [text, *before, *after]
    labels = [MASKED] * len(ids)
    for n, turn in enumerate(turns):
        start = _common(tokenizer, ids, parts[n], row)
        shorter, written = (parts[len(turns) + n], after[n]) if n < len(within) else (ids, text)
        refuse_other_reply(tokenizer, row, messages[turn], written[len(before[n]) :])
        stop = start + _reply(tokenizer, row, ids, start, shorter)
        labels[start:stop] = ids[start:stop]
    return {"input_ids": ids, "labels": labels}


def _reply(tokenizer, row: dict, ids: list[int], start: int, shorter: list[int]) -> int:
    """The number of tokens of a reply, up to and including its end of turn. shorter: the tokens of the conversation up
    to the reply, which a template may end with other white space than within the whole one, `ids`."""
    reply, end = (ids if shorter is ids else _shared(shorter, ids))[start:], tokenizer.eos_token_id
    if end not in reply:
        _common(tokenizer, ids, shorter, row)
    return len(reply) - reply[::-1].index(end)


def trained_turns(row: dict) -> list[int]:
    """The numbers of the assistant's turns that are trained; at most the last of a row split from a `conversation`."""
    turns = [turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    turns = turns[-1:] if "conversation" in row else turns
    return [turn for turn in turns if row["messages"][turn].get("train", True)]


def checked(text: str | Breach) -> str:
    """What the chat template wrote. Raises the Breach in its place."""
    if isinstance(text, Breach):
        raise text
    return text


def _plain_demonstration(tokenizer, row: dict) -> Encoding:
    yield []
    prompt, ids = yield True, [row["prompt"], row["prompt"] + row["completion"]]
    ids = _ended(tokenizer, ids)
    start = len(_shared(_not_ended(tokenizer, prompt), ids))
    return {"input_ids": ids, "labels": [MASKED] * start + ids[start:]}


def _ended(tokenizer, ids: list[int]) -> list[int]:
    """Tokens of a text with the end-of-turn token, with which some tokenizers end every text."""
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _not_ended(tokenizer, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


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
        return _not_ended(tokenizer, plain(tokenizer, row["prompt"], add_special_tokens=True))
    row = shielded(tokenizer, row)
    prompt = row["messages"][:-1] if "messages" in row else row["prompt"]
    return tokenize(tokenizer, [write(tokenizer, row, prompt, prompt=True)])[0]


def answers(tokenizer, row: dict, sides: tuple[str, ...] = ("chosen", "rejected")) -> Encoding:
    """The encoding of a row with judged answers: `prompt_ids`, and the tokens of each answer, as `chosen_ids`, with its
    end of turn.

    sides: the row's keys that hold answers. Raises Breach where the template is not prefix-preserving or an answer has
    no end of turn.
    """
    if isinstance(row["prompt"], str):
        yield []
        prompt, *whole = yield True, [row["prompt"], *(row["prompt"] + row[side] for side in sides)]
        prompt, whole = _not_ended(tokenizer, prompt), [_ended(tokenizer, ids) for ids in whole]
        for ids in whole:
            prompt = _shared(prompt, ids)  # text that merges with the answer belongs to the answer
    else:
        row = shielded(tokenizer, row)
        chats = [Chat(row, row["prompt"], is_prompt=True), *(Chat(row, row["prompt"] + row[side]) for side in sides)]
        before, *texts = map(checked, (yield chats))
        refuse_lost(tokenizer, row | {"messages": row["prompt"] + row[sides[0]]}, texts[0])
        prompt, *whole = yield False, [before, *texts]
        for side, text, ids in zip(sides, texts, whole, strict=True):
            _common(tokenizer, ids, prompt, row)
            refuse_other_reply(tokenizer, row, row[side][0], text[len(before) :])
    end, encoded = tokenizer.eos_token_id, {"prompt_ids": prompt}
    for side, ids in zip(sides, whole, strict=True):
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
