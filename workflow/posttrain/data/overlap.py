"""Test rows that overlap with training rows, by words: n-grams as Brown et al. 2020 (GPT-3), appendix C, searches them.

Every training text is searched, those of all tasks, of all turns and of rejected answers too, for
- an equal row, or an equal prompt of 5 or more words;
- a test prompt of 8 or more words within it, or a training prompt that is half of a test prompt or more;
- half of a test prompt in runs of 13 words that both have (N is 13, at least 8, as there);
- 80 % of a reply of 50 or more words in such runs (Touvron et al. 2023, Llama 2, appendix A.6: "dirty").
Runs and prompts that more than 10 training prompts have are boilerplate (appendix C drops such n-grams as well). Rows
that share an instruction are no overlap: the last part of the prompt that no other test row has must be shared.
"""

import re
from collections import Counter, defaultdict
from typing import NamedTuple

from posttrain.data.examples import parted, question_asked
from posttrain.data.texts import DERIVED, content, digest, full_text, reply_texts, words
from posttrain.models.tokens import prompt_text

FEWEST_ASKED = 5  # words of a prompt from which an equal prompt is a finding: "Tell me a joke" is not
FEWEST_CONTAINED = 8  # words of a prompt from which it is searched in other texts
GRAM = 13  # consecutive words that two texts share by copying, hardly by chance (Brown et al. 2020, appendix C)
COMMON = 10  # training prompts beyond which a short prompt or a gram is boilerplate (ibid.)
COVERED = 0.5  # share of a test prompt's words in shared grams from which it is a finding
LONG_REPLY = 50  # words of a reply from which it is searched by itself
COPIED = 0.8  # share of such a reply's words in shared grams from which it is a finding
PARTS = re.compile(r"\n+|:\s+")


class Finding(NamedTuple):
    """A test row that overlaps with a training row: the places of both (file:line), and the kind of overlap."""

    test: str
    train: str
    how: str  # exact, normalised, contained, grams, reply, group, few-shot

    @property
    def is_leak(self) -> bool:
        """Whether training has seen the question itself, not only a worked example before it."""
        return self.how != "few-shot"

    def __str__(self) -> str:
        meanings = {
            "exact": "the same row or prompt as",
            "normalised": "the same row or prompt, but for case, space and punctuation, as",
            "contained": "its prompt occurs in, or is mostly the prompt of,",
            "grams": f"at least half of its words are in runs of {GRAM} words shared with",
            "reply": f"nearly all of its reply is in runs of {GRAM} words shared with",
            "group": "the same group as",
            "few-shot": "among its worked examples is",
        }
        return f"{self.test}: {self.how} overlap: {meanings[self.how]} {self.train}"


def overlap(train: list[dict], test: list[dict]) -> list[Finding]:
    """One finding for each test row that overlaps with a training row, of the first kind that applies: exact,
    normalised, contained, grams, reply, group, few-shot. Equal short prompts and boilerplate are no findings.

    `few-shot` is no leak of the question that is asked: a training row is one of the worked examples before it.
    """
    train_texts = [words(full_text(row)) for row in train]
    train_prompts = [tuple(words(prompt_text(row))) for row in train]
    test_prompts, telling = _parted(test)
    first: dict[tuple, int] = {}
    prompt_of = [first.setdefault(prompt, j) for j, prompt in enumerate(train_prompts)]  # equal prompts are one
    inside = _find({*train_prompts, *test_prompts}, train_texts, prompt_of)
    boilerplate = {needle for needle, rows in inside.items() if len(needle) < GRAM and len(rows) > COMMON}
    kinds = [
        _same(train, train_texts, train_prompts, test, test_prompts, boilerplate),
        _contained(inside, first, test_prompts, telling, boilerplate),
        _grams(train_texts, test_prompts, telling, prompt_of),
        _replies(train_texts, test, prompt_of),
        _same_group(train, test),
        _few_shot(first, test),
    ]
    findings = []
    for i, row in enumerate(test):
        hit = next((hits[i] for hits in kinds if i in hits), None)
        if hit:
            findings.append(Finding(row["source"], train[hit[0]]["source"], hit[1]))
    return findings


def _parted(test: list[dict]) -> tuple[list[tuple], list[set[int]]]:
    """(the words of each test row's prompt, the places of those that tell it from other test rows).

    These are the words of its last part (line, or what follows a colon) that no other test row has; all words of a
    document and of a conversation of several turns, and where other rows have every part.
    """
    split = [_parts(row) for row in test]
    counts = Counter(part for parts in split for part in {part for part, _ in parts})
    prompts, telling = [], []
    for row, parts in zip(test, split, strict=True):
        prompts.append(tuple(word for part, _ in parts for word in part))
        own = [n for n, (part, label) in enumerate(parts) if part and not label and counts[part] == 1]
        start, length = 0, len(prompts[-1])
        if own and _is_one_question(row):
            start, length = sum(len(part) for part, _ in parts[: own[-1]]), len(parts[own[-1]][0])
        telling.append(set(range(start, start + length)))
    return prompts, telling


def _is_one_question(row: dict) -> bool:
    """Whether a row's prompt is one question, neither a document nor a conversation with earlier replies."""
    turns = row["messages"][:-1] if "messages" in row else row.get("prompt", [])
    earlier = isinstance(turns, list) and any(turn["role"] == "assistant" for turn in turns)
    return "text" not in row and not earlier


def _parts(row: dict) -> list[tuple[tuple, bool]]:
    """(the words of each part of a row's prompt, whether the part is a label such as `Answer:`)."""
    parts = PARTS.split(question_asked(prompt_text(row)))
    return [(tuple(words(part)), part.rstrip().endswith(":")) for part in parts]


# Each of these returns {index of a test row: (index of a training row, kind of overlap)}.


def _same(train, train_texts, train_prompts, test, test_prompts, boilerplate: set) -> dict[int, tuple[int, str]]:
    """Test rows whose content or prompt equals a training row's, exactly or normalised. Short questions, such as "Which
    of these is true?", are one only with their answer."""
    index: dict[str, list[int]] = defaultdict(list)
    for j, (row, prompt) in enumerate(zip(train, train_prompts, strict=True)):
        for key, _ in _keys(row, prompt, boilerplate):
            index[key].append(j)
    hits = {}
    for i, (row, prompt) in enumerate(zip(test, test_prompts, strict=True)):
        equal = [
            (j, how)
            for key, how in _keys(row, prompt, boilerplate)
            for j in index.get(key, ())
            if "question" not in row or len(prompt) >= FEWEST_CONTAINED or _holds(train_texts[j], reply_texts(row)[0])
        ]
        if equal:
            hits[i] = equal[0]
    return hits


def _holds(text: list[str], answer: str) -> bool:
    """Whether the words of an answer follow each other in a text."""
    return f" {' '.join(words(answer))} " in f" {' '.join(text)} "


def _keys(row: dict, prompt: tuple, boilerplate: set) -> list[tuple[str, str]]:
    """(key, kind of overlap) for a row's content and, unless it is short or boilerplate, its prompt."""
    replies = [words(text) for text in reply_texts(row)]
    exact = ("row" + digest(content(row)), "exact")
    normalised = ("words" + digest([prompt or prompt_text(row), replies]), "normalised")
    if len(prompt) < FEWEST_ASKED or prompt in boilerplate:
        return [exact, normalised]
    same_prompt = ("prompt" + digest(prompt_text(row)), "exact")
    return [exact, same_prompt, normalised, ("prompt words" + digest(prompt), "normalised")]


def _contained(
    inside, first: dict, test_prompts: list[tuple], telling: list[set], boilerplate: set
) -> dict[int, tuple[int, str]]:
    """Test prompts that occur word for word in a training text, or consist mostly of a training prompt."""
    hits = {}
    for needle, places in _find(set(first), test_prompts, range(len(test_prompts))).items():
        for i in places.values():
            prompt = test_prompts[i]
            if needle not in boilerplate and len(needle) >= COVERED * len(prompt):
                at = next(n for n in range(len(prompt)) if prompt[n : n + len(needle)] == needle)
                if len(telling[i].intersection(range(at, at + len(needle)))) >= COVERED * len(telling[i]):
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


def _grams(train_texts, test_prompts: list[tuple], telling: list[set], prompt_of) -> dict[int, tuple[int, str]]:
    """Test prompts with half of their words, also of those that tell them apart, in runs of GRAM words of one training
    row."""
    shared = _shared_places(train_texts, test_prompts, prompt_of)
    pairs = sorted(
        (i, j)
        for (i, j), at in shared.items()
        if len(at) >= COVERED * len(test_prompts[i]) and len(at & telling[i]) >= COVERED * len(telling[i])
    )
    return {i: (j, "grams") for i, j in reversed(pairs)}


def _replies(train_texts, test: list[dict], prompt_of) -> dict[int, tuple[int, str]]:
    """Test rows with a long reply that is nearly all in runs of GRAM words of one training row."""
    replies = [(i, tuple(words(reply))) for i, row in enumerate(test) for reply in reply_texts(row)]
    replies = [(i, reply) for i, reply in replies if len(reply) >= LONG_REPLY]
    shared = _shared_places(train_texts, [reply for _, reply in replies], prompt_of)
    pairs = sorted((replies[n][0], j) for (n, j), at in shared.items() if len(at) >= COPIED * len(replies[n][1]))
    return {i: (j, "reply") for i, j in reversed(pairs)}


def _shared_places(train_texts, sequences: list[tuple], prompt_of) -> dict[tuple[int, int], set[int]]:
    """{(index of a sequence, index of a training row): places of the words in runs of GRAM words that both have}."""
    where = defaultdict(list)
    for i, sequence in enumerate(sequences):
        for at, gram in enumerate(_windows(sequence, GRAM)):
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
    return shared


def _windows(text, size: int):
    """All runs of `size` words of a text, as tuples."""
    return zip(*(text[start:] for start in range(size)), strict=False)


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


def _few_shot(first: dict, test: list[dict]) -> dict[int, tuple[int, str]]:
    """Test rows with a training prompt among their worked examples."""
    examples = [words(parted(prompt_text(row))[0]) for row in test]
    hits = _find(set(first), examples, range(len(test)))
    return {i: (first[needle], "few-shot") for needle, places in hits.items() for i in places}
