"""Convert rows to tokens and labels, check the token contract, their required properties, before training, and cut
rows that have too many tokens."""

import hashlib

from posttrain.ground.errors import UserError

MASKED = -100  # label of a token that is not trained on, in PyTorch's cross-entropy
FEWEST_LEFT = 8  # characters that a cut text keeps at least
SYSTEM = "; `prepare.system_turns: user` puts the system turn's text into the first user turn"
SPLIT = "; `prepare.conversations: split` makes a row of each reply, after the turns before it"


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


def form_of(rows: list[dict]) -> str:
    """`chat` where a row is a conversation, which the chat template writes; `plain` where all are plain text."""
    return "chat" if any("messages" in row or isinstance(row.get("prompt"), list) for row in rows) else "plain"


def write(tokenizer, row: dict, messages: list[dict], prompt: bool = False, **options) -> str:
    """The text of a conversation by the chat template. prompt: whether to add the beginning of the assistant's turn;
    options: further ones of `apply_chat_template`. Raises UserError where the template raises an error."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)
    except Exception as error:  # a template is a program of the user's; it can raise anything
        way_out = SYSTEM if messages[0]["role"] == "system" else ""
        raise UserError(f"chat template: row {row_name(row)}: {type(error).__name__}: {error}{way_out}") from None


def tokenize(tokenizer, text: str) -> list[int]:
    """Tokens of a text from a chat template, which contains its special tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


def _shared(one: list[int], other: list[int]) -> list[int]:
    """The tokens that both begin with."""
    if other[: len(one)] == one:
        return one
    return one[: next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))]


def encode(tokenizer, row: dict) -> dict[str, list[int]]:
    """`input_ids` of a row, and `labels` that are masked except on the assistant's text.

    A row is a conversation (`messages`) or plain text (`prompt`, `completion`). An assistant's turn is trained up to
    and including its end-of-turn token. Raises UserError where the template is not prefix-preserving or changes the
    assistant's text.
    """
    if "messages" not in row:
        return _encode_plain(tokenizer, row)
    messages = row["messages"]
    text = write(tokenizer, row, messages)
    _refuse_lost(tokenizer, row, text)
    ids = tokenize(tokenizer, text)
    labels = [MASKED] * len(ids)
    for turn in trained_turns(row):
        start, stop = _reply(tokenizer, row, ids, messages[: turn + 1])
        labels[start:stop] = ids[start:stop]
    return {"input_ids": ids, "labels": labels}


def trained_turns(row: dict) -> list[int]:
    """The numbers of the assistant's turns; the last one's where the row was split from a `conversation`."""
    turns = [turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    return turns[-1:] if "conversation" in row else turns


def _reply(tokenizer, row: dict, ids: list[int], messages: list[dict]) -> tuple[int, int]:
    """(start, stop) in `ids` of the tokens of the last of the messages, up to and including its end of turn.

    ids: tokens of a conversation that begins with the messages. A template may write a line break after a turn, and
    more at the end of the whole conversation.
    """
    before, after = write(tokenizer, row, messages[:-1], prompt=True), write(tokenizer, row, messages)
    start, shorter = _common(tokenizer, ids, tokenize(tokenizer, before), row), tokenize(tokenizer, after)
    _refuse_other_reply(tokenizer, row, messages[-1], after[len(before) :])
    reply = _shared(shorter, ids)[start:]
    if tokenizer.eos_token_id not in reply:
        _common(tokenizer, ids, shorter, row)
    return start, start + len(reply) - reply[::-1].index(tokenizer.eos_token_id)


def _refuse_lost(tokenizer, row: dict, text: str) -> None:
    """Raise UserError where the chat template leaves out a turn: its text is the same with other words in the turn."""
    messages, words = row["messages"], _without_spaces(text)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" and _without_spaces(message["content"]) not in words:
            longer = message | {"content": message["content"] + " ..."}
            if write(tokenizer, row, [*messages[:turn], longer, *messages[turn + 1 :]]) == text:
                lost = f"leaves out the {message['role']} turn {message['content'][:60]!r}"
                way_out = SYSTEM if message["role"] == "system" else ""
                raise UserError(f"token contract: row {row_name(row)}: the chat template {lost}{way_out}")


def _refuse_other_reply(tokenizer, row: dict, message: dict, written: str) -> None:
    """Raise UserError where the chat template changes the assistant's text, white space aside, or ends it with another
    token than the end-of-turn token."""
    where, said = f"token contract: row {row_name(row)}: the chat template", message["content"]
    if _without_spaces(said) not in _without_spaces(written):
        raise UserError(f"{where} changes the assistant's {said[:60]!r} to {written[:60]!r}")
    last_line = said.strip().splitlines()[-1].strip()
    end = written[written.rfind(last_line) + len(last_line) :].lstrip()
    if not end.startswith(tokenizer.eos_token):
        added = tokenizer.added_tokens_decoder
        token = next((added[n].content for n in tokenize(tokenizer, end) if n in added and added[n].special), None)
        way_out = f"set prepare.end_of_turn: {token!r}" if token else "give another prepare.chat_template"
        ends = f"ends a reply with {token or 'no special token'}, not with the end-of-turn token {tokenizer.eos_token}"
        raise UserError(f"{where} {ends}; {way_out}")


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _encode_plain(tokenizer, row: dict) -> dict[str, list[int]]:
    prompt = tokenizer(row["prompt"]).input_ids
    if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        prompt = prompt[:-1]
    ids = tokenizer(row["prompt"] + row["completion"]).input_ids
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    start = len(_shared(prompt, ids))
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
            raise UserError(f"token contract: row {row_name(row)}: {side} answer without an end of turn")
        encoded[f"{side}_ids"] = answer[: answer.index(end) + 1]
    return encoded


def _common(tokenizer, ids: list[int], prefix: list[int], row: dict) -> int:
    """Length of `prefix`. Raises UserError where `ids` does not begin with it."""
    if ids[: len(prefix)] != prefix:
        at, roles = len(_shared(prefix, ids)), [turn["role"] for turn in row.get("messages") or row["prompt"]]
        way_out = (SYSTEM if "system" in roles else "") + (SPLIT if roles.count("assistant") > 1 else "")
        raise UserError(
            f"token contract: row {row_name(row)}: the chat template is not prefix-preserving: after "
            f"{tokenizer.decode(ids[max(0, at - 8) : at])!r} a shorter conversation continues with "
            f"{tokenizer.decode(prefix[at : at + 4])!r}, the whole one with {tokenizer.decode(ids[at : at + 4])!r}"
            f"{way_out}"
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
    turns = len(trained_turns(row)) if "messages" in row else 1
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
        return row | {"messages": row["prompt"] + row["completion"], "conversation": row["id"]}
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
