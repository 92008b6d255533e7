"""Ranked lists and ratings: as pairs, and as completions with a label.

pytest tests/unit/test_rankings.py
"""

import itertools
import json

import pytest
from test_campaign import GOOD, problems

from posttrain.config.sections import Source
from posttrain.data import rankings, rows, texts
from posttrain.data.lines import RowError

ANSWERS = ["good", "fair", "poor"]
ALL_PAIRS = {("good", "fair"), ("good", "poor"), ("fair", "poor")}


def read(objects: list[dict], task="preference", format="auto", **keys) -> rows.Report:
    return rows.read_rows(objects, "made", task, format, source=Source(**keys))


def pairs(report) -> set[tuple[str, str]]:
    return {(row["chosen"], row["rejected"]) for row in report.rows}


@pytest.mark.parametrize(
    "more",
    [
        {"completions": ANSWERS, "scores": [3, 2.5, "-1"]},
        {"completions": ANSWERS[::-1], "ratings": [1, 2, 3]},
        {"completions": ANSWERS, "ranks": [1, 2, 3]},
        {"completions": [{"text": text, "score": 3 - n} for n, text in enumerate(ANSWERS)]},
        {"completions": [{"response": text, "overall_score": 3 - n} for n, text in enumerate(ANSWERS)]},
        {"completions": [{"answer": text, "rank": n + 1.0} for n, text in enumerate(ANSWERS)]},
    ],
)
def test_all_pairs_of_a_ranked_list(more):
    report = read([{"prompt": "q", "id": 7} | more])
    assert report.format == "ranking" and pairs(report) == ALL_PAIRS and "unread_keys" not in report.warnings
    assert [(row["id"], row["source"]) for row in report.rows] == [(f"7#{n}", "made:1") for n in (1, 2, 3)]
    assert len({row["group"] for row in report.rows}) == 1, "a prompt is on one side of the split"
    assert all(texts.content(row).keys() == {"prompt", "chosen", "rejected"} for row in report.rows)


def test_ratings_become_the_pairs_margins():
    """The difference of both; not of ranks, of places or of a best one, which are no ratings."""
    rated = [
        {"completions": ANSWERS, "scores": [3, 2.5, "-1"]},
        {"completions": [{"text": text, "rating": score} for text, score in zip(ANSWERS, (3, 2.5, -1), strict=True)]},
    ]
    for more in rated:
        report = read([{"prompt": "q"} | more])
        assert {(row["chosen"], row["rejected"]): row["margin"] for row in report.rows} == {
            ("good", "fair"): 0.5, ("good", "poor"): 4, ("fair", "poor"): 3.5,
        }  # fmt: skip
    pair = {"prompt": "q", "chosen": "good", "rejected": "poor"}
    given = [{"margin": 2}, {"score_chosen": "5", "score_rejected": 3.5}, {"chosen-rating": 4, "rejected-rating": 4}]
    rows_of = [read([pair | more]).rows[0] for more in given]
    assert [row["margin"] for row in rows_of] == [2.0, 1.5, 0.0]
    assert read([pair | {"margin": 1}, pair | {"margin": 2}]).rows and texts.content(rows_of[0]) == pair
    bare = [pair, {"prompt": "q", "completions": ANSWERS, "ranks": [1, 2, 3]},
            {"prompt": "q", "completions": ANSWERS, "best": 0}]  # fmt: skip
    assert not any("margin" in row for one in bare for row in read([one]).rows), "control"
    for wrong in (-1, "high", True):
        dropped = read([pair | {"margin": wrong}])
        assert not dropped.rows and "margin must be a number from 0" in str(dropped.dropped)


def test_the_best_first_where_no_score_is_given():
    assert pairs(read([{"prompt": "q", "completions": ANSWERS}], format="ranking")) == ALL_PAIRS


def test_conversations_and_texts_of_turns_are_ranked():
    prompt = [{"role": "user", "content": "q"}]
    lists = [[{"role": "assistant", "content": text}] for text in ANSWERS]
    report = read([{"prompt": prompt, "completions": lists, "scores": [3, 2, 1]}])
    assert {(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in report.rows} == ALL_PAIRS
    nectar = {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "answers": [{"answer": a, "rank": n} for n, a in enumerate(ANSWERS)],
    }
    again = read([nectar], columns={"completions": "answers"})
    assert [texts.content(row) for row in again.rows] == [texts.content(row) for row in report.rows]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"post": "q", "summaries": [{"text": "poor"}, {"text": "good"}], "choice": 1},  # summarize_from_feedback
         {"prompt": "post", "completions": "summaries", "best": "choice"}),
        ({"history": "q", "ref_A": "good", "ref_B": "poor", "labels": 1},  # SHP
         {"prompt": "history", "completions": ["ref_B", "ref_A"], "best": "labels"}),
        ({"question": "q", "answer_0": "good", "answer_1": "poor", "score_0": 0.5, "score_1": -0.5},  # WebGPT
         {"prompt": "question", "completions": ["answer_0", "answer_1"], "scores": ["score_0", "score_1"]}),
    ],
)  # fmt: skip
def test_public_comparisons(row, columns):
    report = read([row], columns=columns)
    assert pairs(report) == {("good", "poor")} and "unread_keys" not in report.warnings


def test_the_best_of_several_is_compared_with_each_of_the_others():
    assert pairs(read([{"prompt": "q", "completions": ANSWERS, "best": 1}])) == {("fair", "good"), ("fair", "poor")}


def test_equal_answers_make_no_pair():
    report = read([{"prompt": "q", "completions": ANSWERS, "scores": [3, 1, 1]}])
    assert pairs(report) == {("good", "fair"), ("good", "poor")}
    one = read([{"prompt": "q", "completions": ANSWERS[:2], "scores": [2, 1]}])
    assert pairs(one) == {("good", "fair")} and one.rows[0]["id"] == "made-1"


@pytest.mark.parametrize(
    ("more", "reason", "words"),
    [
        ({"scores": [1, 1, 1]}, "no_signal", "all answers are worth the same"),
        ({"scores": [1, 2]}, "scores", "scores must be a list of 3 numbers"),
        ({"scores": [1, True, 2]}, "scores", "scores[1] must be a number, found true or false"),
        ({"scores": [1, "high", 2]}, "scores", "scores[1] must be a number, found a string"),
        (
            {"completions": ["a", "", "c"], "scores": [1, 2, 3]},
            "empty_reply",
            "completions[1] as rejected: reject",
        ),
        ({"completions": ["a"], "scores": [1]}, "one_answer", "nothing to compare"),
        ({"completions": "a", "scores": [1]}, "not_a_list", "completions must be a list, found a string"),
        ({"completions": [{"text": "a"}, {"text": "b"}]}, "scores", "completions[0] has no score; allowed: score"),
        ({"completions": [{"score": 1}, {"text": "b"}]}, "missing_field", "one of completions has no text"),
        ({"best": 3}, "scores", "best must be the number of a completion, from 0 to 2, found 3"),
        ({"completions": None}, "missing_field", "missing field completions"),
    ],
)
def test_a_ranked_list_that_cannot_be_used_is_dropped_whole(more, reason, words):
    good = {"prompt": "p", "completions": ANSWERS, "scores": [3, 2, 1]}
    report = read([good, {"prompt": "q", "completions": ANSWERS} | more])
    assert report.kept == 3 and [line for line, _ in report.dropped[reason]] == [2]
    assert words in report.dropped[reason][0][1]


def score_rows(*scored: tuple[str, str, object]) -> list[dict]:
    return [{"prompt": prompt, "completion": answer, "score": score} for prompt, answer, score in scored]


def test_rows_with_a_score_are_compared_within_their_prompt():
    report = read(score_rows(("p", "poor", 1), ("p", "good", 3), ("p", "fair", 2), ("q", "x", 1), ("q", "y", 0)))
    assert report.format == "score" and pairs(report) == ALL_PAIRS | {("x", "y")} and report.total == 5
    assert [row["source"] for row in report.rows] == ["made:1"] * 3 + ["made:4"]


def test_rows_are_joined_one_prompt_at_a_time():
    endless = ((n, RowError("bad", "not read"), False) for n in itertools.count(1))
    assert [line for line, *_ in itertools.islice(rankings.joined(endless), 3)] == [1, 2, 3]
    prompts = ((n, score_rows((f"p{n // 2}", str(n), n))[0], False) for n in itertools.count())
    first, second = itertools.islice(rankings.joined(prompts), 2)
    assert (first[1].count, first[1]["completions"], second[0]) == (2, ["0", "1"], 2)


def test_rows_of_a_prompt_that_stand_apart_are_named():
    report = read(score_rows(("p", "a", 1), ("p", "b", 2), ("q", "x", 1), ("p", "c", 3), ("q", "y", 3)))
    assert pairs(report) == {("b", "a")} and report.total == 5
    apart = "its prompt came before, behind other prompts; sort the rows by prompt"
    assert report.dropped == {
        "one_answer": [(3, "a single answer to its prompt: nothing to compare")],
        "apart": [(4, apart), (5, apart)],
    }


def text_of(reply) -> str:
    return reply if isinstance(reply, str) else reply[0]["content"]


HUMAN = "\n\nHuman: q\n\nAssistant: "


@pytest.mark.parametrize(
    ("row", "labels"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"a": True, "b": False}),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            {"a": True, "b": False},
        ),
        ({"prompt": "q", "completion": "a", "score": 3}, {"a": True}),
        ({"prompt": "q", "completion": "a", "score": 2.9}, {"a": False}),
        ({"prompt": "q", "completions": ANSWERS, "scores": [4, 3, -1]}, {"good": True, "fair": True, "poor": False}),
        ({"prompt": "q", "completions": [{"text": "a", "rating": 1}]}, {"a": False}),
    ],
)
def test_rows_for_kto(row, labels):
    report = read([row], "kto", threshold=3.0)
    assert [(text_of(row["completion"]), row["label"]) for row in report.rows] == list(labels.items())
    assert not report.dropped and "unread_keys" not in report.warnings


def test_a_score_without_a_threshold_is_no_label():
    report = read(score_rows(("p", "a", 1)), "kto")
    assert not report.rows and "set `threshold`" in report.dropped["threshold"][0][1]
    ranks = read([{"prompt": "q", "completions": ANSWERS, "ranks": [1, 2, 3]}], "kto", threshold=1.0)
    assert not ranks.rows and "the answers have no scores" in ranks.dropped["scores"][0][1]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("kto: [{path: a, format: score}]", "prepare.kto[0].threshold: is missing"),
        ("kto: [{path: b}]", "prepare.kto[0].threshold: is missing"),
        ("kto: [{path: a, format: kto, threshold: 1.0}]", "prepare.kto[0].threshold: has no effect here"),
        ("preference: [{path: a, threshold: 1.0}]", "prepare.preference[0].threshold: has no effect here"),
        ("sft: [{path: a, format: ranking}]", "ranking does not hold rows for sft"),
    ],
)
def test_what_check_tells(tmp_path, keys, words):
    (tmp_path / "a").write_text("")
    (tmp_path / "b.jsonl").write_text(json.dumps(score_rows(("p", "a", 1))[0]))
    keys = keys.replace("path: b", f"path: {tmp_path}/b.jsonl")
    assert words in problems(tmp_path, one=GOOD.replace("{world: {}}", f"{{world: {{}}, {keys}}}"))
