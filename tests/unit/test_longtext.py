"""Documents with long dependence: what they depend on, how far back, and that nothing held out is trained on."""

import random

import pytest

from posttrain.config.sections import Long
from posttrain.world import longtext


def test_a_motif_repeats_with_its_period_and_says_what_comes_next():
    rng = random.Random(0)
    for _ in range(20):
        text, following = longtext.motif(rng, 256, 256, least=8, noise=0.0)
        words = text.split()
        period = next(lag for lag in range(1, 256) if words[lag:] == words[:-lag])
        assert 32 <= period <= 96 and len(words) == 256 and words[256 - period] == following
        if period <= len(longtext.WORDS):
            assert len(set(words[:period])) == period, "one word before tells the next"
    noisy = longtext.motif(random.Random(1), 256, 256)[0].split()
    assert all(noisy[lag:] != noisy[:-lag] for lag in range(1, 128)), "control: training has noise"


def period(text: str) -> int:
    """The first lag at which most words come again."""
    words = text.split()
    again = {lag: sum(map(str.__eq__, words, words[lag:])) / (len(words) - lag) for lag in range(1, len(words) // 2)}
    return next(lag for lag, share in again.items() if share > 0.7)


@pytest.mark.parametrize("depth", longtext.DEPTHS)
def test_a_pass_word_is_stated_once_at_its_depth(depth):
    for tokens in (64, 256):
        text, answer = longtext.passkey(random.Random(3), tokens, depth)
        said = f"secret pass: {answer}."
        assert text.count("secret pass:") == 2 and text.count(said) == 1 and text.endswith("secret pass:")
        assert tokens - longtext.ROOM - 12 <= longtext.size(text) <= tokens - longtext.ROOM
        before = longtext.size(text[: text.index(said)]) / (longtext.size(text) - 8)
        assert abs(before - depth / 100) < 0.2
        assert f" {answer}" not in text.replace(said, ""), "it stands nowhere else"


def test_lengths_of_documents_and_their_split():
    made = longtext.generate(0, 40, Long(context=64, factor=4, documents=64, questions=10))
    assert longtext.held_out_lengths(Long(context=64, factor=4)) == [64, 128, 256]
    assert longtext.held_out_lengths(Long(context=64, factor=6)) == [64, 128, 256, 384], (
        "the longest is what is trained for"
    )
    for row in made["long"]["test"]:
        if "answer" not in row:
            assert longtext.size(row["text"]) >= row["length"]
    kinds = [(row["kind"], row["length"]) for row in made["long"]["test"] if "answer" in row]
    assert all(kinds.count((kind, length)) == 10 for kind in ("passkey", "recall") for length in (64, 128, 256))
    near = [row for row in made["long"]["test"] if row.get("task") == "near_text"]
    assert [row["length"] for row in near] == [64] * 4 + [128] * 4 + [256] * 4
    assert all(period(row["text"]) <= 64 * 3 // 8 for row in near), "one that a model of the short context has seen"
    far = [row for row in made["long"]["test"] if row["kind"] == "motif" and row["length"] == 256 and row not in near]
    assert max(period(row["text"]) for row in far) > 64 * 3 // 8, "control: the others' grows with their length"
    trained = {row["text"] for side in ("text", "long") for row in made[side]["train"]}
    assert not trained & {row["text"] for side in ("text", "long") for row in made[side]["test"]}
    assert made == longtext.generate(0, 40, Long(context=64, factor=4, documents=64, questions=10))
    assert made != longtext.generate(1, 40, Long(context=64, factor=4, documents=64, questions=10))
