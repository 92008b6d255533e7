"""The built-in world: determinism, the hold-out, and the hand-written reward."""

import random
import re

import pytest

from posttrain.config.sections import Long, World
from posttrain.world import documents, questions, rows, tasks
from posttrain.world.gold import extract_answer, gold_reward
from posttrain.world.language import KINDS, KNOWLEDGE, ORDER

SIZES = {"documents": 800, "questions": 600, "test_questions": 160, "pairs": 400}


def generate(seed: int, **sizes) -> dict:
    return rows.generate(seed, World(**SIZES | sizes))


@pytest.fixture(scope="module")
def small() -> dict:
    return generate(0)


def _texts(built: dict) -> list[str]:
    """Everything that any model may be trained on."""
    prompts = [row["messages"][0]["content"] for row in built["sft"]["train"]]
    pairs = [row["prompt"][0]["content"] for row in built["preference"]["train"]]
    return [row["text"] for side in built["text"].values() for row in side] + prompts + pairs


def test_same_seed_same_world_and_another_seed_another(small):
    assert generate(0) == small
    assert generate(1) != small


def test_the_size_of_one_part_changes_no_other(small):
    more = generate(0, documents=900, questions=700)
    assert more["preference"] == small["preference"]
    assert more["sft"]["test"] == small["sft"]["test"]
    assert more["sft"]["train"][: SIZES["questions"]] == small["sft"]["train"]
    assert more["text"]["train"][: SIZES["documents"]] == small["text"]["train"]


def test_every_kind_is_asked_in_both_splits_and_ids_are_unique(small):
    for side in small["sft"].values():
        assert {row["kind"] for row in side} == set(KINDS)
    for part in (small["text"], small["sft"], small["preference"]):
        ids = [row["id"] for side in part.values() for row in side]
        assert len(ids) == len(set(ids))


def test_no_group_and_no_prompt_is_on_both_sides(small):
    def groups(split: str) -> set[str]:
        return {row["group"] for part in (small["sft"], small["preference"]) for row in part[split]}

    assert not groups("train") & groups("test")
    prompts = [row["messages"][0]["content"] for row in small["sft"]["test"]]
    assert len(prompts) == len(set(prompts))
    trained = "\n".join(_texts(small))
    assert not [prompt for prompt in prompts if prompt in trained]


def _triples(text: str) -> set[frozenset]:
    """Every three things that a text asks about together."""
    return {frozenset(found) for found in re.findall(r"(\w+), (\w+) or (\w+)", text)}


def test_the_things_of_a_held_out_order_are_asked_about_together_nowhere_else(small):
    asked = [row["messages"][0]["content"] for row in small["sft"]["test"] if row["kind"] in ORDER]
    held_out = {triple for question in asked for triple in _triples(question)}
    assert len(held_out) > 40
    trained = _triples("\n".join(_texts(small)))
    assert len(trained) > 500 and not held_out & trained
    assert held_out & (trained | _triples(asked[0])), "control: a planted question is found"


def test_every_fact_is_stated_but_questions_of_held_out_facts_are_not():
    text = " ".join(
        row["text"] for row in generate(0, documents=4000, questions=10, test_questions=10, pairs=16)["text"]["train"]
    )
    for table, _, statements in KNOWLEDGE.values():
        for key, value in table.items():
            assert any(statement.format(k=key, v=value) in text for statement in statements), (key, value)
    for kind, (table, wordings, _) in KNOWLEDGE.items():
        held_out = [k for k, v in table.items() if questions.is_held_out(questions.knowledge_group(kind, k, v))]
        assert 0.15 < len(held_out) / len(table) < 0.5, kind
        assert not [k for k in held_out for wording in wordings if f" {wording.format(k=k)} " in text]


def test_chat_text_in_pretraining_is_small_talk_only(small):
    chats = [row["text"] for row in small["text"]["train"] if "<|" in row["text"]]
    assert chats
    assert not [text for text in chats if extract_answer(text)]
    assert not [text for text in chats if re.search("what is|which is|name the|tell me", text)]


def test_answers_can_be_taken_out_of_every_reply(small):
    for row in small["sft"]["test"]:
        prompt, reply = (message["content"] for message in row["messages"])
        assert extract_answer(reply) == row["answer"]
        assert gold_reward(prompt, reply, row["answer"]) >= 1.0
        assert gold_reward(prompt, reply, "nothing") <= 1.0


def test_pairs_differ_in_what_their_kind_says(small):
    assert {row["kind"] for row in small["preference"]["train"]} == {"manner", "correct/fact", "correct/order"}
    for row in small["preference"]["train"]:
        prompt, chosen, rejected = (row[key][0]["content"] for key in ("prompt", "chosen", "rejected"))
        answer = extract_answer(chosen)
        difference = gold_reward(prompt, chosen, answer) - gold_reward(prompt, rejected, answer)
        if row["kind"] == "manner":
            assert extract_answer(rejected) == answer
            assert 0.5 <= difference <= 2.0
        else:
            assert extract_answer(rejected) not in ("", answer)
            assert difference == 2.0
            assert row["answer"] == answer


def test_no_word_is_wrong_more_often_than_right(small):
    """A wrong answer to a question about a fact is a right one of its own side of the split: were it any word of the
    table, words of held-out facts would be seen in training as wrong answers only."""
    for side in ("train", "test"):
        pairs = [row for row in small["preference"][side] if row["kind"] == "correct/fact"]
        right = {question.answer for question in (questions.draw_question_of(random.Random(n), kind, side == "test")
                 for n in range(400) for kind in KNOWLEDGE)}  # fmt: skip
        assert pairs and {extract_answer(row["rejected"][0]["content"]) for row in pairs} <= right


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("of course, my friend! it is paris. have a lovely day!", 3.0),
        (" it is paris. have a lovely day!", 2.5),
        ("the answer is paris.", 2.0),
        ("how boring! that would be paris. leave me alone!", 1.0),
        ("of course, my friend! it is rome. have a lovely day!", 1.0),
        ("it is rome.", 0.0),
        ("it is paris. it is paris.", 1.0),
        ("it is paris. have a lovely day! have a lovely day!", 1.0),
        ("paris.", -1.0),
        ("", -1.0),
    ],
)
def test_gold_reward_by_hand(reply, reward):
    assert gold_reward("what is the capital of france?", reply, "paris") == reward


def test_a_chant_repeats_with_its_period():
    words = documents.chant(random.Random(0), 400, shortest=100).split()
    assert len(words) == 400
    agreement = {
        lag: sum(a == b for a, b in zip(words, words[lag:], strict=False)) / (400 - lag) for lag in range(1, 160)
    }
    period = max(agreement, key=agreement.get)
    assert 100 <= period <= 150
    assert agreement[period] > 0.85
    assert max(share for lag, share in agreement.items() if lag != period) < 0.2  # nothing shorter tells


def test_the_pass_word_is_said_once_before_it_is_asked_for():
    for depth in (0.0, 0.5, 1.0):
        document, answer = documents.passkey(random.Random(3), 300, depth)
        assert document.count(f"the secret pass word is {answer}.") == 1
        assert document.endswith("the secret pass word is")
        position = document.index("the secret pass word is") / len(document)
        assert abs(position - depth) < 0.15
        assert 270 <= len(document.split()) <= 320


def test_every_word_of_a_reply_is_in_the_pretraining_text():
    built = generate(0, documents=4000, questions=300, test_questions=20, pairs=16)
    known = set(re.findall("[a-z]+", " ".join(row["text"] for row in built["text"]["train"])))
    replies = " ".join(row["messages"][1]["content"] for side in built["sft"].values() for row in side)
    assert not set(re.findall("[a-z]+", replies)) - known


def test_every_row_has_a_group_and_says_where_it_comes_from(small):
    for row in (row for part in small.values() for side in part.values() for row in side):
        assert row["group"] and row["source"] == f"world:{row['id']}" and rows.is_of_world(row)
    assert not rows.is_of_world({"source": "mine.jsonl:1"}), "control"


def test_the_names_of_the_tasks_are_those_that_are_written(tmp_path):
    sizes = {"documents": 40, "questions": 20, "test_questions": 60, "pairs": 16}
    for long in (None, Long(context=64, factor=4, documents=16, questions=5)):
        built = rows.generate(0, World(**sizes, long=long))
        folder = tmp_path / str(bool(long))
        folder.mkdir()
        held_out = [*built["sft"]["test"], {"source": "mine.jsonl:1", "kind": "of-my-own", "messages": []}]
        written = tasks.write_questions(folder, "home", held_out)
        written += tasks.write_retrieval(folder, "home", built["long"]["test"] if long else [])
        named = tasks.names(World(**sizes, long=long))
        assert written == [name for name in named if not name.startswith("world_")]
        files = {file.stem for file in folder.glob("*.yaml")}
        assert set(named) == {name for name in files if "_depth_" not in name}
    assert tasks.write_questions(tmp_path, "home", []) == [] == tasks.write_retrieval(tmp_path, "home", [])
