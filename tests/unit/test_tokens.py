"""The token contract: what must hold of tokens and labels, and that a breach of each part is found."""

import copy

import pytest

from posttrain.data import tokenizer as tokenizers
from posttrain.ground.errors import UserError
from posttrain.models import chat as chat_template
from posttrain.models import policy, token_contract, tokens

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
    assert token_contract.check(tokenizer, row) == len(tokens.encode(tokenizer, row)["input_ids"])
    assert tokens.encode(tokenizer, row)["input_ids"].count(tokenizer.bos_token_id) == 1


def breach(tokenizer, row, change) -> str:
    encoded = tokens.encode(tokenizer, row)
    change(encoded)
    return " ".join(token_contract.faults_of(tokenizer, token_contract.special_of(tokenizer), row, **encoded).values())


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
        token_contract.check(tokenizer, row)


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
    assert policy.template_digest(loaded) == policy.template_digest(tokenizer)


def test_the_plain_template_serves_a_real_pretrained_tokenizer(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/stories260K")
    tokenizers.set_chat_template(tokenizer, None, conversations=True)
    assert tokenizer.pad_token and "Assistant" in tokenizer.chat_template
    assert all(token_contract.check(tokenizer, row) for row in (ROW, PLAIN))


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
            token_contract.check(tokenizer, row)
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


PAIR = {
    "id": "p1",
    "prompt": ROW["messages"][:1],
    "chosen": [{"role": "assistant", "content": "it is four."}],
    "rejected": [{"role": "assistant", "content": "it is five."}],
}


def reason(tokenizer, row) -> str:
    """Why a row cannot be trained on."""
    with pytest.raises(chat_template.Breach, match=f"row {row['id']}") as caught:
        token_contract.refuse_control_text(tokenizer, row)
        token_contract.check(tokenizer, row)
    return caught.value.reason


def test_good_rows_of_every_task_are_counted_and_bad_ones_refused(tokenizer):
    kto = {"id": "k1", "prompt": PAIR["prompt"], "completion": PAIR["chosen"], "label": True}
    plain = {"id": "p2", "prompt": "two and two is", "chosen": " four.", "rejected": " the number five."}
    for row in (ROW, PLAIN, PAIR, kto, plain):
        token_contract.refuse_control_text(tokenizer, row)
        (encoded,) = token_contract.encode_all(tokenizer, [row])
        sides = token_contract.answers_of(row)
        if sides:
            assert encoded == tokens.alone(tokenizer, tokens.answers(tokenizer, row, sides))
            longest = len(encoded["prompt_ids"]) + max(len(encoded[f"{side}_ids"]) for side in sides)
        else:
            assert encoded == tokens.encode(tokenizer, row)
            longest = len(encoded["input_ids"])
        assert token_contract.check(tokenizer, row) == longest
    for row in (ROW, PLAIN, PAIR, kto, plain):
        for key in {"messages", "prompt", "completion", "chosen", "rejected"} & row.keys():
            text = f"it <|end|> {key}"
            changed = text if isinstance(row[key], str) else [*row[key][:-1], row[key][-1] | {"content": text}]
            assert reason(tokenizer, row | {key: changed}) == "control_text"


def test_a_row_that_the_template_cannot_write_stops_no_other_of_its_batch(tokenizer):
    """The template is called once for all rows; each has the tokens that it has alone."""
    refusing = copy.deepcopy(tokenizer)
    refuse = "{% if messages[0].content == 'sure ?' %}{{ raise_exception('never sure') }}{% endif %}"
    refusing.chat_template = refuse + tokenizer.chat_template
    bad = ROW | {"id": "r9", "messages": ROW["messages"][2:]}
    rows = [ROW, bad, PLAIN, PAIR, ROW | {"id": "r10", "messages": ROW["messages"][:2]}]
    encoded = token_contract.encode_all(refusing, rows)
    assert encoded[1].reason == "chat_template" and "row r9" in str(encoded[1]) and "never sure" in str(encoded[1])
    for row, ids in zip([rows[0], *rows[2:]], [encoded[0], *encoded[2:]], strict=True):
        assert [ids] == token_contract.encode_all(tokenizer, [row])
    assert not any(isinstance(ids, chat_template.Breach) for ids in token_contract.encode_all(tokenizer, rows))


def test_labels_before_masked_tokens_are_compared_too(tokenizer):
    """A template may write a line break after the end of turn, which is not trained."""
    special = token_contract.special_of(tokenizer)
    ids, labels = [special.bos, 7, 8, special.eos, 9], [tokens.MASKED, 7, 8, special.eos, tokens.MASKED]
    assert token_contract.faults_of(tokenizer, special, PLAIN, ids, labels) == {}
    assert "label" in token_contract.faults_of(tokenizer, special, PLAIN, ids, [tokens.MASKED, 7, 7, *labels[3:]])


def test_a_chat_that_is_written_out_in_plain_text_is_told_to_be_given_as_messages(tokenizer):
    for row, told in ((PLAIN | {"prompt": "<|user|>two and two is"}, True), (PAIR, False)):
        changed = row if told else row | {"chosen": [{"role": "assistant", "content": "<|user|>"}]}
        with pytest.raises(chat_template.Breach, match=r"'<\|user\|>', a control token") as caught:
            token_contract.refuse_control_text(tokenizer, changed)
        assert ("give a chat as messages" in str(caught.value)) == told


def test_a_pair_of_equal_tokens_is_refused(tokenizer):
    """A tokenizer that lowers capitals; control: with the ordinary one the answers differ."""
    from tokenizers import normalizers

    pair = PAIR | {"rejected": [{"role": "assistant", "content": "IT is four."}]}
    plain = {"id": "p2", "prompt": "two and two is", "chosen": " four.", "rejected": " Four."}
    lowering = copy.deepcopy(tokenizer)
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    for row in (pair, plain):
        token_contract.check(tokenizer, row)
        assert reason(lowering, row) == "equal_answers"


def test_a_pair_whose_system_turn_the_template_leaves_out_is_refused(tokenizer):
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = tokenizer.chat_template.replace("in messages", "in messages if message.role != 'system'")
    pair = PAIR | {"prompt": [{"role": "system", "content": "be brief"}, *PAIR["prompt"]]}
    token_contract.check(tokenizer, pair)
    assert reason(silent, pair) == "lost_turn"


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
    token_contract.check(tokenizer, row)
    tokenizer.chat_template = original
    assert encoded["labels"][-1] == tokens.MASKED and encoded["labels"].count(tokenizer.eos_token_id) == 1
