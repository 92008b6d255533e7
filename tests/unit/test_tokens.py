"""The token contract: what must hold of tokens and labels, and that a breach of each part is found."""

import copy

import pytest

from posttrain.data import tokenizer as tokenizers
from posttrain.ground.errors import UserError
from posttrain.models import tokens

ROW = {
    "id": "r1",
    "messages": [
        {"role": "user", "content": "what is two and two ?"},
        {"role": "assistant", "content": "it is four."},
        {"role": "user", "content": "sure ?"},
        {"role": "assistant", "content": "yes."},
    ],
}
PLAIN = {"id": "r2", "prompt": "two and two is", "completion": " four."}


@pytest.fixture(scope="module")
def tokenizer():
    made = tokenizers.train_tokenizer(["what is two and two ? it is four. sure ? yes."] * 20, 320, 64)
    tokenizers.set_chat_template(made, None, conversations=True)
    return made


def trained(tokenizer, row):
    encoded = tokens.encode(tokenizer, row)
    return tokenizer.decode([label for label in encoded["labels"] if label != tokens.MASKED])


def test_only_what_the_assistant_says_is_trained(tokenizer):
    assert trained(tokenizer, ROW) == " it is four.<|end|> yes.<|end|>"
    assert trained(tokenizer, PLAIN) == " four.<|end|>"


def test_no_text_is_unknown(tokenizer):
    text = "é 中 👍 \x00 <script>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == f" {text}"


@pytest.mark.parametrize("row", [ROW, PLAIN])
def test_good_rows_pass(tokenizer, row):
    counted = tokens.prove(tokenizer, [row], [tokens.encode(tokenizer, row)])
    assert counted["rows"] == 1 and 0 < counted["trained_tokens"] < counted["tokens"]
    assert tokens.encode(tokenizer, row)["input_ids"].count(tokenizer.bos_token_id) == 1


def breach(tokenizer, row, change) -> str:
    encoded = tokens.encode(tokenizer, row)
    change(encoded)
    with pytest.raises(UserError) as caught:
        tokens.prove(tokenizer, [row], [encoded])
    assert f"row {row['id']}" in str(caught.value)
    return str(caught.value)


def test_an_untrained_end_of_turn_is_found(tokenizer):
    assert "end-of-turn" in breach(tokenizer, ROW, lambda e: e["labels"].__setitem__(-1, tokens.MASKED))


def test_a_second_bos_is_found(tokenizer):
    def double(encoded):
        encoded["input_ids"].insert(0, tokenizer.bos_token_id)
        encoded["labels"].insert(0, tokens.MASKED)

    assert "beginning-of-sequence" in breach(tokenizer, ROW, double)
    assert "beginning-of-sequence" in breach(tokenizer, PLAIN, double)


def test_a_missing_bos_is_found(tokenizer):
    def drop(encoded):
        del encoded["input_ids"][0], encoded["labels"][0]

    assert "beginning-of-sequence" in breach(tokenizer, PLAIN, drop)


def test_padding_among_the_labels_is_found(tokenizer):
    def pad(encoded):
        encoded["input_ids"].append(tokenizer.pad_token_id)
        encoded["labels"].append(tokenizer.pad_token_id)

    assert "padding" in breach(tokenizer, ROW, pad)


def test_a_shifted_label_is_found(tokenizer):
    def shift(encoded):
        encoded["labels"][-2], encoded["labels"][-1] = encoded["labels"][-1], encoded["labels"][-2]

    assert "differs from its token" in breach(tokenizer, ROW, shift)


def test_nothing_to_train_on_is_found(tokenizer):
    row = {"id": "r3", "messages": ROW["messages"][:1]}
    with pytest.raises(UserError, match="no token to train on"):
        tokens.prove(tokenizer, [row], [tokens.encode(tokenizer, row)])


def test_a_template_that_rewrites_earlier_turns_is_found(tokenizer, tmp_path):
    template = tmp_path / "forgetful.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{% if loop.last or m.role == 'user' %}"
        "{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    original = tokenizer.chat_template
    tokenizers.set_chat_template(tokenizer, str(template), True)
    with pytest.raises(UserError, match=r"row r1.*prefix-preserving"):
        tokens.encode(tokenizer, ROW)
    tokenizer.chat_template = original


def test_a_missing_template_is_named(tokenizer):
    with pytest.raises(UserError, match=r"prepare\.chat_template.*nowhere\.jinja"):
        tokenizers.set_chat_template(tokenizer, "nowhere.jinja", True)


def test_of_several_templates_the_default_is_taken(tokenizer, tmp_path):
    """Tokenizers that know tools carry named templates, which have no one digest."""
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    several.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert isinstance(loaded.chat_template, dict)
    tokenizers.set_chat_template(loaded, None, conversations=True)
    assert tokens.template_digest(loaded) == tokens.template_digest(tokenizer)


def test_the_plain_template_serves_a_real_pretrained_tokenizer(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/stories260K")
    tokenizers.set_chat_template(tokenizer, None, conversations=True)
    assert tokenizer.pad_token and "Assistant" in tokenizer.chat_template
    tokens.prove(tokenizer, [ROW, PLAIN], [tokens.encode(tokenizer, row) for row in (ROW, PLAIN)])


def templated(tokenizer, tmp_path, reply: str, row=ROW) -> str:
    """What is said of a template that writes an assistant's turn as `reply`, before its end-of-turn token."""
    template = tmp_path / "odd.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
        + reply
        + "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    original = tokenizer.chat_template
    tokenizers.set_chat_template(tokenizer, str(template), True)
    try:
        with pytest.raises(UserError, match="row r1") as caught:
            tokens.prove(tokenizer, [row], [tokens.encode(tokenizer, row)])
    finally:
        tokenizer.chat_template = original
    return str(caught.value)


@pytest.mark.parametrize("reply", ["{{ messages[0].content }}", "{{ m.content[:3] }}", "{{ m.content|upper }}"])
def test_a_template_that_writes_other_words_than_the_assistants_is_found(tokenizer, tmp_path, reply):
    """What the user says, half a reply or capitals would be trained on in the assistant's name."""
    assert "changes the assistant's 'it is four.' to" in templated(tokenizer, tmp_path, reply)


def test_an_end_of_turn_before_the_reply_ends_is_found(tokenizer, tmp_path):
    """The model would learn to stop there, and what follows would not be trained at all."""
    assert "trained 4 times in 2 turns" in templated(tokenizer, tmp_path, "{{ eos_token + m.content }}")
    quoting = {"id": "r4", "prompt": "how does a turn end ?", "completion": " with <|end|> and nothing else"}
    chatting = {"id": "r5", "messages": [ROW["messages"][0], {"role": "assistant", "content": "an <|end|> ends it"}]}
    for row in (quoting, chatting):
        with pytest.raises(UserError, match=rf"row {row['id']}.*trained 2 times in 1 turns"):
            tokens.prove(tokenizer, [row], [tokens.encode(tokenizer, row)])


def test_a_template_that_raises_names_the_row(tokenizer, tmp_path):
    said = templated(tokenizer, tmp_path, "{{ raise_exception('roles must alternate') }}")
    assert said == "chat template: row r1: TemplateError: roles must alternate"


def test_what_a_template_may_add_around_a_reply(tokenizer, tmp_path):
    """White space trimmed, and a line break after the end of turn: neither is a fault."""
    template = tmp_path / "usual.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content|trim + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    original = tokenizer.chat_template
    tokenizers.set_chat_template(tokenizer, str(template), True)
    row = {"id": "r6", "messages": [ROW["messages"][0], {"role": "assistant", "content": " it is four.\n"}]}
    encoded = tokens.encode(tokenizer, row)
    tokenizer.chat_template = original
    tokens.prove(tokenizer, [row], [encoded])
    assert encoded["labels"][-1] == tokens.MASKED and encoded["labels"].count(tokenizer.eos_token_id) == 1
