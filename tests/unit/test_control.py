"""Control text, such as `</s>` typed by a user: found, and read as plain text between the template's control tokens.

pytest tests/unit/test_control.py
"""

import copy

import pytest
from families import FAMILIES, tokenizer_of

from posttrain.models import control, tokens


def chat(said: str, reply: str = "it is four.") -> list[dict]:
    return [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]


def written(tokenizer, messages: list[dict]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False)


def numbers(tokenizer) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(token) for token in control.control_tokens(tokenizer)}


@pytest.fixture(params=FAMILIES)
def tokenizer(request):
    return tokenizer_of(request.param)


def test_control_text_has_the_tokens_of_plain_text(tokenizer):
    """Exactly those of transformers' `split_special_tokens`, words before and after it included."""
    everything = "what"
    for token in control.control_tokens(tokenizer):
        everything += f"{token}is two {token}."
    messages = chat(everything, "it " + everything)
    ids = control.tokenize(tokenizer, [written(tokenizer, control.shielded(tokenizer, messages))])[0]
    clean = control.tokenize(tokenizer, [written(tokenizer, chat("what", "it is"))])[0]
    directing = numbers(tokenizer)
    assert [token for token in ids if token in directing] == [token for token in clean if token in directing]
    alone = tokenizer(everything, add_special_tokens=False, split_special_tokens=True).input_ids
    middle = alone[2:-1]  # the template may merge the outer ones with white space
    assert sum(ids[n : n + len(middle)] == middle for n in range(len(ids))) == 2
    ordinary = tokenizer(written(tokenizer, messages), add_special_tokens=False).input_ids
    extra = [token for token in ordinary if token in directing]
    assert len(extra) == 4 * len(directing) + sum(token in directing for token in clean), (
        "control: they were directions"
    )


def test_a_text_without_control_text_has_the_tokens_of_the_ordinary_call(tokenizer):
    """Also through the names that stand for the template's control tokens, beside control text elsewhere."""
    text = written(tokenizer, chat("what is two and two ?", "it is\n\nfour. sure ?"))
    ordinary = tokenizer(text, add_special_tokens=False).input_ids
    assert control.tokenize(tokenizer, [text])[0] == ordinary
    end = control.control_tokens(tokenizer)[0]
    shielded = control.shielded(tokenizer, f" {end}")
    both = control.tokenize(tokenizer, [text + tokenizer.eos_token + shielded])[0]
    longer = tokenizer(text + tokenizer.eos_token, add_special_tokens=False).input_ids
    assert both[: len(longer)] == longer and len(both) > len(longer) + 1


@pytest.mark.parametrize("special", [False, True])
def test_texts_have_the_tokens_of_the_ordinary_call_though_it_is_passed_by(tokenizer, special):
    texts = ["", " what  is\n\nit?", "".join(f"{token}a {token}" for token in control.control_tokens(tokenizer))]
    called = tokenizer(texts, add_special_tokens=special, split_special_tokens=True).input_ids
    assert control.plain(tokenizer, texts, add_special_tokens=special) == called
    assert called[2] != tokenizer(texts[2], add_special_tokens=special).input_ids, "control"


def test_a_tokenizer_whose_class_adds_to_the_ordinary_call_is_called():
    tokenizer = copy.deepcopy(tokenizer_of("llama3"))

    class Lower(type(tokenizer)):
        def __call__(self, text, **options):
            return super().__call__(text.lower() if isinstance(text, str) else [t.lower() for t in text], **options)

    tokenizer.__class__ = Lower
    assert control.tokenize(tokenizer, ["IT IS"]) == control.tokenize(tokenizer, ["it is"])
    assert control.tokenize(tokenizer_of("llama3"), ["IT IS"]) != control.tokenize(tokenizer, ["it is"]), "control"


def test_shielding_changes_control_text_alone_and_can_be_undone(tokenizer):
    end = tokenizer.eos_token
    value = {"messages": chat(f"a {end} b", f"{end}{end}"), "tools": [{"name": f"x{end}"}], "label": True, "n": None}
    shielded = control.shielded(tokenizer, value)
    assert control.control_text(tokenizer, shielded) is None and control.control_text(tokenizer, value) == end
    assert control.unshielded(tokenizer, shielded["messages"][0]["content"]) == f"a {end} b"
    assert shielded["label"] is True and shielded["n"] is None
    clean = chat("no <think> of it </think>, <b> or </S>")
    assert control.shielded(tokenizer, clean) is clean, "a reply's thinking is no control text"
    assert control.control_text(tokenizer, chat(f"a {end[:2]}", f"{end[2:]} b")) is None, "halves in two texts are none"


@pytest.mark.parametrize("family", ["llama3", "qwen2.5", "qwen3", "mistral-0.1", "mistral-0.3", "granite"])
def test_a_row_is_read_alike_by_every_encoder(family):
    """As SFT, as a prompt, and as an answer: the same tokens, in which the text directs nothing."""
    tokenizer = tokenizer_of(family)
    end = tokenizer.eos_token
    messages = chat(f"what is {end} ?", f"it is {end} four.")
    row = {"id": "r1", "messages": messages}
    pair = {"id": "p1", "prompt": messages[:1], "chosen": messages[1:], "rejected": chat("", f"no {end}.")[1:]}
    encoded, answers = tokens.encode(tokenizer, row), tokens.alone(tokenizer, tokens.answers(tokenizer, pair))
    reply = [label for label in encoded["labels"] if label != tokens.MASKED]
    assert reply == answers["chosen_ids"] and reply.count(tokenizer.eos_token_id) == 1
    assert reply != answers["rejected_ids"] and answers["rejected_ids"].count(tokenizer.eos_token_id) == 1
    prompt = tokens.encode_prompt(tokenizer, pair)
    assert prompt == answers["prompt_ids"] == encoded["input_ids"][: len(prompt)]
    plain = {"id": "r2", "prompt": f"what is {end} ?", "completion": f" it is {end} four."}
    labels = [label for label in tokens.encode(tokenizer, plain)["labels"] if label != tokens.MASKED]
    assert labels.count(tokenizer.eos_token_id) == 1 and labels[-1] == tokenizer.eos_token_id


def test_a_real_tokenizer(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/stories260K")
    assert 2 in tokenizer("the end</s> of", add_special_tokens=False).input_ids, "control"
    ids = control.plain(tokenizer, "the end</s> of")
    assert 2 not in ids and tokenizer.decode(ids) == "the end</s> of"
