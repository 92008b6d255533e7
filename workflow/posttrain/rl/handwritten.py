"""A reward written by hand: a Python function named in the config, in place of a reward model.

    def brevity(prompt: str, reply: str, answer: str | None) -> float: ...

prompt: what is asked, without roles and system turn; reply: the policy's answer, without special tokens; answer: the
row's expected answer (`answer`, a string), None where it has none. It is called once for each answer and returns a
finite number. It stands in one file with all it needs of its own: only that file is fingerprinted.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable

from posttrain.ground.code import fingerprint, function_file
from posttrain.ground.errors import UserError


def load(named: str, code: str | None) -> Callable:
    """The function `file.py:function` or `package.module:function`.

    Raises UserError when its file is no longer the one (`code`, its fingerprint) that the run was planned with.
    """
    file = function_file(named)
    if code is not None and fingerprint(file) != code:
        raise UserError(f"{file}: was edited after this run was planned; run snakemake again")
    place, _, function = named.rpartition(":")
    try:
        if not place.endswith(".py"):
            return getattr(importlib.import_module(place), function)
        spec = importlib.util.spec_from_file_location(f"handwritten_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)
    except Exception as error:  # a program of the user's, which can raise anything
        raise UserError(f"reward_function {named}: cannot be loaded: {type(error).__name__}: {error}") from None


def scores(function: Callable, rows: list[dict], replies: list[str]) -> list[float]:
    """The reward of each reply. Raises UserError, naming the function, when it fails or returns no finite number."""
    found = []
    for row, reply in zip(rows, replies, strict=True):
        try:
            value = float(function(row["prompt"], reply, row.get("answer")))
        except Exception as error:  # a program of the user's, which can raise anything
            raise UserError(f"reward_function {function.__name__}: {type(error).__name__}: {error}") from None
        if not math.isfinite(value):
            raise UserError(f"reward_function {function.__name__}: returned {value} for the reply {reply[:80]!r}")
        found.append(value)
    return found
