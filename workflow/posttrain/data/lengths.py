"""The longest row, prompt and answer in tokens; rows that are longer, cut to fit.

Prompts lose their beginning, as in the code of DPO for dialogues and of Zephyr; answers lose their end.
"""

from collections.abc import Mapping

from posttrain.config.sections import Prepare
from posttrain.models import token_contract
from posttrain.models.chat import Breach
from posttrain.models.tokens import alone, trained_turns

FEWEST_LEFT = 8  # characters that a cut text keeps at least
PROMPT, ANSWER, ROW = "prompt too long", "answer too long", "too long"
TOO_LONG = {ROW: "max_tokens", PROMPT: "max_prompt_tokens", ANSWER: "max_answer_tokens"}  # reason -> key of its limit
SIZES = {PROMPT: token_contract.prompt_size, ANSWER: token_contract.answer_size, ROW: token_contract.size}


def limits(section: Prepare) -> dict[str, int]:
    """The most tokens of a row, a prompt and an answer, by the reason for which longer ones are dropped."""
    assert section.max_tokens, "filled in when the campaign was read"
    return {reason: limit for reason in SIZES if (limit := getattr(section, TOO_LONG[reason])) is not None}


def counted(section: Prepare, dropped: Mapping[str, int]) -> str:
    """How many rows are longer than each limit. dropped: reason -> rows."""
    return ", ".join(f"{dropped.get(reason, 0)} longer than {TOO_LONG[reason]} {limit}"
                     for reason, limit in limits(section).items())  # fmt: skip


def over(limits: dict[str, int], encoded: dict[str, list[int]]) -> Breach | None:
    """The first limit that the tokens of a row are over; None where they are over none."""
    for reason, limit in limits.items():
        if (size := SIZES[reason](encoded)) > limit:
            part = "" if reason == ROW else f" of its {reason.split()[0]}"
            return Breach(reason, f"{size:,} tokens{part}, over prepare.{TOO_LONG[reason]} ({limit})")
    return None


def cut(tokenizer, row: dict, limits: dict[str, int]) -> dict | None:
    """The row with its longest text shortened until it fits: prompts lose their beginning, replies their end. What is
    over the limit of prompts or answers is shortened there.

    None where nothing of a text would be left, and for preference pairs whose answers would have to be cut, as these
    must stay comparable.
    """
    while (fault := over(limits, encoded := alone(tokenizer, token_contract.encoding(tokenizer, row)))) is not None:
        if "chosen" in row and fault.reason != PROMPT:
            return None
        turns, reply = _turns_of(row), _reply_of(row)
        places = {PROMPT: range(reply), ANSWER: [reply], ROW: range(len(turns))}[fault.reason]
        at = max(places, key=lambda n: len(turns[n]["content"]))
        role, text = turns[at]["role"], turns[at]["content"]
        keep = min(len(text) - 1, int(len(text) * limits[fault.reason] / SIZES[fault.reason](encoded)))
        if keep < FEWEST_LEFT:
            return None
        shorter = text[:keep] if role in ("assistant", "completion") else text[-keep:]
        row = _with_turns(row, [*turns[:at], {**turns[at], "content": shorter}, *turns[at + 1 :]])
    return row


def _turns_of(row: dict) -> list[dict]:
    """The texts of a row, each with its role; in plain text, the key is the role. Of a pair, those of the prompt."""
    if "messages" in row:
        return row["messages"]
    if isinstance(row["prompt"], list):
        return row["prompt"] + row.get("completion", [])
    return [{"role": key, "content": row[key]} for key in ("prompt", "completion") if key in row]


def _reply_of(row: dict) -> int:
    """The number of the last reply that is trained among _turns_of; what stands before is the prompt."""
    if "messages" in row:
        return trained_turns(row)[-1]
    return len(_turns_of(row)) - ("completion" in row)


def _with_turns(row: dict, turns: list[dict]) -> dict:
    """The row with other texts, in the order of _turns_of."""
    if "messages" in row:
        return {**row, "messages": turns}
    if isinstance(row["prompt"], list):
        end = len(row["prompt"])
        return {**row, "prompt": turns[:end]} | ({"completion": turns[end:]} if "completion" in row else {})
    return {**row, **{turn["role"]: turn["content"] for turn in turns}}
