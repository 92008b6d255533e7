"""The layouts of a row, by kind of data, and how one is recognised by a row's keys."""

from collections import Counter
from collections.abc import Callable

from posttrain.data import formats, judged, rankings, transcripts
from posttrain.ground.errors import UserError

TASKS = {"choices": "eval", "answers": "generation"}  # key of `prepare` -> task; others are tasks themselves
# Task -> its formats, each with the function that checks a row and returns its content in canonical form (a list where
# a row holds several), or raises RowError. A row that fits several formats has the first of them.
FORMATS: dict[str, dict[str, Callable[[dict, bool], dict | list[dict]]]] = {
    "text": {"text": formats.text},
    "long": {"text": formats.text},
    "sft": {
        "messages": formats.messages,
        "sharegpt": formats.sharegpt,
        "instruction": formats.instruction,
        "prompt_completion": formats.prompt_completion,
        "transcript": transcripts.transcript,
        "preference": judged.chosen,
        "text": formats.whole_text,
    },
    "preference": {
        "transcript": judged.transcript_pair,
        "preference": judged.preference,
        "ranking": rankings.ranking,
        "score": rankings.ranking,  # rows with equal prompts are joined
    },
    "kto": {
        "kto": judged.kto,
        "preference": rankings.halves,
        "ranking": rankings.all_rated,
        "score": rankings.rated,
    },
    "eval": {"choices": judged.choices},
    "generation": {"answers": judged.answers},
}


def choose(objects: list[dict], task: str, format: str) -> str:
    """The configured format; for "auto", the one that most of the objects (the file's first rows) have.

    Raises UserError for an unknown task and for a format that the task does not have.
    """
    if task not in FORMATS:
        raise UserError(f"task {task!r} is unknown; allowed: {', '.join(FORMATS)}")
    if format not in ("auto", *FORMATS[task]):
        allowed = ", ".join(("auto", *FORMATS[task]))
        raise UserError(f"format {format!r} is not read for task {task}; allowed: {allowed}")
    if format != "auto":
        return format
    guesses = Counter(filter(None, (guess(row, task) for row in objects)))
    return guesses.most_common(1)[0][0] if guesses else "messages" if task == "sft" else list(FORMATS[task])[-1]


def guess(row: dict, task: str) -> str | None:
    """The task's format that fits the row's keys, or None."""
    keys = {key for key, value in row.items() if value is not None}
    written = ("transcript", "text") if task == "sft" else ("chosen", "prompt") if "chosen" in keys else ()
    fits = {
        "text": "text" in keys and task != "sft",  # whole texts are trained on only where `format` says so
        "messages": "messages" in keys,
        "sharegpt": bool(keys & {"conversations", "conversation"}),
        "instruction": {"instruction", "output"} <= keys,
        "prompt_completion": {"prompt", "completion"} <= keys,
        "transcript": any(transcripts.form_of(row.get(key)) for key in written),
        "preference": {"chosen", "rejected"} <= keys,
        "kto": {"completion", "label"} <= keys,
        "ranking": "completions" in keys,
        "score": {"prompt", "completion", "score"} <= keys,
        "choices": "choices" in keys,
        "answers": {"question", "answer"} <= keys,
    }
    return next((format for format in FORMATS[task] if fits[format]), None)
