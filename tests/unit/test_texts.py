"""The words of texts, and the numbers by which equal rows are told.

pytest tests/unit/test_texts.py
"""

import random

from posttrain.data import texts


def test_a_text_of_ascii_has_the_words_and_oddities_that_the_patterns_find():
    """A letter beyond ASCII sends a text through the patterns; every character of ASCII stands beside every other."""
    every = "".join(a + b for a in map(chr, range(128)) for b in map(chr, range(128)))
    rng = random.Random(0)
    some = ["".join(rng.choices([*map(chr, range(128)), "<|a|>", "</s>", "word", " "], k=8)) for _ in range(300)]
    for text in [every, *some, ""]:
        assert texts.words(f"{text} é") == (*texts.words(text), "é")
        assert texts.odd(f"{text} é") == texts.odd(text)
    assert texts.words("A+b, it's_ONE.") == ("a", "+", "b", "it", "s_one")
    assert {kind for text in some for kind in texts.odd(text)} == {"control_character", "special_token"}
    assert not all(map(texts.odd, some)), "control"


def test_a_number_tells_values_apart_whatever_the_order_of_keys():
    values = [2**70, 2**70 + 1, 1, 1.0, True, "1", None, [], {}, [[1], 2], [1, [2]], "\ud800", "\ud801"]
    values += [{"a": value} for value in values] + [{"b": 1, "a": [2, "é"]}]
    assert len(set(map(texts.number, values))) == len(values)
    assert texts.number({"a": [2, "é"], "b": 1}) == texts.number(values[-1])
    assert texts.number(("a", "b")) == texts.number(["a", "b"])
