"""Ask the rules across keys about an experiment, but none that reads a key whose own value is wrong."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, cast

from posttrain.config.sections import Watched
from posttrain.config.stages import Experiment

Mistakes = Iterator[tuple[str, str]]  # dotted key, what is wrong and what would be right
ANYWHERE = "*."  # before a key that no rule may read in any section
Rule = Callable[[Experiment], Mistakes]


class Broken(NamedTuple):
    """A rule that an experiment breaks."""

    key: str
    text: str
    read: list[str]  # the dotted keys that the rule read before, in this order


def is_unreadable(key: str, unreadable: set[str]) -> bool:
    """Whether nothing is known of a dotted key: its value is wrong, or an unknown key may have meant it."""
    return key in unreadable or ANYWHERE + key.rpartition(".")[2] in unreadable


class Read(set[str]):
    """The dotted keys that a rule has read. Raises `KeyInDoubt` for one that no rule may read."""

    def __init__(self, unreadable: set[str]):
        super().__init__()
        self.unreadable = unreadable
        self.order: list[str] = []

    def add(self, key: str) -> None:
        if is_unreadable(key, self.unreadable):
            raise KeyInDoubt(key)
        self.order.append(key)

    def update(self, *keys: Iterable[str]) -> None:
        for key in itertools.chain(*keys):
            self.add(key)


class KeyInDoubt(Exception):
    """A rule has read a key of which nothing is known."""


def broken(rules: Iterable[Rule], experiment: Experiment, unreadable: set[str]) -> Iterator[Broken]:
    """The rules that an experiment breaks. A rule ends at the first key of `unreadable` that it reads: whatever it
    said, the cause could be the mistake in that key."""
    for rule in rules:
        if not unreadable and next(rule(experiment), None) is None:
            continue  # nearly all hold, and to watch what each reads would double the time of a plan
        read = Read(unreadable)
        try:
            for key, text in rule(cast(Experiment, Watched(experiment, read))):
                yield Broken(key, text, [*read.order])
        except KeyInDoubt:
            continue
