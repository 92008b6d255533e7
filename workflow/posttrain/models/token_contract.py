"""The token contract: what must hold of the tokens of every row before it is trained on."""

from posttrain.ground.errors import UserError
from posttrain.models.control import control_text
from posttrain.models.tokens import MASKED, breach, encode, row_name, trained_turns

CONTROL_TEXT = "control_text"
TEXTS = ("text", "messages", "prompt", "completion", "chosen", "rejected")  # keys of a row that hold what is read


def refuse_control_text(tokenizer, row: dict) -> None:
    """Raise Breach for text that the tokenizer would read as a control token: an end of turn within an answer."""
    found = control_text(tokenizer, {key: row[key] for key in TEXTS if key in row})
    if found:
        what = "the end-of-turn token" if found == tokenizer.eos_token else "a control token"
        chat = "; give a chat as messages" if isinstance(row.get("prompt"), str) else ""
        way_out = f"`prepare.control_text: plain` reads it as plain text{chat}"
        raise breach(CONTROL_TEXT, row, f"its text holds {found!r}, {what} of the tokenizer; {way_out}")


def check(tokenizer, row: dict) -> int:
    """Number of tokens of a row of `sft`, `preference` or `kto`, chat template included; of a pair, the longer one's.

    Raises Breach where the row cannot be trained on, as SFT, reward, DPO, KTO and PPO would read it.
    """
    sizes, replies = [], []
    for shown in demonstrations(row):
        tokens = encode(tokenizer, shown)
        for reason, fault in faults_of(tokenizer, shown, **tokens).items():
            raise breach(reason, row, fault)
        sizes.append(len(tokens["input_ids"]))
        replies.append([label for label in tokens["labels"] if label != MASKED])
    if len(replies) == 2 and replies[0] == replies[1]:
        raise breach("equal_answers", row, "chosen and rejected have the same tokens: nothing to tell apart")
    return max(sizes)


def row_tokens(tokenizer, row: dict) -> int:
    """Number of tokens of a row, as `check` counts them, whether or not it can be trained on."""
    return max(len(encode(tokenizer, shown)["input_ids"]) for shown in demonstrations(row))


def demonstrations(row: dict) -> list[dict]:
    """A row as supervised training would read it, a pair as two: a conversation, or a prompt and its completion.

    Of a conversation of `preference` or `kto` only the answer is trained, not the replies in its prompt.
    """
    answers = [key for key in ("chosen", "rejected", "completion") if key in row]
    if not answers or (answers == ["completion"] and isinstance(row["prompt"], str)):
        return [row]
    names = {key: row[key] for key in ("id", "source") if key in row}
    if isinstance(row["prompt"], str):
        return [names | {"prompt": row["prompt"], "completion": row[key]} for key in answers]
    return [names | {"messages": row["prompt"] + row[key], "conversation": row["id"]} for key in answers]


def prove(tokenizer, rows: list[dict], encoded: list[dict]) -> dict[str, int]:
    """Check the token contract on every row; returns the numbers of rows, tokens and trained tokens.

    Raises UserError, naming the row: nothing to train on, an end of turn that is not trained, a second BOS, padding
    among the labels, or a label that differs from its token.
    """
    problems = []
    for row, tokens in zip(rows, encoded, strict=True):
        faults = faults_of(tokenizer, row, **tokens).values()
        problems += [f"token contract: row {row_name(row)}: {fault}" for fault in faults]
    if problems:
        more = [f"and {len(problems) - 5} more rows"] if len(problems) > 5 else []
        raise UserError(*problems[:5], *more)
    return {
        "rows": len(rows),
        "tokens": sum(len(tokens["input_ids"]) for tokens in encoded),
        "trained_tokens": sum(label != MASKED for tokens in encoded for label in tokens["labels"]),
    }


def faults_of(tokenizer, row: dict, input_ids: list[int], labels: list[int]) -> dict[str, str]:
    """The faults of a row's tokens and labels, by a short key; empty where the token contract holds."""
    eos, bos, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    trained = [label for label in labels if label != MASKED]
    faults = {}
    if not trained:
        faults["untrained"] = "has no token to train on"
    turns = len(trained_turns(row)) if "messages" in row else 1
    if trained.count(eos) != turns:
        times = f"{trained.count(eos)} times in {turns} turns"
        faults["end_of_turn"] = f"the end-of-turn token {tokenizer.eos_token!r} is trained {times}"
    if bos is not None and bos != eos:
        expected = 1 if tokenizer("").input_ids[:1] == [bos] else min(1, input_ids.count(bos))
        if input_ids.count(bos) != expected or (expected and input_ids[0] != bos):
            tokens_of_bos = f"{input_ids.count(bos)} beginning-of-sequence tokens {tokenizer.bos_token!r}"
            faults["beginning"] = f"has {tokens_of_bos}, not one"
    if pad is not None and pad != eos and pad in trained:
        faults["padding"] = f"padding {tokenizer.pad_token!r} is a label"
    if any(label not in (MASKED, token) for label, token in zip(labels, input_ids, strict=True)):
        faults["label"] = "a label differs from its token"
    return faults
