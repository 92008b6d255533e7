"""Conversations in the form that a chat template can write: without a system turn, or with one trained reply a row.

`sides` is task -> side ("train", "test") -> rows.
"""

from pathlib import Path

from posttrain.config.sections import Prepare
from posttrain.data.rows import card
from posttrain.data.stored import Rows, store
from posttrain.ground.progress import say


def suited(section: Prepare, sides: dict[str, dict[str, Rows]], cards: list, scratch: Path | None = None) -> None:
    """Change the conversations of all rows as `prepare.system_turns` and `prepare.conversations` say; tell how many.

    scratch: folder for stored rows.
    """
    for task, of_sides in sides.items():
        if section.system_turns == "user":
            changed = 0
            for side, rows in of_sides.items():
                changed += sum(without_system_turn(row) is not row for row in rows)
                of_sides[side] = store(map(without_system_turn, rows), scratch, numbered=False)
            tell(cards, task, "system turns put into the first user turn", changed)
        if section.conversations == "split" and task == "sft":
            total = sum(map(len, of_sides.values()))
            for side, rows in of_sides.items():
                of_sides[side] = store((part for row in rows for part in split(row)), scratch, numbered=False)
            more = sum(map(len, of_sides.values())) - total
            tell(cards, task, "rows more, one for each reply of a conversation", more)


def tell(cards: list, task: str, what: str, count: int) -> None:
    """Print a count and enter it in the data card."""
    if count:
        say(f"prepare: {task}: {count:,} {what}")
        cards.append(card(f"{task}: all sources", task, {}, {what: count}))


def without_system_turn(row: dict) -> dict:
    """The row with a system turn's text at the beginning of the user's first, after which a blank line follows."""
    key = "messages" if "messages" in row else "prompt"
    turns = row.get(key)
    if not isinstance(turns, list) or turns[0]["role"] != "system":
        return row
    system, first, *others = turns
    return row | {key: [first | {"content": f"{system['content']}\n\n{first['content']}"}, *others]}


def split(row: dict) -> list[dict]:
    """A row for each reply of a conversation, which ends with the reply; the last keeps the row's id."""
    turns = row.get("messages", [])
    replies = [number for number, turn in enumerate(turns, 1) if turn["role"] == "assistant"]
    ends = [number for number in replies if turns[number - 1].get("train", True)]
    if len(replies) < 2 or not ends:
        return [row]
    parts = [row | {"messages": turns[:end], "conversation": row["id"]} for end in ends]
    return [part | {"id": f"{row['id']}#{n}"} for n, part in enumerate(parts[:-1], 1)] + parts[-1:]
