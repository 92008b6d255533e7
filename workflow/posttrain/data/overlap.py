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

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from sys import intern
from typing import Any, NamedTuple

import numpy as np

from posttrain.data.examples import parted, question_asked
from posttrain.data.runs import Needles, Runs
from posttrain.data.stored import batches
from posttrain.data.texts import DERIVED, content, number, reply_texts, word_parts, words
from posttrain.models.tokens import prompt_text

FEWEST_ASKED = 5  # words of a prompt from which an equal prompt is a finding: "Tell me a joke" is not
FEWEST_CONTAINED = 8  # words of a prompt from which it is searched in other texts
GRAM = 13  # consecutive words that two texts share by copying, hardly by chance (Brown et al. 2020, appendix C)
COMMON = 10  # different training prompts beyond which a short prompt or a gram is boilerplate (ibid.)
COVERED = 0.5  # share of a test prompt's words in shared grams from which it is a finding
LONG_REPLY = 50  # words of a reply from which it is searched by itself
COPIED = 0.8  # share of such a reply's words in shared grams from which it is a finding
BATCH = 1000  # training rows that are read at once
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


def overlap(train: Sequence[dict], test: Sequence[dict]) -> list[Finding]:
    """One finding for each test row that overlaps with a training row, of the first kind that applies: exact,
    normalised, contained, grams, reply, group, few-shot. Equal short prompts and boilerplate are no findings.

    `few-shot` is no leak of the question that is asked: a training row is one of the worked examples before it.
    """
    search = Search(test)
    for start, rows in _batches(train):
        search.read(start, rows)
    boilerplate = search.boilerplate(train)
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


def _batches(rows: Iterable[dict]) -> Iterator[tuple[int, list[dict]]]:
    """(number of the first row, rows) of each batch."""
    start = 0
    for batch in batches(rows, BATCH):
        yield start, batch
        start += len(batch)


def _parted(test: Sequence[dict]) -> tuple[list[tuple], list[range]]:
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
        telling.append(range(start, start + length))
    return prompts, telling


def _is_one_question(row: dict) -> bool:
    """Whether a row's prompt is one question, neither a document nor a conversation with earlier replies."""
    turns = row["messages"][:-1] if "messages" in row else row.get("prompt", [])
    earlier = isinstance(turns, list) and any(turn["role"] == "assistant" for turn in turns)
    return "text" not in row and not earlier


def _parts(row: dict) -> list[tuple[tuple, bool]]:
    """(the words of each part of a row's prompt, whether the part is a label such as `Answer:`)."""
    parts = PARTS.split(question_asked(prompt_text(row)))
    return [(_interned(part), part.rstrip().endswith(":")) for part in parts]


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


class Search:
    """What training rows, which are read once in batches, have in common with test rows."""

    def __init__(self, test: Sequence[dict]):
        self.test = test
        self.prompts, self.telling = _parted(test)
        self.groups = {row["group"]: -1 for row in test if not DERIVED.fullmatch(row["group"])}  # -> training row
        self.asked = set(self.prompts)
        self.waiting: dict[int, list[int]] = defaultdict(list)  # key -> test rows for which no training row has it yet
        self.same: dict[tuple[int, str], int] = {}  # (test row, kind of equality) -> training row
        for i, (row, prompt) in enumerate(zip(test, self.prompts, strict=True)):
            for key in _keys(row, prompt).values():
                self.waiting[key].append(i)
        self.needles, self.inside = Needles(FEWEST_CONTAINED, self.prompts), Holders()  # test prompts in training texts
        examples = [_interned(parted(prompt_text(row))[0]) for row in test]
        self.around = [*self.prompts, *examples]  # texts in which training prompts are searched for
        self.heads = Runs(FEWEST_CONTAINED, self.around)
        self.parts: dict[tuple[int, int], dict[tuple, list[tuple[int, int]]]] = {}  # see _parts_of
        self.within: dict[tuple, tuple[int, list[tuple[int, int]]]] = {}  # training prompt -> (row, its places)
        replies = [(i, _interned(reply)) for i, row in enumerate(test) for reply in reply_texts(row)]
        self.replies = [(i, reply) for i, reply in replies if len(reply) >= LONG_REPLY]
        self.grams = Runs(GRAM, [*self.prompts, *(reply for _, reply in self.replies)])
        self.is_common = np.zeros(len(self.grams.numbers), bool)
        self.sharing = Holders()

    def read(self, start: int, rows: Sequence[dict]) -> None:
        """Search a batch of training rows. start: the number of its first."""
        texts, prompts = _words_of(rows)
        hashes = list(map(hash, prompts))
        for at, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            if self.groups.get(row["group"]) == -1:
                self.groups[row["group"]] = start + at
            if prompt in self.asked:
                self._note_same(start + at, row, prompt, texts[at])
        for at, needle in self.needles.search(texts):
            self.inside.add(needle, hashes[at], start + at)
        owners, _, runs = self.heads.search([prompt[:FEWEST_CONTAINED] for prompt in prompts])
        for at, run in zip(owners.tolist(), runs.tolist(), strict=True):
            prompt = prompts[at]
            if prompt not in self.within and (places := self._parts_of(run, len(prompt)).get(prompt)):
                self.within[prompt] = (start + at, places)
        owners, _, runs = self.grams.search(texts)
        rare = ~self.is_common[runs]
        for at, run in sorted(set(zip(owners[rare].tolist(), runs[rare].tolist(), strict=True))):
            self.is_common[run] = self.sharing.add(run, hashes[at], start + at)

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

    def boilerplate(self, train: Sequence[dict]) -> set[tuple]:
        """Short prompts that the texts of more than COMMON training prompts hold. Training prompts within test rows are
        searched for in a second reading."""
        short = {prompt for prompt in self.within if len(prompt) < GRAM and prompt not in self.asked}
        if short:
            needles = Needles(FEWEST_CONTAINED, short)
            for start, rows in _batches(train):
                texts, prompts = _words_of(rows)
                for at, needle in needles.search(texts):
                    self.inside.add(needle, hash(prompts[at]), start + at)
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


def _words_of(rows: Sequence[dict]) -> tuple[list[tuple], list[tuple]]:
    """(the words of each row, those of its prompt)."""
    parts = list(map(word_parts, rows))
    return [text for text, _ in parts], [prompt for _, prompt in parts]


def _interned(text: str) -> tuple:
    """The words of a text; equal ones are one object."""
    return tuple(map(intern, words(text)))
