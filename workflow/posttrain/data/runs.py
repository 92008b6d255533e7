"""Runs of consecutive words that texts share with a set of sequences, found in batches of texts by 64-bit numbers.

Memory holds 24 bytes for each run of the sequences, whatever the number of texts.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np

BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: each word counts in the number of its run, by its place
FILTER_BITS = 24  # of a number, looked up first: most runs of a text are in no sequence


class Runs:
    """The runs of `size` words of sequences. Two different runs have one number with a chance of 2^-64.

    numbers: the different ones, in order. `of(run)` gives the places of a run, `search` the runs that texts hold.
    """

    def __init__(self, size: int, sequences: Sequence[Sequence[str]]):
        self.size = size
        numbers, owners, places = run_numbers(Coded(sequences), size)
        order = np.argsort(numbers, kind="stable")
        self.numbers, self._start = np.unique(numbers[order], return_index=True)
        self._owners, self._places = owners[order], places[order]
        self._filter = np.zeros(2**FILTER_BITS, bool)
        self._filter[self._short(self.numbers)] = True

    def of(self, run: int) -> list[tuple[int, int]]:
        """(number of a sequence, place of the run's first word in it) wherever the run occurs."""
        stop = self._start[run + 1] if run + 1 < len(self._start) else len(self._owners)
        here = slice(self._start[run], stop)
        return list(zip(self._owners[here].tolist(), self._places[here].tolist(), strict=True))

    def search(self, texts: "Coded") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(number of the text, place of the first word in it, run), for each run of a text that a sequence holds."""
        numbers, owners, places = run_numbers(texts, self.size)
        likely = np.flatnonzero(self._filter[self._short(numbers)]) if len(self.numbers) else np.empty(0, np.int64)
        runs = np.searchsorted(self.numbers, numbers[likely])
        runs[runs == len(self.numbers)] = 0
        hits = self.numbers[runs] == numbers[likely] if len(likely) else np.empty(0, bool)
        return owners[likely[hits]], places[likely[hits]], runs[hits]

    @staticmethod
    def _short(numbers: np.ndarray) -> np.ndarray:
        return numbers >> np.uint64(64 - FILTER_BITS)


class Needles:
    """Sequences of words, each of which is searched for as a whole; shorter ones than `size` words are left out."""

    def __init__(self, size: int, sequences: Iterable[tuple]):
        self._needles = {sequence for sequence in sequences if len(sequence) >= size}
        heads = [needle[:size] for needle in self._needles]
        self._heads = Runs(size, heads)
        self._lengths: dict[int, set[int]] = defaultdict(set)  # of the needles that begin with a run
        for needle, run in zip(self._needles, self._heads.search(Coded(heads))[2].tolist(), strict=True):
            self._lengths[run].add(len(needle))

    def search(self, texts: "Coded") -> Iterator[tuple[int, tuple]]:
        """(number of a text, needle in it)."""
        for text, at, run in zip(*(part.tolist() for part in self._heads.search(texts)), strict=True):
            for length in self._lengths[run]:
                needle = tuple(texts.texts[text][at : at + length])
                if needle in self._needles:
                    yield text, needle


class Coded:
    """Texts as words, with the `lengths` of the texts and the `codes` of all words: their hashes."""

    def __init__(self, texts: Sequence[Sequence[str]]):
        self.texts = texts
        self.lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        count = int(self.lengths.sum())
        self.codes = np.fromiter(map(hash, chain.from_iterable(texts)), np.int64, count).view(np.uint64)


def run_numbers(texts: Coded, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(number, number of the text, place of the first word) of each run of `size` words, in the order of the texts."""
    lengths, codes, count = texts.lengths, texts.codes, len(texts.codes)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    if count < size:
        return codes[:0], owners[:0], owners[:0]
    numbers = np.zeros(count - size + 1, np.uint64)
    for place in range(size):
        numbers *= BASE
        numbers += codes[place : count - size + 1 + place]
    numbers ^= numbers >> np.uint64(32)
    numbers *= BASE  # the highest bits, which the filter reads, depend on all words
    places = np.arange(count) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    within = owners[: count - size + 1] == owners[size - 1 :]
    at = np.flatnonzero(within)
    return numbers[at], owners[at], places[at]
