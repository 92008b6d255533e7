"""The user's own functions that score answers: a reward in place of a reward model, and a gold reward.

    def brevity(prompt: str, reply: str, answer: str | None) -> float: ...

prompt: the user's text, without roles and system turn; reply: the policy's answer, without special tokens; answer: the
row's expected answer (`answer`, a string), None where it has none. The function is called once for each answer and
returns a finite number. It and all of the user's code that it calls are in one file: only that file is fingerprinted.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from posttrain.config.sections import Compare, Sampled
from posttrain.ground.errors import UserError
from posttrain.ground.syntax import fingerprint, function_file


@dataclass(frozen=True)
class Judge:
    """A function that scores answers, with its key in the config and the key's value, for error messages."""

    key: str
    name: str
    function: Callable

    def scores(self, rows: list[dict], replies: list[str]) -> list[float]:
        """A score for each reply to a row (`prompt` and, where there is one, `answer`).

        Raises UserError, naming the function, where it fails or returns no finite number.
        """
        return [self._score(row, reply) for row, reply in zip(rows, replies, strict=True)]

    def scores_of_answered(self, rows: list[dict], replies: list[str]) -> list[float | None]:
        """Like `scores`, but None for rows without an `answer`, for which the function is not called."""
        pairs = zip(rows, replies, strict=True)
        return [None if row.get("answer") is None else self._score(row, reply) for row, reply in pairs]

    def _score(self, row: dict, reply: str) -> float:
        try:
            value = float(self.function(row["prompt"], reply, row.get("answer")))
        except Exception as error:  # a program of the user's, which can raise anything
            raise UserError(f"{self.key} {self.name}: {type(error).__name__}: {error}") from None
        if not math.isfinite(value):
            raise UserError(f"{self.key} {self.name}: returned {value} for the reply {reply[:80]!r}")
        return value


def load_judge(section: Sampled | Compare, kind: Literal["reward", "gold"]) -> Judge | None:
    """The function of a section's `reward_function` or `gold_function`; None where the key is unset.

    Raises UserError where the function cannot be loaded, or its file changed after the run was planned (`reward_code`,
    `gold_code`).
    """
    key = f"{kind}_function"
    name, code = getattr(section, key), getattr(section, f"{kind}_code")
    return None if name is None else load(key, name, code)


def load(key: str, name: str, code: str | None) -> Judge:
    """The function with a name, of a key of the config. code: fingerprint of its file when the run was planned; None
    where it was not."""
    file = function_file(name)
    if code is not None and fingerprint(file) != code:
        raise UserError(f"{file}: was edited after this run was planned; run snakemake again")
    place, _, function = name.rpartition(":")
    try:
        if not place.endswith(".py"):
            return Judge(key, name, getattr(importlib.import_module(place), function))
        spec = importlib.util.spec_from_file_location(f"handwritten_{file.stem}", file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return Judge(key, name, getattr(module, function))
    except Exception as error:  # a program of the user's, which can raise anything
        raise UserError(f"{key} {name}: cannot be loaded: {type(error).__name__}: {error}") from None
