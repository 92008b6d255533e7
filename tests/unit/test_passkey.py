"""Passkey retrieval: questions that fit by any tokenizer, scores, and the largest distance that is reached."""

import pytest
import zoo

from posttrain.config.sections import Passkey
from posttrain.evaluation import passkey
from posttrain.ground.errors import UserError
from posttrain.models import control

ASKED = Passkey(questions=8, depths=4)


def test_questions_fill_their_length_and_no_more():
    tokenizer = zoo.tokenizer()
    rows = passkey.questions(ASKED, tokenizer, 1000)
    filler = len(control.plain(tokenizer, f" {passkey.FILLER}"))
    for row in rows:
        text = tokenizer.decode(row["ids"][1:])
        assert text.count(f"The pass key is {row['key']}. Remember it. {row['key']} is the pass key.") == 1
        assert text.startswith(passkey.BEGINNING) and text.endswith("\nWhat is the pass key? The pass key is")
        reply = len(control.plain(tokenizer, f" {row['key']}")) + 1
        assert 1000 - filler < len(row["ids"]) + reply <= 1000
        assert len(row["key"]) == 5
    assert [row["depth"] for row in rows] == [0, 33, 67, 100] * 2
    distances = [row["distance"] for row in rows[:4]]
    assert distances == sorted(distances, reverse=True) and distances[-1] < filler < distances[0]
    assert rows == passkey.questions(ASKED, tokenizer, 1000), "the same for every policy"
    with pytest.raises(UserError, match=r"lengths.tokens: 96 is too short for lengths.passkey, which needs \d+ tokens"):
        passkey.questions(ASKED, tokenizer, 96)


@pytest.mark.parametrize(
    ("reply", "right"),
    [(" 12345.", 1), ("12345 is", 1), (" the key 12345", 1), (" 123456", 0), (" 1 12345", 0), ("", 0)],
)
def test_the_first_number_of_a_reply_counts(reply, right):
    assert passkey.score({"key": "12345", "ids": [1, 2]}, reply)["exact_match"] == right


def test_k_max_ends_at_the_first_distance_that_is_not_reached():
    def of(distance: int, found: int) -> list[dict]:
        depth = 100 - distance
        return [
            {"length": 256, "depth": depth, "distance": distance, "exact_match": float(n < found)} for n in range(10)
        ]

    assert passkey.k_max([of(90, 10), of(10, 10), of(50, 2), of(70, 1)]) == 50
    assert passkey.k_max([of(10, 1), of(50, 10)]) == 0
    assert passkey.k_max([of(10, 9), of(50, 10), of(50, 0)]) == 10, "depths with the same distance"
    rows = passkey.table([*of(10, 10), *of(50, 5), *of(90, 0)])
    shown = [(row["task"], row["metric"], row["value"], row["n"]) for row in rows]
    assert shown == [
        ("landmark_passkey_256", "exact_match", 0.5, 30), ("landmark_passkey_256", "k_max", 50.0, 30),
        *((f"landmark_passkey_256_depth_{depth}", "exact_match", share, 10)
          for depth, share in ((10, 0.0), (50, 0.5), (90, 1.0))),
    ]  # fmt: skip
