"""Tokenizers and chat templates of public model families: what is trained, what is refused, and by which key it works.

`families.py` has the tokenizers in small.
"""

import datetime

import pytest
from families import FAMILIES, TEMPLATES, tokenizer_of

from posttrain.config.sections import Prepare, Tokenizer
from posttrain.data import conversations
from posttrain.data import tokenizer as tokenizers
from posttrain.ground.errors import UserError
from posttrain.models import policy, token_contract, tokens

KEYS = {  # what a family needs beside its own tokenizer and template
    "llama3-base": {"end_of_turn": "<|eot_id|>"},
    "qwen2.5-base": {"end_of_turn": "<|im_end|>"},
    "qwen3": {"conversations": "split"},
    "gemma2": {"end_of_turn": "<end_of_turn>", "system_turns": "user"},
    "gemma3": {"end_of_turn": "<end_of_turn>"},
    "mistral-0.1": {"system_turns": "user"},
    "mistral-0.3": {"system_turns": "user"},
    "phi3": {"end_of_turn": "<|end|>"},
}
DATED = ("llama3", "llama3-base", "smollm3", "granite")  # their templates ask for today's date
ANSWERS = ("it is four.", "yes.")


def row(*replies: str, system: str | None = None, **more) -> dict:
    """A conversation with the given replies."""
    turns = [{"role": "system", "content": system}] if system else []
    for question, reply in zip(("what is two and two ?", "sure ?"), replies, strict=False):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"id": "r1", "messages": turns} | more


ONE, TWO, SYSTEM = row(ANSWERS[0]), row(*ANSWERS), row(ANSWERS[0], system="be brief.")
ROWS = {"one": ONE, "two": TWO, "system": SYSTEM, "thinking": row("<think>\nhm\n</think>\n\nit is four.")}


def section(folder, family: str, **keys) -> Prepare:
    tokenizer_of(family).save_pretrained(folder / family)
    return Prepare(tokenizer=Tokenizer(path=str(folder / family)), max_tokens=512, **keys)


def prepared(folder, family: str, rows: list[dict], **keys):
    """(tokenizer, rows) as `prepare` makes them, by its keys."""
    chosen = section(folder, family, **keys)
    sides = {task: {"train": list(rows) if task == "sft" else []} for task in ("sft", "preference", "kto")}
    conversations.suited(chosen, sides, [])
    return tokenizers.make_tokenizer(chosen, sides, []), sides["sft"]["train"]


def trained(tokenizer, of: dict) -> list[str]:
    """The texts of a row's runs of tokens that are trained, after a check of the token contract."""
    (encoded,) = token_contract.encode_all(tokenizer, [of])
    if "prompt_ids" in encoded:
        return [tokenizer.decode(encoded["completion_ids"])]
    runs, before = [], tokens.MASKED
    for label in encoded["labels"]:
        if label != tokens.MASKED:
            runs = [*runs, []] if before == tokens.MASKED else runs
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("of", ROWS)
def test_a_family_trains_each_reply_and_its_end_of_turn(family, of, tmp_path):
    tokenizer, rows = prepared(tmp_path, family, [of := ROWS[of]], **KEYS.get(family, {}))
    end = KEYS.get(family, {}).get("end_of_turn", FAMILIES[family][2])
    texts = [text for part in rows for text in trained(tokenizer, part)]
    if family == "qwen3":  # it thinks before each reply
        texts = [text.removeprefix("<think>\n\n</think>\n\n") for text in texts]
    replies = [turn["content"] for turn in of["messages"] if turn["role"] == "assistant"]
    assert [text.removeprefix(" ") for text in texts] == [reply + end for reply in replies]
    for part in rows:
        ids, prompt = tokens.encode(tokenizer, part)["input_ids"], tokens.encode_prompt(tokenizer, part)
        assert ids[: len(prompt)] == prompt, "a policy is asked as it was trained"
        bos = tokenizer.bos_token_id
        assert bos in (None, tokenizer.eos_token_id) or ids.count(bos) == (1 if family != "phi3" else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pairs_of_a_family_end_with_its_end_of_turn(family, tmp_path):
    turns = SYSTEM["messages"]
    pair = {"id": "p1", "prompt": turns[:-1], "chosen": turns[-1:], "rejected": [turns[-1] | {"content": "no."}]}
    keys = KEYS.get(family, {})
    if keys.get("system_turns"):
        pair = conversations.without_system_turn(pair)
    tokenizer, _ = prepared(tmp_path, family, [ONE], **keys)
    encoded = tokens.alone(tokenizer, tokens.answers(tokenizer, pair))
    assert {encoded[f"{side}_ids"][-1] for side in ("chosen", "rejected")} == {tokenizer.eos_token_id}
    assert tokenizer.decode(encoded["rejected_ids"]).endswith("no." + tokenizer.eos_token)


@pytest.mark.parametrize(
    ("family", "of", "words"),
    [
        ("llama3-base", ONE, r"set prepare\.end_of_turn: '<\|eot_id\|>'"),
        ("qwen2.5-base", ONE, r"set prepare\.end_of_turn: '<\|im_end\|>'"),
        ("gemma2", ONE, r"set prepare\.end_of_turn: '<end_of_turn>'"),
        ("gemma3", ONE, r"set prepare\.end_of_turn: '<end_of_turn>'"),
        ("phi3", ONE, r"ends a reply with <\|end\|>, not .*<\|endoftext\|>; set prepare\.end_of_turn: '<\|end\|>'"),
        ("gemma2", SYSTEM, r"System role not supported; `prepare\.system_turns: user`"),
        ("mistral-0.1", SYSTEM, r"must alternate.*`prepare\.system_turns: user`"),
        ("mistral-0.3", SYSTEM, r"leaves out the system turn 'be brief\.'; `prepare\.system_turns: user`"),
        ("qwen3", TWO, r"not prefix-preserving.*`prepare\.conversations: split`"),
    ],
)
def test_a_refusal_names_the_key_that_helps(family, of, words, tmp_path):
    """Controls: with the key each works, in the tests above."""
    with pytest.raises(UserError, match=words):
        tokens.encode(prepared(tmp_path, family, [of])[0], of)


@pytest.mark.parametrize("family", FAMILIES)
def test_lm_eval_asks_with_the_tokens_of_training(family, tmp_path):
    """One BOS, where the template or the tokenizer has one, and the same generation prompt."""
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, _ = prepared(tmp_path, family, [ONE], **KEYS.get(family, {}))
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=256)
    asked = harness.tok_encode(harness.apply_chat_template(ONE["messages"][:-1]))
    assert asked == tokens.encode_prompt(tokenizer, ONE)
    assert asked == tokens.encode(tokenizer, ONE)["input_ids"][: len(asked)]


def test_a_kto_row_trains_its_completion_alone(tmp_path):
    """Replies of its prompt are context, which Qwen3 writes without their thinking."""
    turns = row(*ANSWERS)["messages"]
    kto = {"id": "k1", "prompt": turns[:-1], "completion": turns[-1:], "label": True}
    tokenizer, _ = prepared(tmp_path, "qwen3", [ONE])
    assert trained(tokenizer, kto) == ["<think>\n\n</think>\n\nyes.<|im_end|>"]


def test_a_split_conversation_trains_each_reply_as_it_is_asked_for(tmp_path):
    """Qwen3 drops the thinking of earlier replies: each is trained with its own, after the others without theirs."""
    of = row("<think>\nhm\n</think>\n\nit is four.", "<think>\nso\n</think>\n\nyes.")
    tokenizer, rows = prepared(tmp_path, "qwen3", [of], conversations="split")
    assert [part["id"] for part in rows] == ["r1#1", "r1"]
    assert trained(tokenizer, rows[0]) == ["<think>\nhm\n</think>\n\nit is four.<|im_end|>"]
    assert trained(tokenizer, rows[1]) == ["<think>\nso\n</think>\n\nyes.<|im_end|>"]
    text = tokenizer.decode(tokens.encode(tokenizer, rows[1])["input_ids"])
    assert "assistant\nit is four.<|im_end|>" in text and "hm" not in text, "as the model is asked for its second reply"


def written(tokenizer, monkeypatch, day: int) -> str:
    """The text of a conversation on another day, by the clock that transformers reads."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    return tokenizer.apply_chat_template(ONE["messages"], tokenize=False)


@pytest.mark.parametrize("family", DATED)
def test_a_day_changes_no_text(family, tmp_path, monkeypatch):
    """The date is in the template that travels with the policy, also to lm-eval and to an export."""
    own, keys = tokenizer_of(family), KEYS.get(family, {})
    assert written(own, monkeypatch, 1) != written(own, monkeypatch, 2), "control"
    tokenizer, _ = prepared(tmp_path, family, [ONE], **keys)
    text = written(tokenizer, monkeypatch, 1)
    assert text == written(tokenizer, monkeypatch, 2) and "July" in text.replace("Jul ", "July ") and "2024" in text
    dated, _ = prepared(tmp_path, family, [ONE], date="2025-01-03", **keys)
    expected = own.apply_chat_template(ONE["messages"], tokenize=False)  # on 2 January 2031
    for old, new in (("02 Jan", "03 Jan"), ("January 02", "January 03"), ("2031", "2025")):
        expected = expected.replace(old, new)
    assert written(dated, monkeypatch, 2) == expected, "the rest of the text is the template's own"
    tokenizer.save_pretrained(tmp_path / "again")
    loaded = type(tokenizer).from_pretrained(tmp_path / "again")
    assert written(loaded, monkeypatch, 2) == text
    digests = [policy.template_digest(one) for one in (tokenizer, loaded, dated)]
    assert digests[0] == digests[1] != digests[2]


def test_a_template_that_starts_with_white_space_keeps_it(tmp_path):
    """transformers drops the line break after a block and the spaces before one."""
    day = datetime.datetime(2024, 7, 26)
    for start in ("\n", "  ", "", "\n\n  ", "{% if true %}\n  {% endif %}"):
        own = tokenizer_of("smollm3")
        own.chat_template = start + "{% if true %}x{% endif %} {{ 'a' }}\n{{ messages[0].content }}"
        plain = own.apply_chat_template(ONE["messages"], tokenize=False)
        asked = own.chat_template + "{{ strftime_now('%Y-%m-%d %e %B') }}"
        own.chat_template = tokenizers.dated(asked, day)
        text = own.apply_chat_template(ONE["messages"], tokenize=False)
        assert text == plain + "2024-07-26 26 July"


def test_an_earlier_date_stays_until_another_is_given(tmp_path):
    """A policy that was exported is the next base. A word in a comment is no date of ours."""
    tokenizer, _ = prepared(tmp_path, "phi3", [ONE], end_of_turn="<|end|>")
    plain = tokenizer.chat_template
    tokenizer.chat_template = "{# macro strftime_now #}" + plain + "{{ strftime_now('%Y') }}"
    for date, year in (("2021-05-06", "2021"), (None, "2021"), ("2022-05-06", "2022")):
        tokenizers.set_end_of_turn(tokenizer, "<|end|>")
        tokenizers.set_date(tokenizer, date)
        text = tokenizer.apply_chat_template(ONE["messages"], tokenize=False)
        assert text.endswith(f"<|end|>\n<|endoftext|>{year}")
        tokenizers.refuse_unsteady(tokenizer, [(ONE, ONE["messages"])])


def test_a_template_that_writes_at_random_is_refused(tmp_path):
    template = tmp_path / "odd.jinja"
    own = (TEMPLATES / "qwen25.jinja").read_text()
    for odd in ("{{ ['a', 'b']|random }}", "{{ lipsum(1) }}"):
        template.write_text(own + odd)
        with pytest.raises(UserError, match=r"prepare\.chat_template: .*at random"):
            prepared(tmp_path, "qwen2.5", [ONE], chat_template=str(template))
    template.write_text(own)
    prepared(tmp_path, "qwen2.5", [ONE], chat_template=str(template))


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("qwen2.5", {"date": "2025-01-03"}, r"prepare\.date: the chat template does not ask for the date"),
        ("qwen2.5", {"end_of_turn": "<|over|>"}, r"prepare\.end_of_turn: '<\|over\|>' is no token.*<\|im_end\|>"),
    ],
)
def test_a_key_without_effect_is_refused(family, keys, words, tmp_path):
    with pytest.raises(UserError, match=words):
        prepared(tmp_path, family, [ONE], **keys)


def test_a_template_that_is_no_jinja_is_told_in_words(tmp_path):
    template = tmp_path / "broken.jinja"
    for broken in ("x\n{{ 'open", "x\n{% for m in messages %}"):  # the second breaks where it is read as a whole
        template.write_text(broken)
        with pytest.raises(UserError, match=r"chat.template.*TemplateSyntaxError"):
            prepared(tmp_path, "qwen2.5", [ONE], chat_template=str(template))


def test_a_template_that_reads_a_flag_from_the_system_turn_is_not_one_that_loses_it(tmp_path):
    """SmolLM3's takes `/no_think` out of the text; control: one whose text is the same without it."""
    template = tmp_path / "flag.jinja"
    own = (TEMPLATES / "qwen25.jinja").read_text().replace("messages[0]['content']", "messages[0]['content'][9:]")
    of = row("it is four.", system="/no_think")
    for reading, lost in (("{{ 'no' if '/no_think' == messages[0].content else 'yes' }}", False), ("", True)):
        template.write_text(reading + own)
        tokenizer, _ = prepared(tmp_path, "qwen2.5", [ONE], chat_template=str(template))
        tokenizer.chat_template = tokenizer.chat_template.replace("[9:]", "[:0]")
        if lost:
            with pytest.raises(UserError, match="leaves out the system turn '/no_think'"):
                tokens.encode(tokenizer, of)
        else:
            tokens.encode(tokenizer, of)
