"""The cells of an experiment's `grid`: one for each combination of its keys' values.

    grid: {dpo.beta: [0.05, 0.1, 0.5], seed: [0, 1, 2]}

has the cell NAME@beta=0.05@seed=0 and eight others.
"""

import itertools
import re
from collections.abc import Iterator

from posttrain.config.mistakes import spelled

LONGEST = 120  # characters of a cell's name, which is part of folders, job names and tracker ids


def labels(keys: list[str]) -> dict[str, str]:
    """Short names of dotted keys: the last word, or the whole key where two keys share their last word."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: key if last.count(word) > 1 else word for key, word in zip(keys, last, strict=True)}


def cells(grid: dict[str, list]) -> Iterator[dict[str, object]]:
    """Every combination of a grid, as key -> value."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def cell_name(name: str, axes: dict[str, object], short: dict[str, str]) -> str:
    """NAME@beta=0.5@seed=1, with the axes sorted by name; NAME alone without axes. No commas: Snakemake splits the
    arguments of a cluster job at commas."""
    parts = sorted(f"{short[key]}={text(value)}" for key, value in axes.items())
    return "@".join([name, *parts])


def text(value) -> str:
    """A value as part of a name; equal values are spelled alike: 0.5, 1e-05, true, lora, q_proj+v_proj."""
    if isinstance(value, list):
        return "+".join(map(text, value))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return re.sub(r"[^A-Za-z0-9._+-]", "-", str(value))


def mistakes(name: str, grid: dict[str, list]) -> Iterator[tuple[str, str]]:
    """The mistakes in a grid: (axis, what is wrong with it)."""
    for key, values in grid.items():
        if any(isinstance(value, dict) for value in values):
            yield key, "a value is a section; give one of its keys instead"
        spellings: dict[str, object] = {}
        for value in values:
            if (word := text(value)) in spellings:
                yield key, f"{spelled(spellings[word])} and {spelled(value)} would make the same name, {word}"
            spellings[word] = value
        within = [other for other in grid if other.startswith(f"{key}.")]
        if within:
            yield key, f"holds {within[0]}, which is an axis too"
    short = labels(list(grid))
    longest = cell_name(
        name, {key: max(values, key=lambda value: len(text(value))) for key, values in grid.items()}, short
    )
    if len(longest) > LONGEST:
        yield next(iter(grid)), f"makes names of {len(longest)} characters ({longest[:60]}...); at most {LONGEST}"
