"""Runs of words that texts share with sequences, beside a search word by word."""

import random

import pytest

from posttrain.data.runs import Coded, Needles, Runs


def sequences(count: int, seed: int) -> list[tuple]:
    """Sequences of 0 to 12 of three words, so that many runs occur several times."""
    rng = random.Random(seed)
    return [tuple(rng.choices("abc", k=rng.randrange(13))) for _ in range(count)]


def places(size: int, texts: list[tuple]) -> dict[tuple, list[tuple[int, int]]]:
    """Run -> (number of a text, place), word by word."""
    found: dict[tuple, list[tuple[int, int]]] = {}
    for number, text in enumerate(texts):
        for at in range(len(text) - size + 1):
            found.setdefault(text[at : at + size], []).append((number, at))
    return found


@pytest.mark.parametrize("size", (1, 4, 13))
def test_runs_are_those_of_a_search_word_by_word(size):
    owned, texts = sequences(40, seed=1), sequences(60, seed=2)
    runs, expected = Runs(size, owned), places(size, owned)
    hits = list(zip(*(part.tolist() for part in runs.search(Coded(texts))), strict=True))
    shared = {run: at for run, at in places(size, texts).items() if run in expected}
    assert sorted((text, at) for text, at, _ in hits) == sorted(place for of_run in shared.values() for place in of_run)
    for text, at, run in hits:
        assert runs.of(run) == expected[texts[text][at : at + size]]
    assert (size == 13) == (not hits), "control: there is something to find, but for runs longer than any text"


def test_needles_are_found_wherever_they_are_and_nowhere_else():
    needles, texts = sequences(40, seed=3), sequences(60, seed=4)
    expected = {
        (number, needle)
        for number, text in enumerate(texts)
        for needle in needles
        if len(needle) >= 4 and needle in places(len(needle), [text])
    }
    assert set(Needles(4, needles).search(Coded(texts))) == expected and expected


def test_nothing_is_found_for_nothing():
    assert [len(part) for part in Runs(3, []).search(Coded([("a", "b", "c")]))] == [0, 0, 0]
    assert [len(part) for part in Runs(3, [("a", "b", "c")]).search(Coded([]))] == [0, 0, 0]
    assert list(Needles(3, [("a",)]).search(Coded([("a", "b", "c")]))) == []
