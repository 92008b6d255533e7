"""Reading rows: the forty real bad files of ../shared, files made here, splits and leaks.

pytest tests/unit/test_rows.py
"""

import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from posttrain.data import layouts, repeats, rows, texts
from posttrain.data.overlap import overlap
from posttrain.data.stored import store
from posttrain.ground import workers
from posttrain.ground.errors import UserError
from posttrain.models import tokens
from posttrain.stages.prepare import split

SHARED = Path(os.environ.get("POSTTRAIN_SHARED") or Path(__file__).parents[2] / ".." / "shared").resolve()
DATA, BAD = SHARED / "data", SHARED / "data" / "bad"
INDEX = BAD / "index.jsonl"
CASES = [json.loads(line) for line in INDEX.read_text("utf-8").splitlines()] if INDEX.is_file() else []
needs_shared = pytest.mark.skipif(not CASES, reason=f"no {INDEX}: set POSTTRAIN_SHARED to the shared folder")

# What the message for each file must say: the words of the index's `reason` that name the defect.
NAMED = {
    "01": "unterminated string",
    "03": "trailing comma",
    "05": "file has no rows",
    "07": "byte order mark stripped",
    "09": "extra data after the first object; hint: CR line ends",
    "11": "not UTF-8 at line 2, byte offset 416",
    "13": "control character in string",
    "15": "field messages[1].content is not valid Unicode",
    "17": "kept",
    "19": "likely mojibake",
    "21": "top level is an array; hint: this is JSON, not JSON Lines",
    "23": "extra data after the first object",
    "25": "non-finite number in field weight",
    "27": "row is over the max length",
    "29": "line over the size limit",
    "31": "not gzip data",
    "33": "not text (NUL bytes)",
    "35": "missing field messages",
    "37": "messages[1].content must be a string",
    "39": "messages must be a list, found a string; hint: JSON text inside a string",
    "43": "missing field messages; hint: did you mean 'mesages'",
    "45": "id g000 on lines 1 and 2",
    "47": "first non-system turn must be user",
    "49": "empty assistant turn",
    "51": "messages[0] empty",
    "53": "allowed: system, user, assistant, tool",
    "55": "messages is empty",
    "59": "near-duplicate of line 1",
    "61": "chosen equals rejected: no signal",
    "63": "prompts differ before the last reply",
    "65": " while chosen is a | while rejected is a string",
    "67": "label must be true or false",
    "69": "chosen longer in 20/20 rows",
    "73": "in range|2 or more, all different|choices[1] is empty",
    "75": "is a directory",
    "77": "too few rows for a train/test split",
}
UNREMARKABLE = {"too_few_rows"}  # a warning that small test files earn by being small


def write(path, objects) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects), "utf-8")
    return path


def chat(*contents) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def refusal(path, task="sft", **options) -> str:
    with pytest.raises(UserError) as caught:
        rows.read_file(path, task, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def why(row, task="sft", **options) -> tuple[str, str]:
    """(reason, message) for which the row is dropped; a clean neighbour must stay."""
    good = {
        "sft": chat("hello there", "hi"),
        "preference": {"prompt": "p", "chosen": "a", "rejected": "b"},
        "kto": {"prompt": "p", "completion": "c", "label": True},
        "eval": {"question": "q", "choices": ["a", "b"], "answer": 0},
        "generation": {"question": "q", "answer": "a b"},
        "text": {"text": "some text"},
    }[task]
    report = rows.read_rows([good, row, good | {"extra": 1}], "made", task, **options)
    assert (report.kept, report.total, len(report.dropped)) == (2, 3, 1), report
    ((reason, [(line, message)]),) = report.dropped.items()
    assert line == 2
    return reason, message


@needs_shared
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_index(case):
    path, task, number = BAD / case["file"], case["task"].removesuffix("-split"), case["file"][:2]
    wanted = NAMED.get(number, "").split("|")
    if case["expect"] == "reject_file":
        said = refusal(path, task)
        assert all(word in said for word in wanted)
        assert not case["lines"] or f"{path}:{case['lines'][-1]}" in said
        return
    report = rows.read_file(path, task)
    found = report.dropped if case["expect"] == "reject_row" or number == "27" else report.warnings
    found = {reason: cases for reason, cases in found.items() if number == "77" or reason not in UNREMARKABLE}
    assert report.total == case["rows_total"]
    if case["expect"] != "reject_pair":
        assert report.kept == case["rows_kept"]
        told = [one for cases in found.values() for one in cases]
        lines = [] if case["expect"] == "accept" else case["lines"]
        assert sorted({line for line, _ in told} - {0}) == lines
        assert all(any(word in message for word in wanted) for _, message in told)
        assert bool(told) == bool(NAMED.get(number))
    else:
        assert report.kept == case["rows_total"] and not report.dropped and not found


@needs_shared
def test_index_every_case_names_its_defect():
    silent = {"41", "57", "70", "71"}  # normalised without a warning, literal text, and the pair below
    assert {case["file"][:2] for case in CASES} - NAMED.keys() == silent


@needs_shared
def test_index_sharegpt_and_literal_text():
    report = rows.read_file(BAD / "41-sharegpt-names.jsonl", "sft")
    assert report.format == "sharegpt"
    assert [turn["role"] for turn in report.rows[0]["messages"]] == ["user", "assistant"]
    literal = rows.read_file(BAD / "57-template-syntax.jsonl", "sft").rows[0]["messages"]
    assert literal[1]["content"] == "{{ messages }} {0} %s ${HOME}"


@needs_shared
def test_index_pair():
    train = rows.read_file(BAD / "70-leak-train.jsonl", "sft").rows
    test = rows.read_file(BAD / "71-leak-test.jsonl", "sft").rows
    found = [(int(f.test.rsplit(":")[-1]), int(f.train.rsplit(":")[-1]), f.how) for f in overlap(train, test)]
    how = ["exact", "exact", "normalised", "contained", "group"]
    assert found == [(n, n, how[n - 1]) for n in range(1, 6)]
    assert overlap(train, test[5:]) == []


@needs_shared
def test_a_gzip_bomb_stays_small():
    tracemalloc.start()
    try:
        refusal(BAD / "29-gz-expanding-line.jsonl.gz")
        assert tracemalloc.get_traced_memory()[1] < 80e6
    finally:
        tracemalloc.stop()


@needs_shared
@pytest.mark.parametrize(
    "name, task, format, kept, dropped",
    [
        ("eval-gsm8k-500", "eval", "choices", 0, {"missing_field": 500}),
        ("eval-gsm8k-500", "generation", "answers", 500, {}),
        ("eval-mmlu-500", "eval", "choices", 498, {"bad_choices": 2}),
        ("pref-hh-helpful-2k.chat", "preference", "preference", 2000, {}),
        (
            "pref-hh-helpful-2k.raw",
            "preference",
            "transcript",
            1981,
            {"repeated_role": 14, "empty_reply": 3, "no_signal": 2},
        ),
        ("pref-tinystories-2k", "preference", "preference", 2000, {}),
        ("sft-multiturn-500.chat", "sft", "messages", 500, {}),
        ("sft-open-2k.chat", "sft", "messages", 2000, {}),
        ("sft-tinystories-2k.completion", "sft", "prompt_completion", 2000, {}),
        ("text-tinyshakespeare", "text", "text", 299, {}),
        ("text-tinystories-1k", "text", "text", 1000, {}),
    ],
)
def test_real_files(name, task, format, kept, dropped):
    report = rows.read_file(DATA / f"{name}.jsonl", task)
    assert (report.format, report.kept) == (format, kept)
    assert {reason: len(cases) for reason, cases in report.dropped.items()} == dropped
    assert all({"id", "group", "source"} < row.keys() for row in report.rows)


@needs_shared
def test_transcripts_become_the_same_messages_as_the_chat_file():
    raw = rows.read_file(DATA / "pref-hh-helpful-2k.raw.jsonl", "preference").rows
    known = {texts.digest(texts.content(row)) for row in raw}
    curated = rows.read_file(DATA / "pref-hh-helpful-2k.chat.jsonl", "preference").rows
    assert sum(texts.digest(texts.content(row)) in known for row in curated) >= 1950


# Files as a whole


def test_a_clean_file_is_silent(tmp_path):
    objects = [{"id": i, "group": "g", **chat(f"question {i}", f"reply {i}")} for i in range(20)]
    report = rows.read_file(write(tmp_path / "a.jsonl", objects), "sft")
    assert (report.kept, report.dropped, report.warnings, report.describe()) == (20, {}, {}, [])
    first = {"id": "0", "group": "g", "source": f"{tmp_path}/a.jsonl:1", **chat("question 0", "reply 0")}
    assert report.rows[0] == first


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "file has no rows"),
        (b"\n \r\n\t\n", "file has no rows"),
        (b'{"a": 1}\n{"a": \n', ":2: invalid JSON"),
        (b"{'a': 1}\n", "single quotes are Python"),
        (b'{\n "a": 1\n}\n', "an object over many lines"),
        (b"[\n]\n", "top level is an array"),
        (b'[{"a": 1}]\n', "top level is an array"),
        (b"<!DOCTYPE html>\n", "an HTML page"),
        (b"prompt,completion\na,b\n", "a header line of CSV"),
        ('{"text": "x"}\n'.encode("utf-16"), "UTF-16"),
        ('{"text": "x"}\n'.encode("utf-16-le"), "NUL bytes"),
        (b'{"text": "\xff"}\n', "byte offset 10"),
        (b'{"text": "\xed\xa0\x80"}\n', "not UTF-8"),
        (b'{"text": "a\tb"}\n', "control character in string"),
        (gzip.compress(b'{"text": "x"}\n', mtime=0), "name it .gz"),  # no clock in a test's name: workers must agree
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"PK\x03\x04\x00\x00", "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\0" * 100_000, "NUL bytes"),
        (b'{"text": "' + b"x" * 2000 + b'"}\n', "line over the size limit of 1,000 bytes"),
    ],
)
def test_refused_files(tmp_path, data, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert said in refusal(path, "text", max_line_bytes=1000)


def test_all_lines_that_are_not_json_are_named_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n{"text": "b"}\nnot json\n\xff\n')
    said = refusal(path, "text")
    assert [n for n in range(1, 6) if f"{path}:{n}:" in said] == [2, 4, 5]
    path.write_bytes(b"x\n" * 1000)
    assert len(refusal(path, "text").splitlines()) == 21


def test_gzip(tmp_path):
    path, data = tmp_path / "a.jsonl.gz", b'{"text": "a"}\n'
    path.write_bytes(gzip.compress(data) + gzip.compress(data))
    assert rows.read_file(path, "text").kept == 2
    big = gzip.compress(b"".join(b'{"text": "%d"}\n' % random.Random(i).getrandbits(200) for i in range(5000)))
    for damaged in (
        big[: len(big) // 2],
        big[:3000] + b"\0" * 50 + big[3050:],
        gzip.compress(data) + b"junk",
        b"\x1f\x8b",
    ):
        path.write_bytes(damaged)
        assert "damaged" in refusal(path, "text")


def test_what_is_no_file(tmp_path):
    assert "No such file" in refusal(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "fifo.jsonl")
    assert "not a regular file" in refusal(tmp_path / "fifo.jsonl")
    (tmp_path / "null.jsonl").symlink_to("/dev/zero")
    assert "not a regular file" in refusal(tmp_path / "null.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "cannot be opened" in refusal(tmp_path / "loop.jsonl")
    assert "is a directory" in refusal(tmp_path)
    assert "unknown kind of file" in refusal(tmp_path / "a.xlsx")
    assert "plain text is read for text and long only" in refusal(write(tmp_path / "a.txt", []))
    write(tmp_path / "real.jsonl", [chat("a", "b")])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert rows.read_file(tmp_path / "link.jsonl", "sft").kept == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = write(tmp_path / "a.jsonl", [chat("a", "b")])
    path.chmod(0)
    assert "Permission denied" in refusal(path)


def test_permission_error_is_told(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [chat("a", "b")])

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert "Permission denied" in refusal(path)


def test_line_ends_and_separators_inside_strings(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a\u2028b\u0085c"}\r\n\r\n{"text": "d"}\r\n\n\n'.encode())
    report = rows.read_file(path, "text")
    assert [row["text"] for row in report.rows] == ["a\u2028b\u0085c", "d"]
    assert [row["source"] for row in report.rows] == [f"{path}:1", f"{path}:3"]
    assert [row["id"] for row in report.rows] == ["a-1", "a-3"]


def test_plain_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n\n  \nthree\n")
    report = rows.read_file(path, "text")
    assert [(row["id"], row["text"]) for row in report.rows] == [("a-1", "one\ntwo"), ("a-6", "three")]
    assert list(report.warnings) == ["byte_order_mark"]
    path.write_bytes(b"caf\xe9\n")
    assert "byte offset 3" in refusal(path, "text")
    path.write_bytes(b"a" * 100 + b"\0" + b"\n")
    assert "NUL bytes" in refusal(path, "text")
    path.write_bytes(b"line\n" * 1000)
    assert "paragraph over the size limit" in refusal(path, "text", max_line_bytes=1000)


@pytest.mark.parametrize(
    "line, reason, said",
    [
        (b"5", "not_an_object", "found a number"),
        (b'"x"', "not_an_object", "found a string"),
        (b"null", "not_an_object", "found null"),
        (b"[1]", "not_an_object", "found a list"),
        (b'{"text": "a", "text": "b"}', "duplicate_key", "'text' appears twice"),
        (b'{"text": "a", "x": {"y": 1, "y": 2}}', "duplicate_key", "'y' appears twice"),
        (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep", "nested"),
        (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "not_finite", "field x"),
        (b'{"text": "a", "x": [{"y": -1e999}]}', "not_finite", "field x[0].y"),
        (b'{"text": "a", "\\udc00": 1}', "not_unicode", "not valid Unicode"),
        (b'{"text": " \\u200b\\n"}', "empty_text", "text is empty"),
        (b'{"text": "a", "id": [1]}', "bad_name", "id must be a string or an integer"),
        (b'{"text": "a", "group": true}', "bad_name", "group must be"),
    ],
)
def test_dropped_lines(tmp_path, line, reason, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "last"}\n')
    report = rows.read_file(path, "text")
    assert [row["text"] for row in report.rows] == ["first", "last"]
    ((found, [(number, message)]),) = report.dropped.items()
    assert (found, number) == (reason, 2) and said in message
    message.encode()


def test_ids(tmp_path):
    clash = [{"id": 1, "text": "a"}, {"id": "1", "text": "b"}]
    assert "id 1 on lines 1 and 2" in refusal(write(tmp_path / "a.jsonl", clash), "text")
    twice = rows.read_file(write(tmp_path / "a.jsonl", [clash[0], clash[0], {"id": None, "text": "c"}]), "text")
    assert twice.kept == 3 and twice.rows[2]["id"] == "a-3"
    assert [repeat["source"] for repeat, _ in repeats.without_repeats(twice.rows)[1]] == [f"{tmp_path}/a.jsonl:2"]


def test_groups(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "One  text."}, {"text": "one text"}, {"text": "other", "topic": 7}])
    first, second, third = rows.read_file(path, "text", group_key="topic").rows
    assert first["group"] == second["group"] and third["group"] == "7"
    assert "did you mean 'topic'" in refusal(path, "text", group_key="topics")
    path = write(tmp_path / "a.jsonl", [{"text": "one", "topic": "prompt:1"}])
    assert rows.read_file(path, "text", group_key="topic").rows[0]["group"] == "prompt:1"


# Formats


@pytest.mark.parametrize(
    "row, format",
    [
        (chat("q", "a"), "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        (
            {"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "sharegpt",
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "instruction"),
        ({"instruction": "q", "output": "a", "input": None}, "instruction"),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            "prompt_completion",
        ),
        ({"text": "\n\nHuman: q\n\nAssistant: a"}, "transcript"),
        ({"transcript": "Human: q\n\nAssistant: a"}, "transcript"),
    ],
)
def test_one_conversation_in_every_format(row, format):
    report = rows.read_rows([row], "made", "sft")
    assert report.format == format
    assert texts.content(report.rows[0]) == chat("q", "a")
    assert rows.read_rows([row], "made", "sft", format).rows == report.rows


PROMPT, YES, NO = (
    chat("q")["messages"],
    [{"role": "assistant", "content": "y"}],
    [{"role": "assistant", "content": "n"}],
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "chosen": YES, "rejected": NO},
        {"chosen": PROMPT + YES, "rejected": PROMPT + NO},
        {"prompt": "q", "chosen": PROMPT + YES, "rejected": PROMPT + NO},  # as in UltraFeedback
        {"prompt": PROMPT, "chosen": PROMPT + YES, "rejected": PROMPT + NO},
        {"chosen": "\n\nHuman: q\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: n"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " y", "rejected": " n"},
    ],
)
def test_one_preference_in_every_format(row):
    (found,) = rows.read_rows([row], "made", "preference").rows
    assert texts.content(found) == {"prompt": PROMPT, "chosen": YES, "rejected": NO}


def test_content_is_kept_to_the_byte():
    odd = " {{ x }} %s\u200d \n\ttail  "
    plain = {"prompt": odd, "completion": odd}
    assert texts.content(rows.read_rows([plain], "made", "sft").rows[0]) == plain
    assert rows.read_rows([chat(odd, odd)], "made", "sft").rows[0]["messages"] == chat(odd, odd)["messages"]
    with_input = rows.read_rows([{"instruction": "add", "input": "1 2", "output": "3"}], "made", "sft").rows[0]
    assert with_input["messages"] == chat("add\n\n1 2", "3")["messages"]


SYSTEM, TOOL = {"role": "system", "content": "be brief"}, {"role": "tool", "content": ""}
USER, REPLY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([SYSTEM, USER, REPLY], None),
        ([USER, REPLY, TOOL, TOOL, REPLY], None),
        ([USER, REPLY, USER, REPLY], None),
        ([USER, REPLY | {"content": None}], "not_a_string"),
        ([USER, {"role": "assistant"}], "not_a_string"),
        ([USER, REPLY | {"content": [{"type": "text", "text": "a"}]}], "not_a_string"),
        ([USER, {"content": "a"}], "unknown_role"),
        ([USER, REPLY | {"tool_calls": [{}]}], "tool_calls"),
        ([USER, "a"], "not_an_object"),
        ([SYSTEM], "turn_order"),
        ([SYSTEM, REPLY], "turn_order"),
        ([SYSTEM, SYSTEM, USER, REPLY], "turn_order"),
        ([USER, REPLY, SYSTEM, USER, REPLY], "turn_order"),
        ([TOOL, REPLY], "turn_order"),
        ([USER, USER, REPLY], "repeated_role"),
        ([USER, REPLY, REPLY], "repeated_role"),
        ([USER, REPLY, USER], "no_reply"),
        ([USER], "no_reply"),
        ({"role": "user"}, "not_a_list"),
        (None, "missing_field"),
    ],
)
def test_turns(turns, reason):
    if reason is None:
        assert rows.read_rows([{"messages": turns}], "made", "sft").kept == 1
    else:
        assert why({"messages": turns})[0] == reason


@pytest.mark.parametrize(
    "task, row, reason",
    [
        ("preference", {"prompt": "p", "chosen": "", "rejected": "b"}, "empty_reply"),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": None}, "missing_field"),
        ("preference", {"prompt": "", "chosen": "a", "rejected": "b"}, "empty_user"),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": 3}, "not_a_string"),
        ("preference", {"prompt": "p", "chosen": YES, "rejected": NO}, "mixed_types"),
        ("preference", {"prompt": PROMPT, "chosen": YES, "rejected": YES}, "no_signal"),
        ("preference", {"prompt": PROMPT + YES, "chosen": YES, "rejected": NO}, "turn_order"),
        ("preference", {"prompt": PROMPT, "chosen": PROMPT, "rejected": NO}, "turn_order"),
        ("preference", {"chosen": YES, "rejected": NO}, "missing_field"),
        ("preference", {"chosen": PROMPT + YES, "rejected": NO}, "prompt_mismatch"),
        ("kto", {"prompt": "p", "completion": "c", "label": 1}, "bad_label"),
        ("kto", {"prompt": "p", "completion": "c", "label": None}, "bad_label"),
        ("kto", {"prompt": "p", "completion": " ", "label": True}, "empty_reply"),
        ("eval", {"question": "q", "choices": ["a", "b"], "answer": True}, "bad_answer"),
        ("eval", {"question": "q", "choices": ["a", "b"], "answer": 0.0}, "bad_answer"),
        ("eval", {"question": "q", "choices": ["a", "b"]}, "bad_answer"),
        ("eval", {"question": " ", "choices": ["a", "b"], "answer": 0}, "empty_text"),
        ("eval", {"question": "q", "choices": "ab", "answer": 0}, "bad_choices"),
        ("eval", {"question": "q", "choices": [1, 2], "answer": 0}, "not_a_string"),
        ("generation", {"question": "q", "answer": 5}, "not_a_string"),
        ("generation", {"question": "q"}, "missing_field"),
        ("generation", {"question": "q", "answer": "so\n#### "}, "bad_answer"),
        ("generation", {"question": "q", "answer": "B"}, "bad_answer"),
        ("generation", {"question": "q", "answer": "b c", "choices": ["b c", "d"]}, "bad_answer"),
        ("text", {"text": 5}, "not_a_string"),
        ("text", {"text": "\ufe0f"}, "empty_text"),
        ("sft", {"instruction": "i", "output": "o"}, "missing_field"),
    ],
)
def test_rows_of_each_task(task, row, reason):
    assert why(row, task)[0] == reason


def test_a_row_of_another_format_is_dropped_with_a_hint():
    assert "looks like instruction, not messages" in why({"instruction": "i", "output": "o"})[1]
    pair = {"chosen": "\n\nHuman: q\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: n"}
    assert "looks like transcript, not preference" in why(pair, "preference")[1]
    mixed = rows.read_rows([pair, pair, {"chosen": PROMPT + YES, "rejected": PROMPT + NO}], "made", "preference")
    assert list(mixed.dropped) == ["mixed_types"]


def test_questions_with_an_answer_in_place_of_choices_are_named_with_the_key_that_reads_them():
    row = {"question": "q", "answer": "so\n#### 1,200"}
    assert "prepare.answers reads" in why(row, "eval")[1]
    (kept,) = rows.read_rows([row], "made", "generation").rows
    assert texts.content(kept) == {"question": "q", "answer": "1,200", "solution": "so\n#### 1,200"}
    other = rows.read_rows([row, row | {"answer": "5"}], "made", "generation")
    assert other.warnings["contradiction"] == [(2, "contradicts line 1")]


FEW_SHOT = "Answer.\n\nQuestion: what is two and two?\nAnswer: four\n\nQuestion: {}\nAnswer:"


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (FEW_SHOT.format("and three?"), True),
        ("Q1. a\nA1. b\nQ2. c\nA2.", True),
        ("### Input: a\n### Output: b\n\n### Input: c\n### Output:", True),
        ("Review: good\nSentiment: positive\n\nReview: bad\nSentiment:", True),
        ("Question: what is two and two?\nAnswer:", False),
        ("Passage: a text\nQuestion: why?\nAnswer:", False),
        ("My question: is it so? Your answer: no. My question: why?", False),
    ],
)
def test_worked_examples_in_a_question_are_found(prompt, found):
    rows_of = {
        "eval": {"question": prompt, "choices": ["a", "b"], "answer": 0},
        "generation": {"question": prompt, "answer": "five"},
    }
    for task, row in rows_of.items():
        warnings = rows.read_rows([row], "made", task).warnings
        assert [line for line, _ in warnings.get("few_shot", [])] == ([1] if found else [])


def test_a_leak_behind_worked_examples_is_found():
    """Examples make most of the prompt; control: the same examples before another question."""
    question = tokens.prompt_text(made(1)[0])
    train = [ask(question, "reply", "train")]
    shots = "\n\n".join(f"Question: {tokens.prompt_text(row)}\nAnswer: x" for row in made(5, seed=3))
    for asked, found in ((question, ["normalised"]), (" ".join(question.split()[::-1]), [])):
        row = {"question": f"{shots}\n\nQuestion: {asked}\nAnswer:", "answer": "x y"}
        test = rows.read_rows([row], "t", "generation").rows
        assert [finding.how for finding in overlap(train, test)] == found
    shown = rows.read_rows([row], "t", "generation").rows
    (finding,) = overlap([*train, *made(5, seed=3)], shown)
    assert finding.how == "few-shot" and not finding.is_leak and "worked examples" in str(finding)


def test_empty_user_only_where_allowed():
    assert why(chat("", "a"))[0] == "empty_user"
    assert rows.read_rows([chat("", "a")], "made", "sft", allow_empty_user=True).kept == 1


def test_hub_rows_with_null_columns():
    row = {"prompt": "q", "completion": "a", "messages": None, "group": None, "score": float("1.5")}
    report = rows.read_rows([row], "org/set", "sft")
    assert texts.content(report.rows[0]) == {"prompt": "q", "completion": "a"}
    assert (report.rows[0]["id"], report.rows[0]["source"]) == ("set-1", "org/set:1")


@pytest.mark.parametrize("label, kept", [(False, 1), (True, 2), (0, 2), ("false", 2), (None, 2)])
def test_sft_never_imitates_a_completion_that_is_labelled_false(label, kept):
    """Only a boolean is a verdict; another label is a class of the data set's own."""
    for row in ({"prompt": "p", "completion": "c"}, {"prompt": PROMPT, "completion": YES}):
        report = rows.read_rows([row | {"label": label}, row | {"extra": 1}], "made", "sft")
        assert report.kept == kept and "label" not in report.rows[0]
        assert {reason: line for reason, [(line, _)] in report.dropped.items()} == (
            {} if kept == 2 else {"label_false": 1}
        )
        assert all("kto reads it" in message for [(_, message)] in report.dropped.values())


def test_unknown_task_and_format():
    with pytest.raises(UserError, match="task 'dpo' is unknown; allowed: text, long, sft"):
        rows.read_rows([], "made", "dpo")
    with pytest.raises(UserError, match="format 'kto' is not read for task sft; allowed: auto, messages"):
        rows.read_rows([], "made", "sft", "kto")
    assert set(layouts.FORMATS) == {"text", "long", "sft", "preference", "kto", "eval", "generation"}


# Odd characters


@pytest.mark.parametrize(
    "text, kinds",
    [
        ("plain, caf\u00e9 \u2013 \u201cquoted\u201d na\u00efve \u00c5ngstr\u00f6m", []),
        (
            "\u05e9\u05dc\u05d5\u05dd \u200f \u0645\u06cc\u200c\u062e\u0648 \U0001f468\u200d\U0001f467",
            [],
        ),
        ("\u201cMA\u00c7\u00c3\u201d \u041f\u0440\u0438\u0432\u0435\u0442 \u00d0\u00e9", []),
        ("it\u2019s caf\u00e9 \u201chi\u201d".encode().decode("cp1252", "replace"), ["mojibake"]),
        ("\u041f\u0440\u0438\u0432\u0435\u0442".encode().decode("cp1252", "ignore"), ["mojibake"]),
        ("a\u200bb", ["zero_width"]),
        ("a\u202eb", ["bidi_override"]),
        ("a\x00b", ["control_character"]),
        ("bye<|im_end|>", ["special_token"]),
        ("a < b | c > d, [x], <b>", []),
    ],
)
def test_odd_characters(text, kinds):
    assert texts.odd(text) == kinds
    report = rows.read_rows([{"text": text}, {"text": "other"}], "made", "text")
    assert report.rows[0]["text"] == text
    assert list(report.warnings) == kinds


# Splits and leaks


def made(n: int, seed: int = 0) -> list[dict]:
    """Rows of random words, so that no two share anything by chance."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(5000)]
    objects = [chat(" ".join(rng.choices(vocabulary, k=20)), " ".join(rng.choices(vocabulary, k=20))) for _ in range(n)]
    return rows.read_rows(objects, f"made{seed}", "sft").rows


def ask(question: str, answer: str, name: str = "test", **more) -> dict:
    return rows.read_rows([chat(question, answer) | more], name, "sft").rows[0]


def test_deduplicate_counts_and_keeps_the_first():
    first = made(3)
    again = [row | {"id": "other", "source": "b:1", "group": "x"} for row in first[:2]]
    kept, others = repeats.without_repeats(store([*first, *again]))
    assert kept == first and list(others) == list(zip(again, first[:2], strict=True))


def test_split_is_stable_and_keeps_groups_whole():
    data = store(row | {"group": f"g{i % 100}"} for i, row in enumerate(made(1000)))
    train, test, warning = split(data, 0.2, seed=1)
    assert warning is None and len(train) + len(test) == 1000
    assert 0.1 < len(test) / 1000 < 0.3
    assert not {row["group"] for row in train} & {row["group"] for row in test}
    shuffled = data.take(np.random.default_rng(0).permutation(1000)[:500])
    assert {row["id"] for row in split(shuffled, 0.2, 1)[1]} <= {row["id"] for row in test}
    assert split(data, 0.2, 2)[1] != test


def test_split_of_few_rows():
    one = store(made(1))
    train, test, warning = split(one, 0.1, 0)
    assert (train, test) == (one, []) and "too few rows for a train/test split" in warning
    assert split(store([]), 0.1, 0)[2]
    assert split(one, 0, 0) == (one, [], None)
    for seed in range(20):
        for fraction in (0.01, 0.99):
            train, test, warning = split(store(made(2)), fraction, seed)
            assert len(train) == len(test) == 1 and warning is None
    with pytest.raises(ValueError):
        split(one, 1.0, 0)


def test_a_planted_leak_is_found_and_removing_it_finds_none():
    train, test = made(300, 1), made(50, 2)
    assert overlap(train, test) == []
    asked = tokens.prompt_text(train[7]).split()
    planted = {
        "exact": ask(" ".join(asked), "another reply"),
        "normalised": ask(" ".join(asked).upper() + "?!", "another reply"),
        "contained": ask("Please, now: " + " ".join(asked), "another reply"),
        "grams": ask("so " * 8 + " ".join(asked[3:18]) + " then", "another reply"),
    }
    for how, row in planted.items():
        assert overlap(train, [*test, row]) == [("test:1", train[7]["source"], how)]
    short = ask(" ".join(asked[2:12]), "reply")
    assert overlap(train, [short]) == [("test:1", train[7]["source"], "contained")]
    document = rows.read_rows([{"text": "before " + " ".join(asked) + " after"}], "web", "text").rows
    assert overlap(document, train[:10]) == [(train[7]["source"], "web:1", "contained")]


def test_a_long_prompt_that_only_begins_like_a_training_prompt_is_no_leak():
    asked = tokens.prompt_text(made(1)[0]).split()[:8]
    train = [ask(" ".join(asked), "reply", "train")]
    assert overlap(train, [ask(" ".join(asked) + " more" * 9, "reply 2")]) == []
    assert overlap(train, [ask(" ".join(asked) + " more" * 7, "reply 2")])[0].how == "contained"


def test_every_text_of_training_is_searched():
    """Also a system turn, an earlier reply, and both answers of a pair; control: another question."""
    test = made(3, 5)
    asked = " ".join(tokens.prompt_text(test[1]).split()[:15])
    system, user, reply = (
        {"role": role, "content": f"{role} says something of its own"} for role in ("system", "user", "assistant")
    )
    hides = [
        {"messages": [system | {"content": f"Example. {asked}"}, user, reply]},
        {"messages": [user, reply | {"content": f"You ask {asked}"}, user, reply]},
        {"prompt": [user], "chosen": [reply | {"content": f"Well: {asked}"}], "rejected": [reply]},
        {"prompt": "p", "chosen": "yes", "rejected": f"no {asked} no"},
        {"prompt": "p", "completion": f"so {asked}", "label": False},
        {"text": f"It is said that {asked} is so"},
    ]
    for row in hides:
        assert [finding.test for finding in overlap([row | {"source": "t:1", "group": "g"}], test)] == [
            test[1]["source"]
        ]
    question = rows.read_rows([{"question": asked, "choices": ["a", "b"], "answer": 1}], "q", "eval").rows
    assert all(overlap([row | {"source": "t:1", "group": "g"}], question) for row in hides)
    assert not any(overlap([row | {"source": "t:1", "group": "g"}], test[2:]) for row in hides)


LONG_INSTRUCTION = (
    "Rewrite the following sentence in the passive voice, keep its tense, and do not add any word of your own"
)


@pytest.mark.parametrize(
    "form",
    [
        LONG_INSTRUCTION + ".\n\n{}",
        LONG_INSTRUCTION + ": {}",
        "{}\n\n" + LONG_INSTRUCTION + ".",
        LONG_INSTRUCTION + ".\n\nInput: {}\nAnswer:",
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_rows_that_share_an_instruction_alone_stay(form, count):
    """Control: the same rows with the training row's own input too."""
    inputs = [" ".join(tokens.prompt_text(row).split()[:9]) for row in made(12, 6)]
    train = [ask(form.format(text), "a reply", f"train{n}") for n, text in enumerate(inputs[:count])]
    test = [ask(form.format(text), "another reply", f"test{n}") for n, text in enumerate(inputs[6 : 6 + count])]
    if form.startswith("{}") and count == 1:
        return  # which of two parts is the instruction is told by other test rows alone
    assert overlap(train, test) == []
    leak = ask(form.format(inputs[0].upper()) + " ", "another reply", "leak")
    assert [finding.test for finding in overlap(train, [*test, leak])] == ["leak:1"]
    longer = ask("Kindly: " + form.format(inputs[0]), "another reply", "longer")
    assert [finding.test for finding in overlap(train, [*test, longer])] == ["longer:1"]


def test_a_long_reply_that_is_copied_is_found_and_a_short_or_common_one_is_not():
    train, document = made(3, 7), {"source": "web:1", "group": "g"}
    story = " ".join(tokens.prompt_text(row) for row in made(4, 9))
    copied = ask("Tell me a story of some length", story + " The end.", "t")
    assert [f.how for f in overlap([*train, document | {"text": f"once {story} and so on"}], [copied])] == ["reply"]
    half = " ".join(story.split()[: len(story.split()) // 2])
    assert overlap([document | {"text": f"once {half} and so on"}], [copied]) == []
    short = ask("Tell me a story", " ".join(story.split()[:30]), "t")
    assert overlap([document | {"text": story}], [short]) == []
    common = [document | {"source": f"web:{n}", "text": f"{n} {n} {n} {story}"} for n in range(12)]
    assert overlap(common, [copied]) == []


def test_a_short_question_is_one_only_with_its_answer():
    """Many have the words "Which of these statements is true?"."""

    def question(right):
        row = {"question": "Which of these statements is true?", "choices": [right, "Cats bark"], "answer": 0}
        return rows.read_rows([row], "q", "eval").rows

    train = [ask("Which of these statements is true?", "That dogs can bark.", "train")]
    assert overlap(train, question("Water is dry")) == []
    assert [finding.how for finding in overlap(train, question("Dogs can bark"))] == ["exact"]


def test_a_shared_group_is_found_only_where_declared():
    test = [ask("what?", "that", group="g1")]
    assert overlap([ask("who?", "she", "train", group="g1")], test)[0].how == "group"
    assert overlap([ask("hi", "hello", "train")], [ask("hi", "good day")]) == []
    test = [ask("what?", "that", group="prompt:1")]
    assert overlap([ask("who?", "she", "train", group="prompt:1")], test)[0].how == "group"


def test_common_short_prompts_and_arithmetic_are_no_leaks():
    opening = "Once upon a time, there was a little girl"
    train = [ask(f"{opening} named {i}{i}.", f"story {i}", f"train{i}") for i in range(30)]
    common = [ask(opening, "x"), ask(f"{opening} called Max", "y")]
    assert overlap([*train, ask(opening, "end", "t")], common) == []
    assert overlap([ask("What is 3 + 4?", "7", "t")], [ask("What is 3 - 4?", "-1")]) == []
    samples = [ask("What is the capital of France?", f"{i} Paris", f"s{i}") for i in range(30)]
    assert overlap(samples, [ask("what is the capital of france", "?")])[0].how == "normalised"


@pytest.mark.parametrize("size", (1, 7))
def test_neither_the_size_of_a_batch_nor_the_number_of_processes_changes_a_finding(size, monkeypatch):
    """Training rows are read in batches, of which none knows the others: not even what is boilerplate."""
    from posttrain.data import overlap as module

    train = made(30)
    leaks = [row | {"source": f"leak:{n}", "group": "x"} for n, row in enumerate(train[3:9])]
    greeting = [ask(f"{n} please tell me a very short story now", "so", f"t{n}") for n in range(12)]
    test = [*made(5, seed=1), *leaks, ask("please tell me a very short story now", "the end", "greeting")]
    expected = overlap([*train, *greeting], test)
    assert [finding.test for finding in expected] == [leak["source"] for leak in leaks]
    assert overlap([*train, *greeting[:10]], test) != expected, "control: ten prompts are not boilerplate"
    monkeypatch.setattr(module, "BATCH", size)
    assert overlap([*train, *greeting], test) == expected
    assert overlap([*train, *greeting], test, processes=2) == expected
    results = workers._results
    monkeypatch.setattr(workers, "_results", lambda *given: reversed(list(results(*given))))
    assert overlap([*train, *greeting, *train], test, processes=2) != expected, "control: batches in another order"
