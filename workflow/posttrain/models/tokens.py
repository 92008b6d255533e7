"""Convert rows to tokens and labels, check the token contract, their required properties, before training, and cut
rows that have too many tokens."""

import hashlib

from posttrain.ground.errors import UserError

MASKED = -100  # label of a token that is not trained on, in PyTorch's cross-entropy
FEWEST_LEFT = 8  # characters that a cut text keeps at least


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


def write(tokenizer, row: dict, messages: list[dict], prompt: bool = False) -> str:
    """The text of a conversation by the chat template. prompt: whether to add the beginning of the assistant's turn."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program of the user's; it can raise anything
        raise UserError(f"chat template: row {row_name(row)}: {type(error).__name__}: {error}") from None


def tokenize(tokenizer, text: str) -> list[int]:
    """Tokens of a text from a chat template, which contains its special tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


def encode(tokenizer, row: dict) -> dict[str, list[int]]:
    """`input_ids` of a row, and `labels` that are masked except on the assistant's text.

    A row is a conversation (`messages`) or plain text (`prompt`, `completion`). An assistant's turn is trained up to
    and including its end-of-turn token. Raises UserError where the template is not prefix-preserving or changes the
    assistant's text.
    """
    if "messages" not in row:
        return _encode_plain(tokenizer, row)
    messages = row["messages"]
    ids = tokenize(tokenizer, write(tokenizer, row, messages))
    labels = [MASKED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before = write(tokenizer, row, messages[:turn], prompt=True)
            after = write(tokenizer, row, messages[: turn + 1])
            start = _common(tokenizer, ids, tokenize(tokenizer, before), row)
            stop = _common(tokenizer, ids, tokenize(tokenizer, after), row)
            _refuse_other_words(row, message, after[len(before) :])
            reply = ids[start:stop]
            if tokenizer.eos_token_id in reply:  # a template may add a line break after the end of turn
                stop -= reply[::-1].index(tokenizer.eos_token_id)
            labels[start:stop] = ids[start:stop]
    return {"input_ids": ids, "labels": labels}


def _refuse_other_words(row: dict, message: dict, written: str) -> None:
    """Raise UserError where the chat template changes the assistant's text."""
    if message["content"].strip() not in written:
        raise UserError(
            f"token contract: row {row_name(row)}: the chat template changes the assistant's "
            f"{message['content'][:60]!r} to {written[:60]!r}"
        )


def _encode_plain(tokenizer, row: dict) -> dict[str, list[int]]:
    prompt = tokenizer(row["prompt"]).input_ids
    if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        prompt = prompt[:-1]
    ids = tokenizer(row["prompt"] + row["completion"]).input_ids
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    start = next((n for n, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
    return {"input_ids": ids, "labels": [MASKED] * start + ids[start:]}


def prompt_text(row: dict) -> str:
    """The prompt of a canonical row: everything before the last reply, the question, or a whole document."""
    if "messages" in row:
        return spoken(row["messages"][:-1])
    return spoken(row["text"] if "text" in row else row["prompt"] if "prompt" in row else row["question"])


def spoken(value) -> str:
    """A string itself; of a list of messages, the joined contents without the system turn."""
    if isinstance(value, str):
        return value
    return "\n".join(turn["content"] for turn in value if turn["role"] != "system")


def encode_prompt(tokenizer, row: dict) -> list[int]:
    """Tokens of a row's prompt, up to the beginning of the assistant's text."""
    prompt = row["messages"][:-1] if "messages" in row else row["prompt"]
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    return tokenize(tokenizer, write(tokenizer, row, prompt, prompt=True))


def encode_answers(tokenizer, row: dict, sides: tuple[str, ...] = ("chosen", "rejected")) -> dict[str, list[int]]:
    """`prompt_ids` of a row and the tokens of its answers, `chosen_ids` and so on, up to and including the end of turn.

    sides: the row's keys that hold answers. Raises UserError where the template is not prefix-preserving or an answer
    has no end of turn.
    """
    prompt = encode_prompt(tokenizer, row)
    written = {}
    for side in sides:
        if isinstance(row["prompt"], str):
            ids = _encode_plain(tokenizer, {"prompt": row["prompt"], "completion": row[side]})["input_ids"]
            shared = next((n for n, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
            prompt = prompt[:shared]  # text that merges with the answer belongs to the answer
        else:
            before = write(tokenizer, row, row["prompt"], prompt=True)
            after = write(tokenizer, row, row["prompt"] + row[side])
            ids = tokenize(tokenizer, after)
            _common(tokenizer, ids, prompt, row)
            _refuse_other_words(row, row[side][0], after[len(before) :])
        written[side] = ids
    end, encoded = tokenizer.eos_token_id, {"prompt_ids": prompt}
    for side, ids in written.items():
        answer = ids[len(prompt) :]
        if end not in answer:
            raise UserError(f"token contract: row {row_name(row)}: {side} answer without an end of turn")
        encoded[f"{side}_ids"] = answer[: answer.index(end) + 1]
    return encoded


def _common(tokenizer, ids: list[int], prefix: list[int], row: dict) -> int:
    """Length of `prefix`. Raises UserError where `ids` does not begin with it."""
    if ids[: len(prefix)] != prefix:
        at = next((n for n, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), len(ids))
        raise UserError(
            f"token contract: row {row_name(row)}: the chat template is not prefix-preserving: after "
            f"{tokenizer.decode(ids[max(0, at - 8) : at])!r} a shorter conversation continues with "
            f"{tokenizer.decode(prefix[at : at + 4])!r}, the whole one with {tokenizer.decode(ids[at : at + 4])!r}"
        )
    return len(prefix)


def prove(tokenizer, rows: list[dict], encoded: list[dict]) -> dict[str, int]:
    """Check the token contract on every row; returns the numbers of rows, tokens and trained tokens.

    Raises UserError, naming the row: nothing to train on, an end of turn that is not trained, a second BOS, padding
    among the labels, or a label that differs from its token.
    """
    problems = []
    for row, tokens in zip(rows, encoded, strict=True):
        problems += [f"token contract: row {row_name(row)}: {fault}" for fault in faults_of(tokenizer, row, **tokens)]
    if problems:
        more = [f"and {len(problems) - 5} more rows"] if len(problems) > 5 else []
        raise UserError(*problems[:5], *more)
    return {
        "rows": len(rows),
        "tokens": sum(len(tokens["input_ids"]) for tokens in encoded),
        "trained_tokens": sum(label != MASKED for tokens in encoded for label in tokens["labels"]),
    }


def faults_of(tokenizer, row: dict, input_ids: list[int], labels: list[int]) -> list[str]:
    """Messages about the faults of a row's tokens and labels; empty where the token contract holds."""
    eos, bos, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    trained = [label for label in labels if label != MASKED]
    faults = []
    if not trained:
        faults.append("has no token to train on")
    turns = sum(message["role"] == "assistant" for message in row["messages"]) if "messages" in row else 1
    if trained.count(eos) != turns:
        faults.append(
            f"the end-of-turn token {tokenizer.eos_token!r} is trained {trained.count(eos)} times in {turns} turns"
        )
    if bos is not None and bos != eos:
        expected = 1 if tokenizer("").input_ids[:1] == [bos] else min(1, input_ids.count(bos))
        if input_ids.count(bos) != expected or (expected and input_ids[0] != bos):
            faults.append(f"has {input_ids.count(bos)} beginning-of-sequence tokens {tokenizer.bos_token!r}, not one")
    if pad is not None and pad != eos and pad in trained:
        faults.append(f"padding {tokenizer.pad_token!r} is a label")
    if any(label not in (MASKED, token) for label, token in zip(labels, input_ids, strict=True)):
        faults.append("a label differs from its token")
    return faults


def demonstration(row: dict) -> dict:
    """A row of `sft` or `kto` as training encodes it: a KTO row's prompt and completion may be lists of messages."""
    if isinstance(row.get("completion"), list):
        return row | {"messages": row["prompt"] + row["completion"]}
    return row


def row_tokens(tokenizer, row: dict) -> int:
    """Number of tokens of a row, chat template included; for a preference pair, prompt with the longer answer."""
    if "chosen" not in row:
        return len(encode(tokenizer, demonstration(row))["input_ids"])
    if isinstance(row["chosen"], str):
        return max(len(tokenizer(row["prompt"] + row[side]).input_ids) + 1 for side in ("chosen", "rejected"))
    conversations = [write(tokenizer, row, row["prompt"] + row[side]) for side in ("chosen", "rejected")]
    return max(len(tokenize(tokenizer, text)) for text in conversations)


def cut(tokenizer, row: dict, longest: int) -> dict | None:
    """The row with its longest text shortened until it fits: prompts lose their beginning, replies their end.

    None where nothing of the reply would be left, and for preference pairs, whose answers must stay comparable.
    """
    if "chosen" in row:
        return None
    while (size := row_tokens(tokenizer, row)) > longest:
        turns = _turns_of(row)
        at = max(range(len(turns)), key=lambda n: len(turns[n]["content"]))
        role, text = turns[at]["role"], turns[at]["content"]
        keep = min(len(text) - 1, int(len(text) * longest / size))
        if keep < FEWEST_LEFT:
            return None
        shorter = text[:keep] if role in ("assistant", "completion") else text[-keep:]
        row = _with_turns(row, [*turns[:at], {**turns[at], "content": shorter}, *turns[at + 1 :]])
    return row


def _turns_of(row: dict) -> list[dict]:
    """The texts of a row, each with its role; in plain text, the key is the role."""
    if "messages" in row:
        return row["messages"]
    if isinstance(row["completion"], list):
        return row["prompt"] + row["completion"]
    return [{"role": key, "content": row[key]} for key in ("prompt", "completion")]


def _with_turns(row: dict, turns: list[dict]) -> dict:
    """The row with other texts, in the order of _turns_of."""
    if "messages" in row:
        return {**row, "messages": turns}
    if isinstance(row["completion"], list):
        return {**row, "prompt": turns[:-1], "completion": turns[-1:]}
    return {**row, **{turn["role"]: turn["content"] for turn in turns}}
