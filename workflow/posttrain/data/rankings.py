"""Several answers to one prompt, ranked or rated: as pairs for `preference`, as completions with a label for `kto`.

All pairs of a ranked list are made (Ouyang et al. 2022, arXiv 2203.02155, section 3.5), without those of equal worth.
They have the same place (`source`), by which the reward model's trainer knows them.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import combinations, groupby

from posttrain.data import judged
from posttrain.data.formats import required
from posttrain.data.lines import RowError, json_kind
from posttrain.data.texts import digest
from posttrain.data.transcripts import form_of

TEXTS = ("text", "content", "completion", "response", "answer")  # keys of an answer's text in a list of objects
SCORES = ("score", "rating", "overall_score")  # of its score: larger is better
RANK = "rank"  # of its place: 1 is the best
BEST = "best"  # key of a row: the number of the best answer, from 0; the others are not compared
LISTED = ("scores", "ratings", "ranks")  # keys of a row, with one number for each answer


class Joined(dict):
    """A row made of `count` lines, each with one answer to the same prompt."""

    count = 1


def ranking(row: dict, allow_empty_user: bool) -> list[dict]:
    """The pairs of a row with `completions` and `scores`, `ranks` or the number of the `best`; else the best stands
    first."""
    answers, worths = ranked(row)
    if len(answers) < 2:
        raise RowError("one_answer", "a single answer to its prompt: nothing to compare")
    order = sorted(range(len(answers)), key=lambda n: -worths[n])
    chosen = [(better, worse) for better, worse in combinations(order, 2) if worths[better] > worths[worse]]
    if not chosen:
        raise RowError("no_signal", "all answers are worth the same: no signal")
    pairs = [pair(row, answers, better, worse, allow_empty_user) for better, worse in chosen]
    if not is_rated(row):
        return pairs
    margins = [worths[better] - worths[worse] for better, worse in chosen]
    return [whole | {judged.MARGIN: margin} for whole, margin in zip(pairs, margins, strict=True)]


def is_rated(row: dict) -> bool:
    """Whether the worth of a row's answers is their ratings; not their ranks, their places or that one is the best."""
    if row.get(BEST) is not None:
        return False
    key = next((key for key in LISTED if row.get(key) is not None), None)
    if key:
        return key != "ranks"
    listed = row["completions"]
    return all(isinstance(answer, dict) and any(answer.get(key) is not None for key in SCORES) for answer in listed)


def pair(row: dict, answers: list, better: int, worse: int, allow_empty_user: bool) -> dict:
    """Two of the answers as a checked pair. Raises RowError, naming both."""
    whole = row | {"chosen": answers[better], "rejected": answers[worse]}
    check = judged.transcript_pair if form_of(row.get("prompt")) or form_of(answers[better]) else judged.preference
    try:
        return check(whole, allow_empty_user)
    except RowError as error:
        message = f"completions[{better}] as chosen, completions[{worse}] as rejected: {error}"
        raise RowError(error.reason, message) from None


def ranked(row: dict) -> tuple[list, list[float]]:
    """(the answers of a row, their worth: a larger number is better). Raises RowError."""
    row.get("prompt")  # read by the checks, in a copy
    listed = required(row, "completions")
    if not isinstance(listed, list):
        raise RowError("not_a_list", f"completions must be a list, found {json_kind(listed)}")
    if row.get(BEST) is not None:
        best = place_of(row[BEST], len(listed))
        return list(map(text_of, listed)), [float(place == best) for place in range(len(listed))]
    key = next((key for key in LISTED if row.get(key) is not None), None)
    if key:
        values = row[key]
        if not isinstance(values, list) or len(values) != len(listed):
            raise RowError("scores", f"{key} must be a list of {len(listed)} numbers, one for each completion")
        worths = [number(value, f"{key}[{n}]") for n, value in enumerate(values)]
        return list(map(text_of, listed)), [-worth for worth in worths] if key == "ranks" else worths
    if all(isinstance(answer, dict) and "role" not in answer for answer in listed):
        return list(map(text_of, listed)), [worth(answer, place) for place, answer in enumerate(listed)]
    return listed, [-float(place) for place in range(len(listed))]


def text_of(answer):
    """The text of an answer that is an object; any other answer as it is. Raises RowError."""
    if not isinstance(answer, dict) or "role" in answer:
        return answer
    for key in TEXTS:
        if answer.get(key) is not None:
            return answer[key]
    raise RowError("missing_field", f"one of completions has no text; allowed: {', '.join(TEXTS)}")


def place_of(best, count: int) -> int:
    """The place of the best answer. Raises RowError for what is no number from 0 to `count` - 1."""
    place = judged.as_number(best)
    if place is None or place != int(place) or not 0 <= place < count:
        shown = repr(best)[:60]
        raise RowError("scores", f"best must be the number of a completion, from 0 to {count - 1}, found {shown}")
    return int(place)


def worth(answer: dict, place: int) -> float:
    """The worth of an answer that is an object. Raises RowError."""
    for key in SCORES:
        if answer.get(key) is not None:
            return number(answer[key], f"completions[{place}].{key}")
    if answer.get(RANK) is not None:
        return -number(answer[RANK], f"completions[{place}].{RANK}")
    raise RowError("scores", f"completions[{place}] has no score; allowed: {', '.join(SCORES)} or {RANK}")


def number(value, where: str) -> float:
    """A number, which may be written as text. Raises RowError."""
    amount = judged.as_number(value)
    if amount is None or not math.isfinite(amount):
        raise RowError("scores", f"{where} must be a number, found {json_kind(value)}")
    return amount


# Rows of `kto`: completions with a label


def halves(row: dict, allow_empty_user: bool) -> list[dict]:
    """Both answers of a pair, the chosen one as wanted."""
    whole = (judged.transcript_pair if form_of(row.get("chosen")) else judged.preference)(row, allow_empty_user)
    return [{"prompt": whole["prompt"], "completion": whole[side], "label": side == "chosen"} for side in judged.SIDES]


def rated(row: dict, allow_empty_user: bool) -> dict:
    """An answer with a `score`, wanted from the source's `threshold` on."""
    label = wanted(row, number(required(row, "score"), "score"))
    row.get("prompt"), row.get("completion")  # read by the check, in a copy
    return judged.kto(row | {"label": label}, allow_empty_user)


def all_rated(row: dict, allow_empty_user: bool) -> list[dict]:
    """The answers of a row with `completions` and their scores, each with a label. Raises RowError for ranks."""
    answers, worths = ranked(row)
    objects = [answer for answer in row["completions"] if isinstance(answer, dict)]
    if not any(key in row for key in LISTED[:2]) and not any(key in answer for answer in objects for key in SCORES):
        raise RowError("scores", "the answers have no scores, which `threshold` is compared with")
    labels = [wanted(row, score) for score in worths]
    rows = [row | {"completion": answer, "label": label} for answer, label in zip(answers, labels, strict=True)]
    return [judged.kto(one, allow_empty_user) for one in rows]


def wanted(row: dict, score: float) -> bool:
    """Whether a score makes an answer a wanted one. Raises RowError where the source has no threshold."""
    if row.get("threshold") is None:
        raise RowError("threshold", "a score is no label; set `threshold`: the score from which an answer is wanted")
    return score >= row["threshold"]


# Rows of `preference` with one answer and a score each


def joined(numbered: Iterable[tuple]) -> Iterator[tuple]:
    """Rows that follow each other with equal prompts, each with a `completion` and a `score`, as one row.

    It has the line of the first. A prompt that comes again behind another one is a RowError: all rows would have to be
    held for it.
    """
    seen: set[str] = set()
    for key, run in groupby(numbered, key=lambda item: prompt_key(item[1])):
        if not key:
            yield from run
            continue
        items = list(run)
        line, first, marked = items[0]
        again = key in seen
        seen.add(key)
        if again:
            message = "its prompt came before, behind other prompts; sort the rows by prompt"
            yield from ((line, RowError("apart", message), marked) for line, _, marked in items)
            continue
        whole = Joined({key: value for key, value in first.items() if key not in ("completion", "score")})
        whole |= {f"{key}s": [value.get(key) for _, value, _ in items] for key in ("completion", "score")}
        whole.count = len(items)
        yield line, whole, marked


def prompt_key(value) -> str:
    """A fingerprint of a row's prompt; "" for what is no such row."""
    if not isinstance(value, dict) or value.get("prompt") is None:
        return ""
    return digest(value["prompt"])
