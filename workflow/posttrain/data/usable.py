"""Keep the rows that can be trained on: they keep the token contract and are no longer than `prepare` allows.

`sides` is side ("train", "test") -> rows of a task. Every other row is dropped, listed and counted in the data card.
"""

from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from posttrain.config.sections import DOCUMENTS, Prepare
from posttrain.data import tokenized
from posttrain.data.dropped import Dropped, Kinds, entry
from posttrain.data.lengths import TOO_LONG, cut, limits, over
from posttrain.data.rows import card
from posttrain.data.stored import BATCH, Rows, batches, counted, join, store
from posttrain.ground.progress import say
from posttrain.ground.workers import in_order
from posttrain.models import token_contract
from posttrain.models.chat import Breach
from posttrain.models.control import control_text
from posttrain.models.token_contract import CONTROL_TEXT

TOGETHER = 100  # rows that are encoded at once: their tokens stay in the processor's cache
QUANTILES = {"min": 0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1}
Tokens = dict[str, bytes]  # 32-bit numbers, as `tokenized.packed` writes them


class Fitted(NamedTuple):
    """What becomes of a row: a fault, or its tokens and how many they are; none for a document."""

    fault: Breach | None = None
    tokens: Tokens = {}  # noqa: RUF012, nothing adds to it
    size: int = 0
    shorter: dict | None = None  # the row where it was cut
    source: str = ""


class Fitting:
    """Keeps the rows of a task that can be trained on, and counts them."""

    def __init__(self, section: Prepare, tokenizer, task: str, dropped: Dropped, processes: int = 1):
        self.section, self.tokenizer, self.task, self.dropped = section, tokenizer, task, dropped
        self.processes, self.limits = processes, limits(section)
        self.lengths = array("q")
        self.truncated = 0
        self.kinds = Kinds()

    def rows(self, rows: Rows, tokens: tokenized.Writer, scratch: Path) -> Rows:
        """The rows that can be trained on, cut where `prepare.long_rows` says so; the others are listed.

        tokens: the file for the tokens of each; not for those of documents, which have no form of their own.
        """
        order = array("q")  # places of the rows that are kept; a row that was cut stands behind all others
        cut_rows = store(self._cut(rows, tokens, order), scratch, numbered=False)
        self.truncated += len(cut_rows)
        return join([rows, cut_rows]).take(np.array(order, int))

    def _cut(self, rows: Rows, tokens: tokenized.Writer, order: array) -> Iterator[dict]:
        """The rows that were cut. The place of each row that can be trained on is put into `order`."""
        cuts, starts = len(rows), range(0, len(rows), BATCH)
        parts = in_order(partial(self._fitted, rows), starts, self.processes)
        fitted = counted(chain.from_iterable(parts), f"prepare.{self.task}, as tokens", len(rows))
        for place, one in enumerate(fitted):
            if one.fault:
                line = entry(one.source, self.task, one.fault.reason, str(one.fault))
                self.kinds.note(line)
                self.dropped.add([line])
                continue
            if one.tokens:
                tokens.add(one.tokens)
                self.lengths.append(one.size)
            order.append(cuts if one.shorter else place)
            if one.shorter:
                cuts += 1
                yield one.shorter

    def _fitted(self, rows: Rows, start: int) -> list[Fitted]:
        """What becomes of each row of the batch that begins with a row's number."""
        fitted = []
        for part in batches(rows[start : start + BATCH], TOGETHER):
            fitted += [self._fit(row, encoded) for row, encoded in zip(part, self._encoded(part), strict=True)]
        return fitted

    def _encoded(self, rows: list[dict]) -> list[dict[str, list[int]] | Breach]:
        """The tokens of rows, empty for documents, or what is wrong with them."""
        encoded: list[dict[str, list[int]] | Breach] = [{} for _ in rows]
        readable = []
        for place, row in enumerate(rows):
            try:
                if self.section.control_text != "plain" and self.task != "text":  # it may be written as a chat
                    token_contract.refuse_control_text(self.tokenizer, row)
                readable.append(place)
            except Breach as fault:
                encoded[place] = fault
        if self.task not in DOCUMENTS:
            items = token_contract.encode_all(self.tokenizer, [rows[place] for place in readable])
            for place, item in zip(readable, items, strict=True):
                encoded[place] = item
        return encoded

    def _fit(self, row: dict, encoded: dict[str, list[int]] | Breach, shorter: dict | None = None) -> Fitted:
        """What becomes of a row with these tokens: it is cut where `prepare.long_rows` says so."""
        if isinstance(encoded, Breach):
            return Fitted(fault=encoded, source=row["source"])
        fault = over(self.limits, encoded) if encoded else None
        if fault is None:
            size = token_contract.size(encoded) if encoded else 0
            return Fitted(None, {name: tokenized.packed(ids) for name, ids in encoded.items()}, size, shorter)
        shorter = cut(self.tokenizer, row, self.limits) if self.section.long_rows == "cut" else None
        if shorter is None:
            return Fitted(fault, source=row["source"])
        return self._fit(shorter, token_contract.encode_all(self.tokenizer, [shorter])[0], shorter)


def usable(
    section: Prepare,
    tokenizer,
    task: str,
    sides: dict[str, Rows],
    folder: Path,
    dropped: Dropped,
    cards: list,
    scratch: Path,
    processes: int = 1,
) -> dict:
    """Drop or cut rows, on both sides; returns the lengths of the others for the data card. Prints warnings.

    folder: for the tokens, see `data/tokenized.py`. scratch: for the rows. processes: that encode rows.
    """
    fitting, total = Fitting(section, tokenizer, task, dropped, processes), sum(map(len, sides.values()))
    for side, rows in sides.items():
        with closing(tokenized.Writer(tokenizer, folder / task / f"{side}.arrow")) as tokens:
            sides[side] = fitting.rows(rows, tokens, scratch)
        if rows and not sides[side]:
            say(f"warning: no {side} row of {task} is left")
    tell(section, task, total, fitting.kinds, cards)
    shares = {"truncated": fitting.truncated, "share_cut": round(fitting.truncated / max(total, 1), 4)}
    return summary(fitting.lengths) | shares if fitting.lengths else {}


def askable(tokenizer, kind: str, questions: Rows, dropped: Dropped, cards: list) -> Rows:
    """The questions of `choices` or `answers` without control text, which lm-eval would read as control tokens."""
    kept, kinds = [], Kinds()
    for place, row in enumerate(questions):
        token = control_text(tokenizer, [row["question"], row.get("choices")])
        if token:
            what = f"the question holds {token!r}, a control token of the tokenizer"
            one = entry(row["source"], kind, CONTROL_TEXT, what)
            kinds.note(one)
            dropped.add([one])
        else:
            kept.append(place)
    for sentence in kinds.sentences():
        say(f"warning: questions of {kind} are dropped: {sentence}")
    if kinds.counts:
        cards.append(card(f"{kind}, control text", kind, kinds.counts))
    return questions.take(np.array(kept, int))


def tell(section: Prepare, task: str, total: int, kinds: Kinds, cards: list) -> None:
    """Print warnings of rows that are dropped, and enter their numbers in the data card."""
    for reason, key in TOO_LONG.items():
        if long := kinds.counts.pop(reason, 0):
            first = kinds.first.pop(reason)
            named = [f"{one['file']}:{one['line']} ({one['message'].partition(',')[0]})" for one in first]
            named += ["..."] if long > len(first) else []
            limit = f"longer than prepare.{key} ({getattr(section, key)})"
            say(f"warning: {long:,} of {total:,} {task} rows are {limit} and dropped: {', '.join(named)}")
            cards.append(card(f"{task}, longer than {key}", task, {reason: long}))
    if kinds.counts:
        what = "break the token contract and are dropped (all in data/dropped.jsonl)"
        say(f"warning: {kinds.counts.total():,} of {total:,} {task} rows {what}")
        for sentence in kinds.sentences():
            say(f"warning: {task}: {sentence}")
        cards.append(card(f"{task}, token contract", task, kinds.counts))


def summary(lengths: Iterable[int]) -> dict:
    """Quantiles of lengths in tokens, and their histogram: [bound, number of rows with at most as many tokens and more
    than the bound before], for the bounds 4, 6, 8, 12, 16, 24 ..."""
    of_rows = np.sort(np.fromiter(lengths, np.int64))
    bounds = [bound for power in range(2, 32) for bound in (2**power, 3 * 2 ** (power - 1))]
    rows = np.diff(np.searchsorted(of_rows, [0, *bounds], side="right"))
    first, *_, last = np.flatnonzero(rows).repeat(2)
    histogram = [[bound, int(count)] for bound, count in zip(bounds, rows, strict=True)]
    quantiles = np.quantile(of_rows, list(QUANTILES.values()), method="lower").tolist()
    return dict(zip(QUANTILES, quantiles, strict=True)) | {"histogram": histogram[first : last + 1]}
