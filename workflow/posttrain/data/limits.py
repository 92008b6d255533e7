"""Check rows against `prepare.max_tokens` and the token contract, with the tokens that training will use."""

import statistics

from posttrain.config.sections import Prepare
from posttrain.data.sources import card
from posttrain.ground.progress import say
from posttrain.models import tokens

NAMED = 5  # dropped rows that a warning names; it counts all
LEAST = 8  # characters that a cut text keeps at least


def limit_length(section: Prepare, tokenizer, task: str, sides: dict[str, list], cards: list) -> dict:
    """Drop or cut rows longer than `max_tokens`, on both sides; returns lengths for the data card. Prints a warning."""
    assert section.max_tokens, "filled in when the campaign was read"
    lengths, dropped, truncated = [], [], 0
    total = sum(map(len, sides.values()))
    for side, rows in sides.items():
        short_enough = []
        for row in rows:
            size = row_tokens(tokenizer, row)
            if size > section.max_tokens:
                shorter = cut(tokenizer, row, section.max_tokens) if section.long_rows == "cut" else None
                if shorter is None:
                    dropped.append(f"{row['source']} ({size:,} tokens)")
                    continue
                truncated, row, size = truncated + 1, shorter, row_tokens(tokenizer, shorter)
            short_enough.append(row)
            lengths.append(size)
        sides[side] = short_enough
        if rows and not short_enough:
            say(f"warning: no {side} row of {task} is left")
    if dropped:
        named = ", ".join(dropped[:NAMED]) + (", ..." if len(dropped) > NAMED else "")
        limit = f"longer than prepare.max_tokens ({section.max_tokens})"
        say(f"warning: {len(dropped):,} of {total:,} {task} rows are {limit} and dropped: {named}")
        cards.append(card(f"{task}, longer than max_tokens", task, {"too long": len(dropped)}))
    return summary(lengths) | {"truncated": truncated} if lengths else {}


def summary(lengths: list[int]) -> dict[str, int]:
    """Minimum, median, 95th percentile and maximum of lengths."""
    lengths = sorted(lengths)
    return {
        "min": lengths[0],
        "median": statistics.median_low(lengths),
        "p95": lengths[int(0.95 * (len(lengths) - 1))],
        "max": lengths[-1],
    }


def demonstration(row: dict) -> dict:
    """A row of `sft` or `kto` as training encodes it: a KTO row's prompt and completion may be lists of messages."""
    if isinstance(row.get("completion"), list):
        return row | {"messages": row["prompt"] + row["completion"]}
    return row


def prove(tokenizer, sides: dict[str, list]) -> None:
    """Check the token contract on every row of `sft` or `kto`, before training. Raises UserError."""
    for rows in sides.values():
        shown = [demonstration(row) for row in rows]
        tokens.prove(tokenizer, shown, [tokens.encode(tokenizer, row) for row in shown])


def row_tokens(tokenizer, row: dict) -> int:
    """Number of tokens of a row, chat template included; for a preference pair, prompt with the longer answer."""
    if "chosen" not in row:
        return len(tokens.encode(tokenizer, demonstration(row))["input_ids"])
    if isinstance(row["chosen"], str):
        return max(len(tokenizer(row["prompt"] + row[side]).input_ids) + 1 for side in ("chosen", "rejected"))
    conversations = [tokens.write(tokenizer, row, row["prompt"] + row[side]) for side in ("chosen", "rejected")]
    return max(len(tokens.tokenize(tokenizer, text)) for text in conversations)


def cut(tokenizer, row: dict, longest: int) -> dict | None:
    """The row with its longest text shortened until it fits: prompts lose their beginning, replies their end.

    None where nothing of the reply would be left, and for preference pairs, whose answers must stay comparable.
    """
    if "chosen" in row:
        return None
    while (size := row_tokens(tokenizer, row)) > longest:
        turns = texts_of(row)
        at = max(range(len(turns)), key=lambda n: len(turns[n]["content"]))
        role, text = turns[at]["role"], turns[at]["content"]
        keep = min(len(text) - 1, int(len(text) * longest / size))
        if keep < LEAST:
            return None
        shorter = text[:keep] if role in ("assistant", "completion") else text[-keep:]
        row = with_texts(row, [*turns[:at], {**turns[at], "content": shorter}, *turns[at + 1 :]])
    return row


def texts_of(row: dict) -> list[dict]:
    """The texts of a row, each with its role; in plain text, the key is the role."""
    if "messages" in row:
        return row["messages"]
    if isinstance(row["completion"], list):
        return row["prompt"] + row["completion"]
    return [{"role": key, "content": row[key]} for key in ("prompt", "completion")]


def with_texts(row: dict, turns: list[dict]) -> dict:
    """The row with other texts, in the order of texts_of."""
    if "messages" in row:
        return {**row, "messages": turns}
    if isinstance(row["completion"], list):
        return {**row, "prompt": turns[:-1], "completion": turns[-1:]}
    return {**row, **{turn["role"]: turn["content"] for turn in turns}}
