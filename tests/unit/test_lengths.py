"""The longest prompt and the longest answer, apart from the longest row."""

import pytest

from posttrain.config.sections import Prepare
from posttrain.data import lengths
from posttrain.data import tokenizer as tokenizers
from posttrain.models import token_contract, tokens

WORDS = "what is two and two ? it is four. sure ? yes."


def chat(*texts: str, **more) -> dict:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"id": "r1", "source": "a:1", "messages": turns} | more


def reply(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


LONG = " ".join([WORDS] * 4)
ASKED = chat(f"{LONG} first ?", "yes.", "sure ?", "it is four.")
ANSWERED = chat("sure ?", "yes.", "what is two ?", LONG)
PAIR = {
    "id": "p1",
    "source": "a:2",
    "prompt": chat(LONG)["messages"],
    "chosen": reply("yes."),
    "rejected": reply("is."),
}
LABELLED = {"id": "k1", "source": "a:3", "prompt": chat("sure ?")["messages"], "completion": reply(LONG), "label": True}
PLAIN = {"id": "t1", "source": "a:4", "prompt": LONG, "completion": " four."}


@pytest.fixture(scope="module")
def tokenizer():
    made = tokenizers.train_tokenizer([f"{WORDS} first second"] * 20, 320, 64)
    tokenizers.set_chat_template(made, None, conversations=True)
    return made


def sizes(tokenizer, row: dict) -> tuple[int, int, int]:
    """Tokens of the prompt, of the answer, and of the row."""
    (encoded,) = token_contract.encode_all(tokenizer, [row])
    prompt, answer = token_contract.prompt_size(encoded), token_contract.answer_size(encoded)
    return prompt, answer, token_contract.size(encoded)


@pytest.mark.parametrize("row", [ASKED, ANSWERED, PAIR, LABELLED, PLAIN])
def test_prompt_and_answer_are_the_tokens_that_policies_read_and_write(tokenizer, row):
    prompt, answer, whole = sizes(tokenizer, row)
    assert prompt + answer == whole and prompt == len(tokens.encode_prompt(tokenizer, row))
    if row is ANSWERED:
        (shorter,) = token_contract.encode_all(tokenizer, [row | {"messages": [*row["messages"][:-1], *reply("yes.")]}])
        assert token_contract.prompt_size(shorter) == prompt and token_contract.answer_size(shorter) < answer


def limits(**keys) -> dict[str, int]:
    return lengths.limits(Prepare(max_tokens=500, **keys))


@pytest.mark.parametrize(
    "row, keys, reason",
    [
        (ASKED, {"max_prompt_tokens": 40}, "prompt too long"),
        (PAIR, {"max_prompt_tokens": 40}, "prompt too long"),
        (PLAIN, {"max_prompt_tokens": 40}, "prompt too long"),
        (ANSWERED, {"max_answer_tokens": 40}, "answer too long"),
        (LABELLED, {"max_answer_tokens": 40}, "answer too long"),
        (LABELLED, {"max_prompt_tokens": 40}, None),
        (ASKED, {"max_answer_tokens": 40}, None),
        (ASKED, {}, None),
    ],
)
def test_a_longer_row_is_told_and_cut_at_the_part_that_is_too_long(tokenizer, row, keys, reason):
    """Prompts lose their beginning, answers their end; the other part stays as it is."""
    before = sizes(tokenizer, row)
    fault = lengths.over(limits(**keys), token_contract.encode_all(tokenizer, [row])[0])
    assert (fault and fault.reason) == reason, "control: rows that are short where the limit is stay"
    shorter = lengths.cut(tokenizer, row, limits(**keys))
    after = sizes(tokenizer, shorter)
    if reason is None:
        assert shorter == row
    elif reason == "prompt too long":
        assert f"{before[0]} tokens of its prompt, over prepare.max_prompt_tokens (40)" in str(fault)
        assert 30 < after[0] <= 40 and after[1] == before[1]
        text = str(shorter.get("messages", shorter.get("prompt")))
        assert LONG not in text and "yes." in text, "the end of the prompt is left"
    else:
        assert f"{before[1]} tokens of its answer, over prepare.max_answer_tokens (40)" in str(fault)
        assert 30 < after[1] <= 40 and after[0] == before[0]
        kept = (shorter["messages"] if "messages" in shorter else shorter["completion"])[-1]["content"]
        assert LONG.startswith(kept)


def test_a_pair_with_a_longer_answer_is_never_cut(tokenizer):
    pair = PAIR | {"chosen": reply(LONG)}
    assert lengths.cut(tokenizer, pair, limits(max_answer_tokens=40)) is None
    both = lengths.cut(tokenizer, PAIR, limits(max_prompt_tokens=40, max_answer_tokens=40))
    assert (both["chosen"], both["rejected"]) == (PAIR["chosen"], PAIR["rejected"]), "control: a longer prompt is cut"
    assert LONG.endswith(both["prompt"][0]["content"])


def test_what_is_left_without_a_reply_cannot_be_cut(tokenizer):
    assert lengths.cut(tokenizer, chat("sure ?", "yes."), lengths.limits(Prepare(max_tokens=8))) is None


def test_the_last_reply_that_is_trained_ends_the_prompt(tokenizer):
    """A reply behind it, which is not trained, belongs to neither."""
    untrained = [{"role": "user", "content": "sure ?"}, {"role": "assistant", "content": LONG, "train": False}]
    row = chat("what is two ?", "yes.")
    prompt, answer, _ = sizes(tokenizer, row)
    longer = row | {"messages": row["messages"] + untrained}
    assert sizes(tokenizer, longer)[:2] == (prompt, answer)
