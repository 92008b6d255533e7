"""Drop exact duplicates, split rows by group, and find test rows that overlap with training rows."""

import hashlib
from collections import defaultdict
from typing import NamedTuple

from posttrain.data import texts
from posttrain.data.rows import DERIVED

FEWEST_ASKED = 5  # words of a prompt from which an equal prompt is a finding: "Tell me a joke" is not
FEWEST_CONTAINED = 8  # words of a prompt from which it is searched in other texts
GRAM = 13  # consecutive words that two texts share by copying, hardly by chance (Brown et al. 2020, appendix C)
COMMON = 10  # training prompts beyond which a short prompt or a gram is boilerplate (ibid.)
COVERED = 0.5  # share of a test prompt's words in shared grams from which it is a finding


class Finding(NamedTuple):
    """A test row that overlaps with a training row: the places of both (file:line), and the kind of overlap."""

    test: str
    train: str
    how: str  # exact, normalised, contained, grams, group

    def __str__(self) -> str:
        meanings = {
            "exact": "the same row or prompt as",
            "normalised": "the same row or prompt, but for case, space and punctuation, as",
            "contained": "its prompt occurs in, or is mostly the prompt of,",
            "grams": f"at least half of its words are in runs of {GRAM} words shared with",
            "group": "the same group as",
        }
        return f"{self.test}: {self.how} overlap: {meanings[self.how]} {self.train}"


def deduplicate(rows: list[dict]) -> tuple[list[dict], int]:
    """(rows without exact repeats of earlier content, number of dropped rows)."""
    first: dict[str, dict] = {}
    for row in rows:
        first.setdefault(texts.digest(texts.content(row)), row)
    return list(first.values()), len(rows) - len(first)


def split(rows: list[dict], test_fraction: float, seed: int) -> tuple[list[dict], list[dict], str | None]:
    """(train, test, warning). A group's side depends on seed and group only, so that new rows move no others.

    With two or more groups, neither side is empty. With fewer there is no test set but a warning.
    Raises ValueError unless 0 <= test_fraction < 1.
    """
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction must be at least 0 and under 1, found {test_fraction}")
    place = {row["group"]: _place(seed, row["group"]) for row in rows}
    if test_fraction == 0:
        return rows, [], None
    if len(place) < 2:
        count = f"{len(rows)} rows in {len(place)} groups"
        return rows, [], f"{count}: too few rows for a train/test split, no test set is made"
    order = sorted(place, key=lambda group: (place[group], group))
    held_out = {group for group in place if place[group] < test_fraction} or {order[0]}
    held_out -= {order[-1]} if len(held_out) == len(order) else set()
    train = [row for row in rows if row["group"] not in held_out]
    return train, [row for row in rows if row["group"] in held_out], None


def _place(seed: int, group: str) -> float:
    """A number in [0, 1) drawn from seed and group."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:6], "big") / 2**48


def overlap(train: list[dict], test: list[dict]) -> list[Finding]:
    """One finding for each test row that overlaps with a training row, of the first kind that applies: exact,
    normalised, contained, grams, group. Equal short prompts and boilerplate are no findings.
    """
    train_texts = [texts.words(texts.full_text(row)) for row in train]
    train_prompts = [tuple(texts.words(texts.prompt_text(row))) for row in train]
    test_prompts = [tuple(texts.words(texts.prompt_text(row))) for row in test]
    first: dict[tuple, int] = {}
    prompt_of = [first.setdefault(prompt, j) for j, prompt in enumerate(train_prompts)]  # equal prompts are one
    inside = _find({*train_prompts, *test_prompts}, train_texts, prompt_of)
    boilerplate = {needle for needle, rows in inside.items() if len(needle) < GRAM and len(rows) > COMMON}
    kinds = [
        _same(train, train_prompts, test, test_prompts, boilerplate),
        _contained(inside, first, test_prompts, boilerplate),
        _grams(train_texts, test_prompts, prompt_of),
        _same_group(train, test),
    ]
    findings = []
    for i, row in enumerate(test):
        hit = next((hits[i] for hits in kinds if i in hits), None)
        if hit:
            findings.append(Finding(row["source"], train[hit[0]]["source"], hit[1]))
    return findings


# Each of these returns {index of a test row: (index of a training row, kind of overlap)}.


def _same(train, train_prompts, test, test_prompts, boilerplate: set) -> dict[int, tuple[int, str]]:
    """Test rows whose content or prompt equals a training row's, exactly or normalised."""
    index: dict[str, int] = {}
    for j, (row, prompt) in enumerate(zip(train, train_prompts, strict=True)):
        for key, _ in _keys(row, prompt, boilerplate):
            index.setdefault(key, j)
    hits = {}
    for i, (row, prompt) in enumerate(zip(test, test_prompts, strict=True)):
        equal = [(index[key], how) for key, how in _keys(row, prompt, boilerplate) if key in index]
        if equal:
            hits[i] = equal[0]
    return hits


def _keys(row: dict, prompt: tuple, boilerplate: set) -> list[tuple[str, str]]:
    """(key, kind of overlap) for a row's content and, unless it is short or boilerplate, its prompt."""
    replies = [texts.words(text) for text in texts.reply_texts(row)]
    whole = ("row" + texts.digest(texts.content(row)), "exact")
    words = ("words" + texts.digest([prompt or texts.prompt_text(row), replies]), "normalised")
    if len(prompt) < FEWEST_ASKED or prompt in boilerplate:
        return [whole, words]
    same = ("prompt" + texts.digest(texts.prompt_text(row)), "exact")
    return [whole, same, words, ("prompt words" + texts.digest(prompt), "normalised")]


def _contained(inside, first: dict, test_prompts: list[tuple], boilerplate: set) -> dict[int, tuple[int, str]]:
    """Test prompts that occur word for word in a training text, or consist mostly of a training prompt."""
    hits = {}
    for needle, places in _find(set(first), test_prompts, range(len(test_prompts))).items():
        for i in places.values():
            if needle not in boilerplate and len(needle) >= COVERED * len(test_prompts[i]):
                hits[i] = (first[needle], "contained")
    for i, prompt in enumerate(test_prompts):
        if prompt in inside and prompt not in boilerplate:
            hits[i] = (min(inside[prompt].values()), "contained")
    return hits


def _find(needles: set[tuple], haystack: list, prompt_of) -> dict[tuple, dict[int, int]]:
    """{needle: {prompt of a text that contains it: that text}}, in one pass over the texts.

    Needles are indexed by their first words and then by length, so that many prompts from one template cost no more
    than their distinct lengths.
    """
    lengths = defaultdict(set)
    for needle in needles:
        if len(needle) >= FEWEST_CONTAINED:
            lengths[needle[:FEWEST_CONTAINED]].add(len(needle))
    places: dict[tuple, dict[int, int]] = defaultdict(dict)
    for t, text in enumerate(haystack):
        for at, gram in enumerate(_windows(text, FEWEST_CONTAINED)):
            for length in lengths.get(gram, ()):
                needle = tuple(text[at : at + length])
                if len(needle) == length and needle in needles:
                    places[needle].setdefault(prompt_of[t], t)
    return places


def _grams(train_texts, test_prompts: list[tuple], prompt_of) -> dict[int, tuple[int, str]]:
    """Test prompts with half of their words in runs of GRAM words of one training row."""
    where = defaultdict(list)
    for i, prompt in enumerate(test_prompts):
        for at, gram in enumerate(_windows(prompt, GRAM)):
            where[gram].append((i, at))
    rows_with: dict[tuple, dict[int, int]] = defaultdict(dict)
    for j, text in enumerate(train_texts):
        for gram in where.keys() & set(_windows(text, GRAM)):
            rows_with[gram].setdefault(prompt_of[j], j)
    shared: dict[tuple[int, int], set[int]] = defaultdict(set)
    for gram, rows in rows_with.items():
        for j in rows.values() if len(rows) <= COMMON else ():
            for i, at in where[gram]:
                shared[i, j].update(range(at, at + GRAM))
    pairs = sorted(pair for pair, at in shared.items() if len(at) >= COVERED * len(test_prompts[pair[0]]))
    return {i: (j, "grams") for i, j in reversed(pairs)}


def _windows(words, size: int):
    """All runs of `size` words, as tuples."""
    return zip(*(words[start:] for start in range(size)), strict=False)


def _same_group(train: list[dict], test: list[dict]) -> dict[int, tuple[int, str]]:
    """Test rows whose declared group is also a training row's; derived groups are prompts, compared above."""
    first: dict[str, int] = {}
    for j, row in enumerate(train):
        first.setdefault(row["group"], j)
    return {
        i: (first[row["group"]], "group")
        for i, row in enumerate(test)
        if row["group"] in first and not DERIVED.fullmatch(row["group"])
    }
