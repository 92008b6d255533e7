"""Test rows that overlap with training rows, by words: n-grams as Brown et al. 2020 (GPT-3), appendix C, searches them.

Every training text is searched, those of all tasks, of all turns and of rejected answers too, for
- an equal row, or an equal prompt of 5 or more words;
- a test prompt of 8 or more words within it, or a training prompt that is half of a test prompt or more;
- half of a test prompt in runs of 13 words that both have (N is 13, at least 8, as there);
- 80 % of a reply of 50 or more words in such runs (Touvron et al. 2023, Llama 2, appendix A.6: "dirty").
Runs and prompts that more than 10 training prompts have are boilerplate (appendix C drops such n-grams as well). Rows
that share an instruction are no overlap: the last part of the prompt that no other test row has must be shared.

Training rows are read in batches, from any sequence; memory grows with the test rows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from posttrain.data.examples import parted
from posttrain.data.runs import Coded, Needles, Runs
from posttrain.data.telling import interned, parted_prompts
from posttrain.data.texts import DERIVED, content, number, reply_texts, word_parts, words
from posttrain.ground.workers import in_order
from posttrain.models.tokens import prompt_text

FEWEST_ASKED = 5  # words of a prompt from which an equal prompt is a finding: "Tell me a joke" is not
FEWEST_CONTAINED = 8  # words of a prompt from which it is searched in other texts
GRAM = 13  # consecutive words that two texts share by copying, hardly by chance (Brown et al. 2020, appendix C)
COMMON = 10  # different training prompts beyond which a short prompt or a gram is boilerplate (ibid.)
COVERED = 0.5  # share of a test prompt's words in shared grams from which it is a finding
LONG_REPLY = 50  # words of a reply from which it is searched by itself
COPIED = 0.8  # share of such a reply's words in shared grams from which it is a finding
BATCH = 1000  # training rows that are read at once


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


def overlap(train: Sequence[dict], test: Sequence[dict], processes: int = 1) -> list[Finding]:
    """One finding for each test row that overlaps with a training row, of the first kind that applies: exact,
    normalised, contained, grams, reply, group, few-shot. Equal short prompts and boilerplate are no findings.
    processes: that search the training rows.

    `few-shot` is no leak of the question that is asked: a training row is one of the worked examples before it.
    """
    search = Search(test)
    for start, held in _of_batches(search.held, train, processes):
        search.note(start, held)
    boilerplate = search.boilerplate(train, processes)
    kinds = [
        search.same_rows(boilerplate),
        search.contained(boilerplate),
        search.in_runs(),
        {i: (j, "group") for i, row in enumerate(test) if (j := search.groups.get(row["group"], -1)) >= 0},
        search.few_shot(),
    ]
    findings = []
    for i, row in enumerate(test):
        hit = next((hits[i] for hits in kinds if i in hits), None)
        if hit:
            findings.append(Finding(row["source"], train[hit[0]]["source"], hit[1]))
    return findings


def _of_batches(function: Callable, train: Sequence[dict], processes: int) -> Iterator[tuple[int, Any]]:
    """(number of the first row, what the function gives) for each batch of training rows."""
    starts = range(0, len(train), BATCH)
    yield from zip(starts, in_order(partial(_of_batch, function, train), starts, processes), strict=True)


def _of_batch(function: Callable, train: Sequence[dict], start: int):
    return function(train[start : start + BATCH])


def _holds(text: Sequence[str], answer: str) -> bool:
    """Whether the words of an answer follow each other in a text."""
    return f" {' '.join(words(answer))} " in f" {' '.join(text)} "


def _keys(row: dict, prompt: tuple) -> dict[str, int]:
    """Kind of equality -> key, which rows that are equal have in common; without a prompt's where that is short."""
    replies = [words(text) for text in reply_texts(row)]
    keys = {"row": content(row), "row words": [prompt or prompt_text(row), replies]}
    if len(prompt) >= FEWEST_ASKED:
        keys |= {"prompt": prompt_text(row), "prompt words": prompt}
    return {kind: number([kind, key]) for kind, key in keys.items()}


class Holders:
    """The training rows that hold the same words, the first of each prompt; no more than tell whether they are common.

    rows: words, or the number of a run -> {hash of a prompt: the first row with it}.
    """

    def __init__(self):
        self.rows: dict[Any, dict[int, int]] = defaultdict(dict)

    def add(self, held, prompt: int, row: int) -> bool:
        """Note a row; returns whether more than COMMON different prompts have the words."""
        rows = self.rows[held]
        if len(rows) <= COMMON:
            rows.setdefault(prompt, row)
        return len(rows) > COMMON


class Held(NamedTuple):
    """What a batch of training rows holds of the test rows; each entry begins with the row's number in the batch."""

    prompts: list[int]  # hashes of the prompts of all rows
    groups: list[tuple[int, str]]
    same: list[tuple[int, dict, tuple, tuple]]  # rows with a test row's prompt: row, prompt, words
    needles: list[tuple[int, tuple]]  # test prompts in a row's text
    within: list[tuple[int, int, tuple]]  # rows whose prompt is in a test row's: the prompt's first run, the prompt
    grams: list[tuple[int, int]]  # runs of GRAM words


class Search:
    """What training rows, which are read once in batches, have in common with test rows."""

    def __init__(self, test: Sequence[dict]):
        self.test = test
        self.prompts, self.telling = parted_prompts(test)
        self.groups = {row["group"]: -1 for row in test if not DERIVED.fullmatch(row["group"])}  # -> training row
        self.asked = set(self.prompts)
        self.waiting: dict[int, list[int]] = defaultdict(list)  # key -> test rows for which no training row has it yet
        self.same: dict[tuple[int, str], int] = {}  # (test row, kind of equality) -> training row
        for i, (row, prompt) in enumerate(zip(test, self.prompts, strict=True)):
            for key in _keys(row, prompt).values():
                self.waiting[key].append(i)
        self.needles, self.inside = Needles(FEWEST_CONTAINED, self.prompts), Holders()  # test prompts in training texts
        examples = [interned(parted(prompt_text(row))[0]) for row in test]
        self.around = [*self.prompts, *examples]  # texts in which training prompts are searched for
        self.heads = Runs(FEWEST_CONTAINED, self.around)
        self.parts: dict[tuple[int, int], dict[tuple, list[tuple[int, int]]]] = {}  # see _parts_of
        self.within: dict[tuple, tuple[int, list[tuple[int, int]]]] = {}  # training prompt -> (row, its places)
        replies = [(i, interned(reply)) for i, row in enumerate(test) for reply in reply_texts(row)]
        self.replies = [(i, reply) for i, reply in replies if len(reply) >= LONG_REPLY]
        self.grams = Runs(GRAM, [*self.prompts, *(reply for _, reply in self.replies)])
        self.is_common = np.zeros(len(self.grams.numbers), bool)
        self.sharing = Holders()

    def held(self, rows: Sequence[dict]) -> Held:
        """What a batch of training rows holds of the test rows; changes nothing, so that any process can search."""
        texts, prompts = _words_of(rows)
        groups = [(at, row["group"]) for at, row in enumerate(rows) if row["group"] in self.groups]
        asked = [at for at, prompt in enumerate(prompts) if prompt in self.asked]
        within = []
        owners, _, runs = self.heads.search(Coded([prompt[:FEWEST_CONTAINED] for prompt in prompts]))
        for at, run in zip(owners.tolist(), runs.tolist(), strict=True):
            if (prompt := prompts[at]) not in self.within and prompt in self._parts_of(run, len(prompt)):
                within.append((at, run, prompt))
        coded = Coded(texts)
        owners, _, runs = self.grams.search(coded)
        rare = ~self.is_common[runs]
        grams = sorted(set(zip(owners[rare].tolist(), runs[rare].tolist(), strict=True)))
        same = [(at, rows[at], prompts[at], texts[at]) for at in asked]
        return Held(list(map(hash, prompts)), groups, same, list(self.needles.search(coded)), within, grams)

    def note(self, start: int, held: Held) -> None:
        """Note what a batch of training rows holds; batches come in order. start: the number of its first row."""
        for at, group in held.groups:
            if self.groups[group] == -1:
                self.groups[group] = start + at
        for at, row, prompt, text in held.same:
            self._note_same(start + at, row, prompt, text)
        for at, needle in held.needles:
            self.inside.add(needle, held.prompts[at], start + at)
        for at, run, prompt in held.within:
            if prompt not in self.within:
                self.within[prompt] = (start + at, self._parts_of(run, len(prompt))[prompt])
        for at, run in held.grams:
            if not self.is_common[run]:
                self.is_common[run] = self.sharing.add(run, held.prompts[at], start + at)

    def _note_same(self, j: int, row: dict, prompt: tuple, text: tuple) -> None:
        """Note a training row for the test rows with the same content or prompt, exactly or normalised. Short
        questions, such as "Which of these is true?", are the same only where the row holds their answer."""
        for kind, key in _keys(row, prompt).items():
            others = []
            for i in self.waiting.get(key, ()):
                is_short = "question" in self.test[i] and len(prompt) < FEWEST_CONTAINED
                if is_short and not _holds(text, reply_texts(self.test[i])[0]):
                    others.append(i)
                else:
                    self.same[i, kind] = j
            if key in self.waiting:
                self.waiting[key] = others

    def _parts_of(self, run: int, length: int) -> dict[tuple, list[tuple[int, int]]]:
        """The parts of `around` with a length that begin with a run, each with its places: (number of a text, word)."""
        if (run, length) not in self.parts:
            self.parts[run, length] = defaultdict(list)
            for text, at in self.heads.of(run):
                self.parts[run, length][self.around[text][at : at + length]].append((text, at))
        return self.parts[run, length]

    def boilerplate(self, train: Sequence[dict], processes: int) -> set[tuple]:
        """Short prompts that the texts of more than COMMON training prompts hold. Training prompts within test rows are
        searched for in a second reading."""
        short = {prompt for prompt in self.within if len(prompt) < GRAM and prompt not in self.asked}
        if short:
            search = partial(_needles_in, Needles(FEWEST_CONTAINED, short))
            for start, needles_held in _of_batches(search, train, processes):
                for at, needle, prompt in needles_held:
                    self.inside.add(needle, prompt, start + at)
        return {needle for needle, rows in self.inside.rows.items() if len(needle) < GRAM and len(rows) > COMMON}

    # Each of these returns {number of a test row: (number of a training row, kind of overlap)}.

    def same_rows(self, boilerplate: set[tuple]) -> dict[int, tuple[int, str]]:
        """Test rows whose content or prompt equals a training row's. Boilerplate is no prompt of its own."""
        hits = {}
        for i, prompt in enumerate(self.prompts):
            kinds = ["row", "row words"] if prompt in boilerplate else ["row", "prompt", "row words", "prompt words"]
            if kind := next((kind for kind in kinds if (i, kind) in self.same), None):
                hits[i] = (self.same[i, kind], "normalised" if "words" in kind else "exact")
        return hits

    def contained(self, boilerplate: set[tuple]) -> dict[int, tuple[int, str]]:
        """Test prompts that occur word for word in a training text, or consist mostly of a training prompt."""
        hits: dict[int, tuple[int, str]] = {}
        for needle, (j, places) in self.within.items():
            for i, at in places if needle not in boilerplate else ():
                if i < len(self.prompts) and i not in hits and len(needle) >= COVERED * len(self.prompts[i]):
                    telling = self.telling[i]
                    if len(set(telling).intersection(range(at, at + len(needle)))) >= COVERED * len(telling):
                        hits[i] = (j, "contained")
        for i, prompt in enumerate(self.prompts):
            if prompt in self.inside.rows and prompt not in boilerplate:
                hits[i] = (min(self.inside.rows[prompt].values()), "contained")
        return hits

    def in_runs(self) -> dict[int, tuple[int, str]]:
        """Test prompts with half of their words, also of those that tell them apart, in runs of GRAM words of one
        training row; then test rows with a long reply that is nearly all in such runs."""
        shared: dict[tuple[int, int], set[int]] = defaultdict(set)  # (number of a sequence, training row) -> its words
        for run, rows in self.sharing.rows.items():
            for sequence, at in self.grams.of(run) if len(rows) <= COMMON else ():
                for j in rows.values():
                    shared[sequence, j].update(range(at, at + GRAM))
        grams, replies = {}, {}
        of = [*range(len(self.prompts)), *(i for i, _ in self.replies)]  # sequence -> test row
        for sequence, j in sorted(shared, key=lambda pair: (of[pair[0]], pair[1]), reverse=True):  # the first counts
            held, i = shared[sequence, j], of[sequence]
            if sequence >= len(self.prompts):
                if len(held) >= COPIED * len(self.replies[sequence - len(self.prompts)][1]):
                    replies[i] = (j, "reply")
            elif all(
                len(held.intersection(p)) >= COVERED * len(p) for p in (range(len(self.prompts[i])), self.telling[i])
            ):
                grams[i] = (j, "grams")
        return replies | grams

    def few_shot(self) -> dict[int, tuple[int, str]]:
        """Test rows with a training prompt among their worked examples."""
        examples = ((text - len(self.prompts), j) for j, places in self.within.values() for text, _ in places)
        return {i: (j, "few-shot") for i, j in sorted(examples, reverse=True) if i >= 0}


def _needles_in(needles: Needles, rows: Sequence[dict]) -> list[tuple[int, tuple, int]]:
    """(number of a row, needle in its text, hash of its prompt)."""
    texts, prompts = _words_of(rows)
    return [(at, needle, hash(prompts[at])) for at, needle in needles.search(Coded(texts))]


def _words_of(rows: Sequence[dict]) -> tuple[list[tuple], list[tuple]]:
    """(the words of each row, those of its prompt)."""
    parts = list(map(word_parts, rows))
    return [text for text, _ in parts], [prompt for _, prompt in parts]
