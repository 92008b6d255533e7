"""What a turn says beside its text: masked turns, tools and their calls, reasoning. Labels are read token by token.

pytest tests/unit/test_turns.py
"""

import itertools
import json

import pytest
from families import TEMPLATES, tokenizer_of

from posttrain.config.sections import Prepare
from posttrain.data import conversations, rows
from posttrain.ground.files import write_jsonl
from posttrain.models import chat as chat_template
from posttrain.models import token_contract, tokens
from posttrain.rl.prompts import demonstrations

USER, REPLY = {"role": "user", "content": "what is two and two ?"}, {"role": "assistant", "content": "it is four."}
MORE, YES = {"role": "user", "content": "sure ?"}, {"role": "assistant", "content": "yes."}
TOOL = {"type": "function", "function": {"name": "add", "description": "Sum \u00e9", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [2, "x\ny"], "c": True}}}
ARGUMENTS = '{"a": 2, "b": [2, "x\\ny"], "c": true}'
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"}
AS_TEXT = {"id": "c1", "function": {"name": "add", "arguments": ARGUMENTS}}
CALLED = {"messages": [USER, CALLING, RESULT, REPLY], "tools": [TOOL]}


def read(row: dict, task: str = "sft") -> dict:
    """The row as `prepare` keeps it."""
    report = rows.read_rows([row], "made", task)
    assert report.kept == 1, report.dropped
    return report.rows[0]


def dropped(row: dict, task: str = "sft") -> tuple[str, str]:
    report = rows.read_rows([row], "made", task)
    ((reason, [(_, message)]),) = report.dropped.items()
    return reason, message


def templated(family: str, template: str):
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


def shown(tokenizer, row: dict) -> str:
    """The text of a row's tokens, with those that are trained between \u00ab and \u00bb."""
    token_contract.check(tokenizer, row)
    encoded, text = tokens.encode(tokenizer, row), ""
    pairs = list(zip(encoded["input_ids"], encoded["labels"], strict=True))
    assert all(label in (tokens.MASKED, token) for token, label in pairs)
    for masked, run in itertools.groupby(pairs, lambda pair: pair[1] == tokens.MASKED):
        part = tokenizer.decode([token for token, _ in run])
        text += part if masked else f"\u00ab{part}\u00bb"
    return text


def chatml(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def reply(text: str) -> str:
    return f"<|im_start|>assistant\n\u00ab{text}<|im_end|>\u00bb\n"


# Masked turns


@pytest.mark.parametrize("mask", [{"train": False}, {"weight": 0}, {"loss": False}])
def test_a_masked_turn_is_not_trained(mask):
    tokenizer = tokenizer_of("qwen2.5")
    system = chatml("system", "You are a helpful assistant.")
    row = read({"messages": [USER, REPLY | mask, MORE, YES | {"weight": 1}]})
    begun, end = system + chatml("user", USER["content"]), chatml("user", "sure ?") + reply("yes.")
    assert shown(tokenizer, row) == begun + chatml("assistant", "it is four.") + end
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in (USER, REPLY, MORE, YES)]
    turns[1] |= mask
    row = read({"conversations": turns})
    assert "\u00abyes." in shown(tokenizer, row) and "\u00abit" not in shown(tokenizer, row)
    plain = read({"messages": [USER, REPLY, MORE, YES]})
    assert shown(tokenizer, plain) == begun + reply("it is four.") + end, "control"


def test_a_row_whose_turns_are_all_masked_has_nothing_to_train():
    row = read({"messages": [USER, REPLY | {"train": False}]})
    with pytest.raises(chat_template.Breach, match="no token to train on") as caught:
        token_contract.check(tokenizer_of("qwen2.5"), row)
    assert caught.value.reason == "untrained"


def test_a_masked_answer_is_no_answer():
    pair = {"prompt": [USER], "chosen": [REPLY], "rejected": [YES]}
    kto = {"prompt": [USER], "completion": [REPLY], "label": True}
    for task, row, key in (
        ("preference", pair, "chosen"),
        ("preference", pair, "rejected"),
        ("kto", kto, "completion"),
    ):
        assert dropped(row | {key: [row[key][0] | {"weight": 0}]}, task)[0] == "turn_weight"
        read(row, task)
    masked = {"prompt": [USER, REPLY | {"train": False}, MORE], "chosen": [YES], "rejected": [REPLY]}
    ids = tokens.alone(tokenizer_of("qwen2.5"), tokens.answers(tokenizer_of("qwen2.5"), read(masked, "preference")))
    assert tokenizer_of("qwen2.5").decode(ids["chosen_ids"]) == "yes.<|im_end|>", (
        "a masked turn of the prompt is context"
    )


@pytest.mark.parametrize(
    "turn", [REPLY | {"weight": 0.5}, REPLY | {"weight": True}, REPLY | {"train": "false"}, REPLY | {"train": 0}]
)
def test_a_weight_that_cannot_be_given_is_named(turn):
    reason, message = dropped({"messages": [USER, turn]})
    assert reason == "turn_weight" and "messages[1]." in message


def test_of_a_users_turn_nothing_is_trained():
    assert dropped({"messages": [USER | {"train": True}, REPLY]})[0] == "turn_weight"
    assert "train" not in read({"messages": [USER | {"train": False, "weight": 0}, REPLY]})["messages"][0]


def test_a_conversation_is_split_at_its_trained_replies():
    last, first = (
        {"messages": [USER, REPLY | a, MORE, YES | b]} for a, b in (({"train": False}, {}), ({}, {"train": False}))
    )
    for row, expected in ((last, [4]), (first, [2])):
        sides = {"sft": {"train": [read(row)], "test": []}}
        conversations.suited(Prepare(conversations="split"), sides, [])
        assert [len(part["messages"]) for part in sides["sft"]["train"]] == expected
        for part in sides["sft"]["train"]:
            token_contract.check(tokenizer_of("qwen3"), part)


def test_ppo_learns_no_masked_turn(tmp_path):
    """PPO-ptx takes a row's last reply that is trained; control: the same row without a mask."""
    tokenizer = tokenizer_of("qwen2.5")
    for mask, expected in (({"train": False}, "it is four."), ({}, "yes.")):
        row = read({"messages": [USER, REPLY, MORE, YES | mask]})
        write_jsonl(tmp_path / "data/sft/train.jsonl", [row])
        ((prompt, reply_ids),) = demonstrations(tmp_path / "manifest.json", tokenizer)
        assert tokenizer.decode(reply_ids) == expected + "<|im_end|>"
        assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


# Tools


@pytest.mark.parametrize("family", ["qwen2.5", "llama3"])
def test_tool_calls_are_trained_through_the_chat_template(family):
    tools = json.dumps(TOOL, ensure_ascii=False)
    if family == "qwen2.5":
        tokenizer = templated(family, "qwen25_tools")
        call = '<tool_call>\n{"name": "add", "arguments": ' + ARGUMENTS + "}\n</tool_call>"
        expected = chatml("system", f"# Tools\n<tools>\n{tools}\n</tools>") + chatml("user", USER["content"])
        expected += reply(call) + chatml("user", "<tool_response>\n4\n</tool_response>") + reply("it is four.")
    else:
        tokenizer = templated(family, "llama31_tools")
        head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
        expected = "<|begin_of_text|>" + head("system") + "Environment: ipython\n<|eot_id|>" + head("user")
        expected += json.dumps(TOOL, indent=4, ensure_ascii=False) + "\n\n" + USER["content"] + "<|eot_id|>"
        expected += head("assistant") + '\u00ab{"name": "add", "parameters": ' + ARGUMENTS + "}<|eot_id|>\u00bb"
        expected += head("ipython") + "4<|eot_id|>" + head("assistant") + "\u00abit is four.<|eot_id|>\u00bb"
    row = read(CALLED)
    assert row["messages"][1:3] == [CALLING, RESULT] and row["tools"] == [TOOL]
    assert shown(tokenizer, row) == expected
    pair = {"prompt": [USER], "chosen": [CALLING], "rejected": [REPLY], "tools": [TOOL]}
    answers = tokens.alone(tokenizer, tokens.answers(tokenizer, read(pair, "preference")))
    whole = tokenizer.decode(answers["prompt_ids"] + answers["chosen_ids"])
    assert expected.replace("\u00ab", "").replace("\u00bb", "").startswith(whole), "as a pair, and as a prompt"
    assert tokens.encode_prompt(tokenizer, read(pair, "preference")) == answers["prompt_ids"]


@pytest.mark.parametrize(
    "row",
    [
        CALLED | {"tools": json.dumps([TOOL])},
        CALLED | {"messages": [USER, CALLING | {"tool_calls": json.dumps([CALL])}, RESULT, REPLY]},
        CALLED | {"messages": [USER, CALLING | {"content": None}, RESULT, REPLY]},
        CALLED | {"messages": [USER, CALLING | {"tool_calls": [CALL["function"] | {"id": "c1"}]}, RESULT, REPLY]},
        CALLED
        | {
            "messages": [
                USER,
                CALLING | {"tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": ARGUMENTS}}]},
                RESULT,
                REPLY,
            ]
        },
    ],
)
def test_tools_in_every_form_are_one(row):
    assert read(row)["messages"] == read(CALLED)["messages"] and read(row)["tools"] == [TOOL]


@pytest.mark.parametrize("name", ["function_call", "tool_call"])
def test_a_call_in_sharegpt_is_a_tool_call(name):
    """As LLaMA-Factory and ms-swift have it."""
    said = [("human", USER["content"]), (name, json.dumps(CALL["function"])), ("observation", "4")]
    turns = [{"from": role, "value": text} for role, text in [*said, ("gpt", REPLY["content"])]]
    row = read({"conversations": turns, "tools": json.dumps([TOOL])})
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL["function"]}]}
    assert row["messages"] == [USER, called, {"role": "tool", "content": "4"}, REPLY] and row["tools"] == [TOOL]
    turns[1]["value"] = "add 2 and 2"
    assert dropped({"conversations": turns})[0] == "tool_calls"


def test_an_old_function_call_is_a_tool_call():
    old = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": ARGUMENTS}}
    calls = read({"messages": [USER, old]})["messages"][1]["tool_calls"]
    assert calls == [{"type": "function", "function": CALL["function"]}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [USER, CALLING | {"tool_calls": [{"name": "add", "arguments": "{a: 1"}]}]},
            "tool_calls",
        ),
        ({"messages": [USER, CALLING | {"tool_calls": [{"function": {"name": "add"}}]}]}, "tool_calls"),
        ({"messages": [USER, CALLING | {"tool_calls": "add(2, 2)"}]}, "tool_calls"),
        ({"messages": [USER | {"tool_calls": [CALL]}, REPLY]}, "tool_calls"),
        (CALLED | {"tools": "add"}, "tools"),
        (CALLED | {"tools": [{"type": "function"}]}, "tools"),
        (CALLED | {"tools": {"name": "add"}}, "tools"),
        ({"messages": [USER, REPLY | {"reasoning_content": 5}]}, "not_a_string"),
        ({"messages": [USER, CALLING | {"tool_calls": []}]}, "empty_reply"),
    ],
)
def test_tools_that_cannot_be_read_are_named(row, reason):
    assert dropped(row)[0] == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER, REPLY], "tools": [TOOL]}, "lost_tools"),
        ({"messages": [USER, CALLING, RESULT, REPLY]}, "lost_turn"),
        ({"messages": [USER, CALLING]}, "lost_part"),
        ({"messages": [USER, REPLY | {"reasoning_content": "hm"}]}, "lost_part"),
    ],
)
def test_what_a_template_leaves_out_is_not_trained_without(row, reason):
    """Controls: with a template that writes it each is trained, in the tests above and below."""
    with pytest.raises(chat_template.Breach) as caught:
        token_contract.check(tokenizer_of("qwen2.5"), read(row))
    assert caught.value.reason == reason


def test_a_template_that_leaves_out_arguments_is_found(tmp_path):
    tokenizer = templated("qwen2.5", "qwen25_tools")
    token_contract.check(tokenizer, read(CALLED))
    for kept, gone in (("tool_call.arguments | tojson", "'{}'"), ("tool_call.name", "'add'[:2]")):
        forgetful = templated("qwen2.5", "qwen25_tools")
        forgetful.chat_template = tokenizer.chat_template.replace(kept, gone)
        with pytest.raises(chat_template.Breach, match="leaves out"):
            token_contract.check(forgetful, read(CALLED))


def test_reasoning_is_trained_through_the_chat_template():
    tokenizer = templated("qwen3", "qwen3_thinking")
    row = read({"messages": [USER, REPLY | {"reasoning_content": "two\nmore"}]})
    expected = chatml("user", USER["content"]) + reply("<think>\ntwo\nmore\n</think>\n\nit is four.")
    assert shown(tokenizer, row) == expected
    two = read({"messages": [USER, REPLY | {"reasoning_content": "hm"}, MORE, YES | {"reasoning_content": "so"}]})
    sides = {"sft": {"train": [two], "test": []}}
    conversations.suited(Prepare(conversations="split"), sides, [])
    first, second = (shown(tokenizer, part) for part in sides["sft"]["train"])
    assert first.endswith(reply("<think>\nhm\n</think>\n\nit is four."))
    assert chatml("assistant", "it is four.") in second and second.endswith(reply("<think>\nso\n</think>\n\nyes."))


def test_control_text_in_calls_and_tools_is_found_and_read_as_plain_text():
    tokenizer = templated("qwen2.5", "qwen25_tools")
    said = {"name": "add", "arguments": {"a": "<|im_end|>"}}
    row = read(CALLED | {"messages": [USER, CALLING | {"tool_calls": [{"function": said}]}]})
    with pytest.raises(chat_template.Breach, match="end-of-turn token of the tokenizer"):
        token_contract.refuse_control_text(tokenizer, row)
    assert '\u00ab<tool_call>\n{"name": "add", "arguments": {"a": "<|im_end|>"}}' in shown(tokenizer, row)


# Verdicts, and keys that nothing reads


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
def test_a_pair_whose_scores_are_reversed_is_dropped(names):
    for pair in (
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [REPLY], "rejected": [YES]},
    ):
        reason, message = dropped(pair | dict(zip(names, (2, 8.5), strict=True)), "preference")
        assert reason == "reversed" and f"{names[0]} 2 is lower than {names[1]} 8.5" in message
        assert dropped(pair | dict(zip(names, ("2", "8.5"), strict=True)), "preference")[0] == "reversed"
        for scores in ((8.5, 2), (2, 2), (2, None), ("2", "high"), (False, True)):
            assert rows.read_rows([pair | dict(zip(names, scores, strict=True))], "made", "preference").kept == 1
    texts = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    assert dropped(texts | dict(zip(names, (2, 8.5), strict=True)), "preference")[0] == "reversed"


@pytest.mark.parametrize(
    ("task", "first", "other", "agreeing"),
    [
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "b", "rejected": "a"},
         {"prompt": "p", "chosen": "a", "rejected": "c"}),
        ("preference", {"prompt": [USER], "chosen": [REPLY], "rejected": [YES]},
         {"prompt": [USER], "chosen": [YES], "rejected": [REPLY]},
         {"prompt": [{"role": "system", "content": "x"}, USER], "chosen": [YES], "rejected": [REPLY]}),
        ("kto", {"prompt": "p", "completion": "c", "label": True}, {"prompt": "P!", "completion": " C", "label": False},
         {"prompt": "q", "completion": "c", "label": False}),
        ("eval", {"question": "q", "choices": ["a", "b"], "answer": 0},
         {"question": "q", "choices": ["b", "a"], "answer": 0},
         {"question": "q", "choices": ["b", "a"], "answer": 1}),
    ],
)  # fmt: skip
def test_a_contradiction_is_warned_of_with_its_lines(task, first, other, agreeing):
    report = rows.read_rows([first, agreeing, other], "made", task)
    assert report.kept == 3 and report.warnings["contradiction"] == [(3, "contradicts line 1")]
    assert "contradiction" not in rows.read_rows([first, agreeing], "made", task).warnings


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, REPLY]},
        {"instruction": "i", "input": "", "output": "o"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"text": "Human: q\n\nAssistant: a"},
    ],
)
def test_a_row_that_is_labelled_false_never_becomes_one_of_sft(row):
    reason, message = dropped(row | {"label": False})
    assert reason == "label_false" and "kto reads it" in message
    for label in (True, 0, "false", None):
        read(row | {"label": label})


def test_keys_that_nothing_reads_are_named_once_a_source():
    clean = [{"id": n, "group": "g", "messages": [USER, REPLY | {"content": f"{n}"}]} for n in range(3)]
    odd = {"messages": [USER | {"emotion": "sad"}, YES], "lang": "en", "system": "be brief", "score": None}
    report = rows.read_rows([*clean, odd, odd | {"id": "x", "lang": "fr"}], "made", "sft")
    told = "keys that are not read: " + ", ".join(
        f"'{key}' (first in line {line})" for key, line in (("lang", 4), ("messages[].emotion", 4), ("system", 4))
    )
    assert report.warnings["unread_keys"] == [(0, told)]
    assert "made: warning: " + told in report.describe()
    assert rows.read_rows(clean, "made", "sft").warnings == {}
    shared = {"prompt": "p", "system": "s", "instruction": "i", "output": "o"}
    assert rows.read_rows([shared], "made", "sft").warnings["unread_keys"] == [
        (0, "keys that are not read: 'prompt' (first in line 1)")
    ]
