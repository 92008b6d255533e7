"""Files of every kind, folders and patterns; other shapes of rows: columns, templates, texts of turns.

pytest tests/unit/test_reading.py
"""

import csv
import gzip
import json
import random
import re
import tempfile
import tracemalloc
import unicodedata
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from families import tokenizer_of
from test_campaign import GOOD, load, problems

from posttrain.config.sections import Prepare, Source
from posttrain.config.sources import data_files, hub_items
from posttrain.data import lines, overlap, rows, stored, texts
from posttrain.data.dropped import Dropped
from posttrain.data.reading import described, read_source
from posttrain.data.usable import summary
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl, write_jsonl
from posttrain.rl import prompts

PAIRS = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(5)]
PAIR = {"prompt": "q", "completion": "a"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def table(folder: Path, objects: list[dict], name: str) -> Path:
    """A file of rows, of the kind that its name tells."""
    path = folder / name
    kind, packed = name.removesuffix(".gz").removesuffix(".zst"), name.rpartition(".")[2]
    if kind.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), path, row_group_size=500)
        return path
    if kind.endswith((".csv", ".tsv")):
        with open(folder / "plain", "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(objects[0]), delimiter="\t" if kind.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(objects)
        data = (folder / "plain").read_bytes()
    elif kind.endswith(".json"):
        data = json.dumps(objects, ensure_ascii=False, indent=1 if packed == "json" else None).encode()
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects).encode()
    path.write_bytes({"gz": gzip.compress, "zst": zstd}.get(packed, bytes)(data))
    return path


def refusal(path, task="sft", **options) -> str:
    with pytest.raises(UserError) as caught:
        rows.read_file(path, task, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def read(objects: list[dict], task="sft", format="auto", **keys) -> rows.Report:
    return rows.read_rows(objects, "made", task, format, source=Source(**keys))


def contents(report) -> list[dict]:
    return [texts.content(row) for row in report.rows]


# Kinds of files

ENDS = [".jsonl", ".json", ".parquet", ".csv", ".tsv", ".jsonl.gz", ".jsonl.zst", ".json.zst", ".csv.gz", ".ndjson"]


@pytest.mark.parametrize("end", ENDS)
def test_every_kind_of_file_holds_the_same_rows(tmp_path, end):
    odd = [
        {
            "prompt": 'a "quoted", line\r\nand\tmore',
            "completion": "\u05e9\u05dc\u05d5\u05dd e\u0301 \U0001f468\u200d\U0001f467",
        }
    ]
    report = rows.read_file(table(tmp_path, PAIRS + odd, f"a{end}"), "sft")
    assert contents(report) == PAIRS + odd and not report.dropped
    assert report.rows[0]["id"] == f"a-{2 if 'sv' in end else 1}"


@pytest.mark.parametrize("end", [".json", ".parquet", ".csv", ".jsonl"])
def test_a_bad_row_is_dropped_with_its_number_and_the_same_words_in_every_kind(tmp_path, end):
    path = table(tmp_path, [*PAIRS[:2], {"prompt": "p", "completion": " "}, PAIRS[2]], f"a{end}")
    report = rows.read_file(path, "sft")
    assert report.kept == 3
    assert report.dropped == {"empty_reply": [(4 if end == ".csv" else 3, "completion is empty")]}


def test_the_lines_of_csv_are_counted_as_an_editor_does(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"two\nlines",a\r\n\r\np,\r\nonly one\r\np,c,d\r\nq,r\r\n')
    report = rows.read_file(path, "sft")
    assert [row["source"] for row in report.rows] == [f"{path}:2", f"{path}:8"]
    assert contents(report)[0] == {"prompt": "two\nlines", "completion": "a"}
    cells = [(line, f"{count} cells, while the header names 2 columns") for line, count in ((6, 1), (7, 3))]
    assert report.dropped == {"empty_reply": [(5, "completion is empty")], "cells": cells}
    assert report.warnings["byte_order_mark"] == [(2, "byte order mark stripped")]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", b"prompt,prompt\na,b\n", ":1: column 'prompt' appears twice"),
        ("a.csv", b"prompt;completion\na;b\n", "cells seem to be separated by ';'"),
        ("a.csv", b'prompt,completion\na,b\nc,"open\nd,e\n', ":3: not CSV: unexpected end of data; hint: a quote"),
        ("a.csv", b"prompt,completion\n", "file has no rows"),
        ("a.csv", b"prompt,completion\na,\xff\n", ":2: not UTF-8"),
        ("a.csv", b"prompt,completion\na,\0\n", ":2: not text (NUL bytes)"),
        ("a.json", b"[]", "the array is empty"),
        ("a.json", b'[\n{"a": 1},\n{"a": \n]', ":4: invalid JSON at line 4, column 1: expecting value"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', ":2: invalid JSON at line 2, column 2: a comma"),
        ("a.json", b'[{"a": 1}', "a comma or the array's closing bracket is missing"),
        ("a.json", b'[{"a": 1},]', "expecting value"),
        ("a.json", b'[{"a": 1}] x', "extra data after the array"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.json", b'{\n"data": []}', "an object over many lines"),
        ("a.json", b'[{"a": "' + b"x" * 200_000 + b'"}]', ":1: element over the size limit of 1,000"),
        ("a.jsonl", b'[{"a": 1}]', "name it .json"),
        ("a.parquet", b"no parquet at all", "not a Parquet file"),
        ("a.parquet.gz", b"", "unknown kind of file"),
        ("a.jsonl.zst", b'{"text": "x"}\n', "not zstd data, although its name ends in .zst"),
        ("a.jsonl.zst", zstd(b'{"text": "x"}\n' * 9999)[:-3], "the file is damaged"),
        ("a.jsonl", zstd(b'{"text": "x"}\n'), "zstd data: name it .zst"),
    ],
)  # fmt: skip
def test_files_that_are_refused_as_a_whole(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    assert words in refusal(path, "text", max_line_bytes=1000)


def test_a_damaged_parquet_file_is_named_with_the_last_row(tmp_path):
    whole = table(tmp_path, PAIRS * 400, "whole.parquet").read_bytes()
    path = tmp_path / "a.parquet"
    path.write_bytes(whole[:200] + b"\xff" * 60 + whole[260:])
    assert "damaged" in refusal(path) or "not a Parquet" in refusal(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a Parquet file" in refusal(path)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
def test_an_array_is_the_same_wherever_its_pieces_end(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("posttrain.data.arrays.CHUNK", chunk)
    values = [{"a": 'caf\u00e9 "[{,}]" \U0001f600'}, [], 12.5e-3, -0.25, True, None, 1234567, {"b": {"c": [1.5, 2]}}]
    for indent in (None, 2):
        path = tmp_path / "a.json"
        path.write_text(f" {json.dumps(values, ensure_ascii=False, indent=indent)}\n", "utf-8")
        assert [value for _, value, _ in rows.files.read(path, "text", 1000)] == values


def test_a_key_that_stands_twice_drops_one_element_of_an_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": "b", "x": {"y": 1, "y": 2}}, {"text": "c"}]')
    report = rows.read_file(path, "text")
    assert [row["source"] for row in report.rows] == [f"{path}:1", f"{path}:3"]
    assert report.dropped == {"duplicate_key": [(2, "key 'y' appears twice in one object")]}


@pytest.mark.parametrize("end", [".json", ".parquet", ".csv", ".jsonl.zst"])
def test_a_file_is_read_in_bounded_memory(tmp_path, end):
    """Control: a list of the same rows takes more than the bound."""
    path = table(tmp_path, [{"text": f"{n} " * 50} for n in range(8_000)], f"a{end}")
    peaks = []
    for hold in (False, True):
        tracemalloc.start()
        read_on = rows.files.read(path, "text", lines.MAX_LINE_BYTES)
        count = len(list(read_on)) if hold else sum(1 for _ in read_on)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == 8_000
    assert peaks[0] < 2e6 < peaks[1]


# Folders and patterns


def source_rows(source: Source, task="sft", **section) -> tuple[list[dict], list, list]:
    cards = []
    with tempfile.TemporaryDirectory() as folder:
        dropped = Dropped(Path(folder) / "dropped.jsonl")
        kept = read_source(Prepare(**section), source, task, cards, dropped, [])
        return kept, cards, read_jsonl(dropped.file) if dropped else []


def test_the_shards_of_a_folder_and_of_a_pattern_are_one_source(tmp_path):
    bad = {"prompt": "p", "completion": ""}
    for number, part in enumerate(([*PAIRS[:2], bad], PAIRS[2:4], [PAIRS[4], PAIRS[0]])):
        table(tmp_path, part, f"shard-{number}.jsonl")
    (tmp_path / "README.txt").write_text("no rows")
    (tmp_path / "_SUCCESS.jsonl").write_text("")
    for path in (str(tmp_path), f"{tmp_path}/shard-*.jsonl", f"{tmp_path}/**/shard-?.jsonl"):
        kept, cards, dropped = source_rows(Source(path=path))
        assert [texts.content(row) for row in kept] == PAIRS
        assert [(card["name"], card["total"], card["kept"]) for card in cards] == [(path, 7, 5)]
        places = [(Path(one["file"]).name, one["line"], one["reason"]) for one in dropped]
        assert places == [("shard-0.jsonl", 3, "empty_reply"), ("shard-2.jsonl", 2, "exact duplicate")]
    named = [file.name for file in data_files(str(tmp_path), "text")]
    assert named == ["README.txt", "shard-0.jsonl", "shard-1.jsonl", "shard-2.jsonl"]


def test_the_log_says_what_becomes_of_rows_that_were_written_for_something_else(tmp_path, capsys):
    pair = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    path = str(table(tmp_path, pair, "pairs.jsonl"))
    for task, words in (("sft", "1 rows of sft, the chosen answers of pairs"), ("kto", "2 rows of kto, both answers"),
                        ("preference", "1 rows of preference, preference")):  # fmt: skip
        source_rows(Source(path=path), task)
        assert f"{path}: {words}" in capsys.readouterr().err


def test_the_first_rows_of_several_files_are_taken_and_nothing_behind_them_is_read(tmp_path):
    for number in range(3):
        bad = [{"prompt": "p", "completion": ""}] if number != 1 else []
        table(tmp_path, [*bad, *PAIRS[2 * number : 2 * number + 2]], f"shard-{number}.jsonl")
    (tmp_path / "shard-2.jsonl").write_text("not JSON")
    for most, total in ((1, 2), (2, 3), (3, 4), (4, 5)):
        kept, (card,), dropped = source_rows(Source(path=str(tmp_path), max_rows=most))
        assert [texts.content(row) for row in kept] == PAIRS[:most]
        assert (card["total"], card["kept"], len(dropped)) == (total, most, 1)
    with pytest.raises(UserError, match=r"shard-2\.jsonl:1: invalid JSON"):
        source_rows(Source(path=str(tmp_path), max_rows=5))


def test_a_random_choice_of_rows_keeps_their_order_and_follows_the_seed(tmp_path):
    objects = [{"prompt": f"q{n}", "completion": str(n)} for n in range(50)]
    path = str(table(tmp_path, objects, "a.jsonl"))
    source = Source(path=path, max_rows=10, sample="random")
    chosen = [[int(row["completion"]) for row in source_rows(source, seed=seed)[0]] for seed in (0, 0, 1)]
    assert source_rows(source)[1][0]["warnings"] == {"not chosen by sample": 40}
    assert chosen[0] == chosen[1] == sorted(chosen[0]) != chosen[2] and len(set(chosen[0])) == 10
    assert chosen[0] != list(range(10)), "control: not the first"
    assert len(source_rows(Source(path=path, max_rows=99, sample="random"))[0]) == 50


def test_data_files_of_a_data_set_are_fetched_alone():
    """Beside a source of the whole data set, which is fetched as one."""
    keys = {"dataset": "org/rows", "revision": "a" * 40}
    sources = [Source(**keys), Source(**keys, files=["data/a-*"]), Source(**keys, files=["data/b-*"])]
    items = hub_items(Prepare(sft=sources))
    patterns = [item["datasets"][0].get("allow_patterns") for item in items.values()]
    assert patterns == [None, ["data/a-*"], ["data/b-*"]]
    assert all(re.fullmatch(r"datasets--org--rows@a{40}(--[0-9a-f]{8})?", name) for name in items)


def test_a_name_with_the_signs_of_a_pattern_is_a_file(tmp_path):
    path = table(tmp_path, PAIRS, "a[1].jsonl")
    table(tmp_path, PAIRS, "a1.jsonl")
    assert data_files(str(path), "sft") == [path]


# Shapes


@pytest.mark.parametrize(
    ("row", "columns", "content"),
    [
        ({"question": "q", "response": "a", "id": 3}, {"prompt": "question", "completion": "response"}, PAIR),
        ({"q": {"text": "q"}, "a": {"text": ["a", "b"]}}, {"prompt": "q.text", "completion": "a.text.0"}, PAIR),
        ({"a.b": "q", "c": {"b": "x", "d": "a"}}, {"prompt": "a.b", "completion": "c.d"}, PAIR),
        ({"completion": "q", "prompt": "a"}, {"prompt": "completion", "completion": "prompt"}, PAIR),
        ({"chat": CHAT["messages"]}, {"messages": "chat"}, CHAT),
    ],
)
def test_columns_have_other_names(row, columns, content):
    report = read([row], columns=columns)
    assert contents(report) == [content] and "unread_keys" not in report.warnings


def test_a_list_of_columns_is_a_list():
    columns = {"question": "q", "choices": ["a", "b.c"], "answer": "n"}
    report = read([{"q": "which?", "a": "x", "b": {"c": "y"}, "n": 1}, {"q": "which?", "a": "x", "n": 1}], "eval",
                  columns=columns)  # fmt: skip
    assert contents(report) == [{"question": "which?", "choices": ["x", "y"], "answer": 1}]
    assert report.dropped["missing_field"] == [(2, "missing column b.c (columns.choices); keys found: q, a, n")]


def test_a_row_without_a_column_is_dropped_with_the_column_and_the_nearest(tmp_path):
    objects = [{"question": "q", "answer_text": "a"}, {"qestion": "q", "answer_text": "a"}]
    report = read(objects, columns={"prompt": "question", "completion": "answer_text"})
    message = "missing column question (columns.prompt); hint: did you mean 'qestion'"
    assert report.kept == 1 and report.dropped == {"missing_field": [(2, message)]}


def test_a_template_writes_texts_literally():
    row = {"q": "{x} {{ y }} %s", "n": 3, "a": {"b": "z"}, "id": "7"}
    report = read([row], template={"prompt": "{{Q}} {q} ({n}):", "completion": " {a.b}"})
    assert contents(report) == [{"prompt": "{Q} {x} {{ y }} %s (3):", "completion": " z"}]
    assert report.rows[0]["id"] == "7" and "unread_keys" not in report.warnings
    chat = read([row | {"b": False}], template={"instruction": "{q}", "output": "{n} {b}"})
    assert [turn["content"] for turn in chat.rows[0]["messages"]] == [row["q"], "3 false"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "missing column q (template.prompt)"),
        ({"q": None}, "missing column q (template.prompt)"),
        ({"q": [1]}, "q (template.prompt) must be text or a number, found a list"),
        ({"q": {"a": 1}}, "must be text or a number, found an object"),
    ],
)
def test_a_placeholder_without_text_drops_the_row(value, words):
    report = read([{"q": "x", "a": "y"}, value | {"a": "y"}], template={"prompt": "{q}", "completion": "{a}"})
    ((line, message),) = [case for cases in report.dropped.values() for case in cases]
    assert report.kept == 1 and line == 2 and words in message


TURNS = [("user", "one\n\ntwo"), ("assistant", "### yes"), ("user", "more"), ("assistant", "end")]
HUMAN = "\n\nHuman: one\n\ntwo\n\nAssistant: ### yes\n\nHuman: more\n\nAssistant: end"
HASHES = "### Human: one\n\ntwo### Assistant: ### yes\n### Human: more\n### Assistant: end"
CHATML = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in TURNS)


@pytest.mark.parametrize("text", [HUMAN, HASHES, CHATML, CHATML.rstrip(), CHATML.rstrip().removesuffix("<|im_end|>")])
def test_texts_of_turns_are_read_as_turns(text):
    report = read([{"text": text}])
    assert report.format == "transcript"
    assert [(turn["role"], turn["content"]) for turn in report.rows[0]["messages"]] == TURNS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<|im_start|>user\nq<|im_end|>\nmore<|im_start|>assistant\na<|im_end|>", "text after <|im_end|>"),
        ("<|im_start|>user\nq\n<|im_start|>assistant\na<|im_end|>", "a turn without <|im_end|>"),
        ("plain text", "must begin with"),
        ("### Human: q", "last turn must be assistant"),
    ],
)
def test_texts_that_are_no_turns_are_dropped(text, words):
    report = read([{"text": HASHES}, {"text": text}])
    ((line, message),) = [case for cases in report.dropped.values() for case in cases]
    assert line == 2 and words in message and ("format: text" in message) == (text == "plain text")


def test_pairs_of_texts_of_turns():
    for start, end in (
        ("### Human: q\n### Assistant: ", ""),
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    ):
        for pair in (
            {"chosen": f"{start}y{end}", "rejected": f"{start}n{end}"},
            {"prompt": start, "chosen": "y", "rejected": "n"},
        ):
            (row,) = contents(read([pair], "preference"))
            assert [turn["content"] for turn in (*row["prompt"], *row["chosen"], *row["rejected"])] == ["q", "y", "n"]


@pytest.mark.parametrize(
    ("pair", "content"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "completion": "a"}),
        ({"prompt": CHAT["messages"][:1], "chosen": CHAT["messages"][1:], "rejected": []}, CHAT),
        ({"prompt": "q", "chosen": CHAT["messages"], "rejected": []}, CHAT),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, CHAT),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"}, CHAT),
    ],
)
def test_the_chosen_answer_is_a_row_for_sft(pair, content):
    report = read([pair])
    assert report.format == "preference" and contents(report) == [content]
    assert "unread_keys" not in report.warnings
    reversed_pair = read([pair, pair | {"score_chosen": 1, "score_rejected": 2}])
    assert [line for line, _ in reversed_pair.dropped["reversed"]] == [2]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (CHAT | {"images": ["a.png"]}, "images is not empty"),
        ({"image": {"bytes": b"x"}, "prompt": "q", "completion": "a"}, "image is not empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url"}]}]},
            "messages[0].content[1] is of type image_url: rows with image",
        ),
    ],
)
def test_rows_with_images_are_dropped_by_name(row, words):
    report = read([CHAT | {"images": [], "image": None}, row], format="auto")
    assert report.kept == 1 and [line for line, _ in report.dropped["media"]] == [2]
    assert words in report.dropped["media"][0][1]


def test_a_system_turn_for_all_rows():
    own = {"messages": [{"role": "system", "content": "own"}, *CHAT["messages"]]}
    report = read([CHAT, own], system="be brief")
    assert [row["messages"][0]["content"] for row in report.rows] == ["be brief", "own"]
    pair = {
        "prompt": CHAT["messages"][:1],
        "chosen": CHAT["messages"][1:],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    assert read([pair], "preference", system="be brief").rows[0]["prompt"][0] == {
        "role": "system",
        "content": "be brief",
    }
    plain = read(PAIRS[:1], system="be brief")
    assert not plain.rows and "has no system turn" in plain.dropped["plain_text"][0][1]


def test_whole_texts_are_trained_on_only_where_asked():
    objects = [{"text": "a whole text"}, {"text": "another text"}]
    report = read(objects, format="text")
    assert contents(report) == [{"prompt": "", "completion": row["text"]} for row in objects]
    assert len({row["group"] for row in report.rows}) == 2, "texts are no answers to one prompt"
    asked = read(objects)
    assert not asked.rows and "`format: text` trains on whole texts" in asked.dropped["missing_field"][0][1]


def test_lists_in_csv_are_written_as_json(tmp_path):
    lone = json.dumps([CHAT["messages"][0], {"role": "assistant", "content": "\ud800"}])
    objects = [{"messages": text} for text in (json.dumps(CHAT["messages"]), "[1, 2", lone)]
    report = rows.read_file(table(tmp_path, objects, "a.csv"), "sft")
    assert contents(report) == [CHAT]
    assert [line for line, _ in report.dropped["not_a_list"]] == [3]
    ((line, message),) = report.dropped["not_unicode"]
    assert line == 4 and message.startswith("field messages[1].content is not valid Unicode")
    assert not rows.read_file(table(tmp_path, objects, "a.jsonl"), "sft").rows, "control: in JSON a list is a list"


def test_labels_of_csv_are_true_and_false(tmp_path):
    objects = [{"prompt": "p", "completion": f"c{n}", "label": label} for n, label in enumerate(("true", "False", "2"))]
    report = rows.read_file(table(tmp_path, objects, "a.csv"), "kto")
    assert [row["label"] for row in report.rows] == [True, False]
    assert report.dropped["bad_label"] == [(4, "label must be true or false, found '2'")]
    assert not rows.read_file(table(tmp_path, objects, "a.jsonl"), "kto").rows, "control: in JSON a string is no label"


ODD = [
    "\u05e9\u05dc\u05d5\u05dd \u200f\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # right to left, with marks
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f3fd \U0001f1eb\U0001f1f7 \u2764\ufe0f",  # joined emoji
    "e\u0301 n\u0303 \u1100\u1161",  # decomposed letters
    "\u212b \ufb01 \u2126",  # letters that a normalisation would replace
    "\t a  b \r\n c\u00a0",  # white space
]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_letters_stay_byte_for_byte(tmp_path, text):
    """In every kind of file and shape, down to the file that trainers read. Control: a normalisation changes most."""
    objects = [{"prompt": text, "completion": f"x{text}"}]
    for end in ENDS:
        source = Source(
            path=str(table(tmp_path, objects, f"a{end}")), template={"prompt": "{prompt}", "completion": "{completion}"}
        )
        kept, *_ = source_rows(source)
        write_jsonl(tmp_path / "written.jsonl", kept)
        (row,) = read_jsonl(tmp_path / "written.jsonl")
        assert (row["prompt"].encode(), row["completion"].encode()) == (text.encode(), f"x{text}".encode())
    chat = read([{"text": f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>"}])
    assert chat.rows[0]["messages"][0]["content"] == text.strip()


def test_the_letters_of_the_test_are_those_that_change():
    assert sum(unicodedata.normalize("NFKC", text) != text for text in ODD) >= 3


# What `check` tells


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("path: SHARDS/*.json", "prepare.sft[0].path: there is no"),
        ("path: SHARDS/empty", "is a directory, and no file in it can be read here"),
        ("path: SHARDS, columns: {promt: q}", "prepare.sft[0].columns.promt: is not read in rows of sft"),
        ("path: SHARDS, columns: {prompt: qestion}", "prepare.sft[0].columns.prompt: none of the first 5 rows of"),
        ("path: SHARDS, columns: {prompt: qestion}", "has 'qestion'; hint: did you mean 'question'"),
        ("path: SHARDS, template: {prompt: '{q}'}", "prepare.sft[0].template.prompt: none of the first 5 rows"),
        ("path: SHARDS, template: {prompt: 'x {question'}", "template.prompt: 'x {question' cannot be read"),
        ("path: SHARDS, template: {prompt: 'x'}", "template.prompt: names no column"),
        ("path: SHARDS", "prepare.sft[0]: none of the first 5 rows of"),
        ("path: SHARDS", "has a layout of sft (messages, sharegpt, instruction, prompt_completion,"),
        ("path: SHARDS", "keys found: question, response; `columns` gives them other names"),
        ("path: SHARDS, columns: {text: question}", "`columns` gives them other names, and `format: text` trains on"),
        ("path: PAIRS", "keys found: prompt, chosen, rejected"),
        ("path: PAIRS", "prepare.answers[0]: none of the first 1 rows of"),
        ("path: PAIRS", "; prepare.sft reads such rows"),
        ("path: SHARDS/*.txt", "a.txt: plain text is read for text and long only; for sft allowed: .jsonl"),
        ("path: SHARDS/a*", "prepare.sft[0].path: "),
        ("path: SHARDS/a*", "a.xlsx: unknown kind of file; allowed: .jsonl, .ndjson, .json, .parquet, .csv, .tsv, all"),
        ("path: SHARDS, sample: random", "prepare.sft[0].sample: has no effect here"),
        ("path: SHARDS, format: kto", "kto does not hold rows for sft"),
    ],
)
def test_what_a_source_lacks_is_told_before_any_job(tmp_path, keys, words):
    folder = tmp_path / "shards"
    (folder / "empty").mkdir(parents=True)
    table(folder, [{"question": "q", "response": str(n)} for n in range(5)], "a.jsonl")
    for name in ("a.txt", "a.xlsx"):
        (folder / name).write_text("text")
    pairs = table(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}], "pairs.jsonl")
    kind = "answers" if "PAIRS" in keys else "sft"
    keys = keys.replace("PAIRS", str(pairs)).replace("SHARDS", str(folder))
    text = GOOD.replace("{world: {}}", f"{{world: {{}}, {kind}: [{{{keys}}}]}}")
    assert words in problems(tmp_path, one=text)


def test_exact_answers_need_a_column_of_answers(tmp_path):
    """As GSM8K has them, where the reply ends in the answer. Control: with it nothing is said."""
    lines = [{"question": f"q{n}?", "answer": f"so it is #### {n}"} for n in range(3)]
    file = table(tmp_path, lines, "a.jsonl")
    replies, answered = "prompt: question, completion: answer", "prompt: question, completion: answer, answer: answer"
    text = f"prepare: {{text: [{{path: {file}, columns: {{text: question}}}}], sft: [{{path: {file}COLUMNS}}]}}\n"
    text += "base: {scratch: {}}\nsft: {}\ngrpo: {prompts: sft, rewards: [{kind: exact}]}\n"
    assert f"`columns: {{{answered}}}` trains on them" in problems(tmp_path, one=text.replace("COLUMNS", ""))
    said = problems(tmp_path, one=text.replace("COLUMNS", f", columns: {{{replies}}}"))
    assert said.endswith(
        "none of the first 3 rows of " + f"{file} has an answer, such as by `columns: {{answer: COLUMN}}`"
    )
    load(tmp_path, one=text.replace("COLUMNS", f", columns: {{{answered}}}"))
    named = dict(part.split(": ") for part in answered.split(", "))
    read, *_ = source_rows(Source(path=str(file), columns=named))
    assert [(row["completion"], row["answer"]) for row in read] == [
        (line["answer"], str(n)) for n, line in enumerate(lines)
    ]


@pytest.mark.parametrize(("answer", "kept"), [(7, "7"), (0.5, "0.5"), ("a", "a"), (True, None), ("", None)])
def test_a_number_is_an_answer(tmp_path, answer, kept):
    """And so is one that is the whole reply."""
    file = table(tmp_path, [{"prompt": "p", "completion": "a", "answer": answer}], "a.jsonl")
    assert [row.get("answer") for row in source_rows(Source(path=str(file)))[0]] == [kept]


def test_a_whole_text_asks_nothing(tmp_path):
    """It is no prompt that a policy is asked. Control: a row with a prompt is one."""
    lines = [{"id": "1", "prompt": "", "completion": "a whole text"}, {"id": "2", "prompt": "Q", "completion": "A"}]
    write_jsonl(tmp_path / "a.jsonl", lines)
    assert [row["id"] for row in prompts._prompts(tmp_path / "a.jsonl", tokenizer_of("qwen2.5"))] == ["2"]


def test_the_card_says_licence_origin_and_languages_as_given_or_unknown(tmp_path):
    table(tmp_path, PAIRS, "a.jsonl")
    source = Source(path=str(tmp_path / "a.jsonl"))
    cards = [
        source_rows(source.model_copy(update=given))[1][0]
        for given in ({}, {"licence": "MIT", "languages": ["en", "fa"]})
    ]
    known = [(card["licence"], card["origin"], card["languages"]) for card in cards]
    assert known == [("unknown", "unknown", "unknown"), ("MIT", "unknown", "en, fa")]
    assert described(Source(dataset="org/set", revision="0" * 40))["origin"] == f"org/set at {'0' * 40}"


def test_lengths_are_counted_in_classes():
    lengths = [5, 6, 7, 9, 9, 30]
    counted = summary(lengths)
    assert counted["histogram"] == [[6, 2], [8, 1], [12, 2], [16, 0], [24, 0], [32, 1]]
    assert [counted[key] for key in ("min", "p25", "median", "p75", "p95", "p99", "max")] == [5, 6, 7, 9, 9, 9, 30]


def test_rows_that_take_long_are_counted_with_their_speed_and_the_time_left(monkeypatch, capsys):
    clock = iter(range(0, 1000, 10))  # ten seconds a row
    monkeypatch.setattr(stored.time, "monotonic", lambda: next(clock))
    assert list(stored.counted(range(10), "sft", 100)) == list(range(10))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[posttrain] sft: 2 rows of 100, 0.1 a second, 24 min left" and len(lines) == 3
    assert list(stored.counted(range(4), "sft")) == list(range(4))
    assert capsys.readouterr().err == "[posttrain] sft: 2 rows, 0.1 a second\n"
    monkeypatch.setattr(stored, "EVERY", 1e9)
    assert list(stored.counted(range(10), "sft", 100)) and not capsys.readouterr().err, "control: nothing while short"


def test_memory_holds_numbers_of_the_rows_not_the_rows(tmp_path, monkeypatch):
    """Reading, telling repeats and searching for overlap: a few dozen bytes more a row; control: a list of them."""
    for module in (stored, overlap):
        monkeypatch.setattr(module, "BATCH", 50)

    rng = random.Random(0)

    def peak(count: int, hold=lambda rows: rows) -> int:
        texts_ = (" ".join(f"w{rng.randrange(10**6)}" for _ in range(60)) for _ in range(2 * count))
        file = tmp_path / f"{count}.jsonl"
        write_jsonl(file, ({"prompt": next(texts_), "completion": next(texts_)} for _ in range(count)))
        tracemalloc.start()
        found = hold(source_rows(Source(path=str(file)))[0])
        assert len(overlap.overlap(found, found[:5])) == 5
        peaked = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peaked

    peak(100)  # what is imported
    assert peak(900) - peak(300) < 600 * 300
    assert peak(900, list) - peak(300, list) > 600 * 1000
