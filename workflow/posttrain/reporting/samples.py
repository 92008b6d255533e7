"""Sample answers of each task: the first ones, and the next wrong one if none of those is wrong."""

import json
import os
from pathlib import Path
from typing import Any

from posttrain.reporting.records import BROKEN, explain
from posttrain.reporting.text import short, visible

FIRST, CHARACTERS = 3, 1200  # shown answers per task, and shown characters per answer


def read_samples(artifacts: list[dict], missing: list[dict]) -> list[dict]:
    """Examples per task of each judgement, in the order of its rows; an unreadable file is added to `missing`."""
    samples = []
    for judgement in (artifact for artifact in artifacts if "rows" in artifact):
        for task, metric in {row["task"]: row["metric"] for row in judgement["rows"]}.items():
            file = judgement["path"] / "data" / "samples" / f"{task.replace(os.sep, '_')}.jsonl"
            if judgement["stage"].startswith("compare/"):
                file = judgement["path"] / "data" / "answers.jsonl"
            try:
                if file.is_file():
                    samples.append({"artifact": judgement, "task": task, "examples": choose(file, metric)})
            except BROKEN as error:
                piece = {"name": f"{judgement['name']}/data/samples/{file.name}", "users": judgement["users"]}
                missing.append(piece | explain(error, log=Path(os.devnull)))
    return samples


def choose(file: Path, metric: str) -> list[dict]:
    """The first few answers in order, then the next wrong one if none of those is wrong."""
    chosen: list[dict] = []
    with file.open(encoding="utf-8") as lines:
        for line in filter(str.strip, lines):
            example = read_sample(json.loads(line), metric)
            if len(chosen) < FIRST or example["score"] == 0:
                chosen.append(example)
            if len(chosen) >= FIRST and any(example["score"] == 0 for example in chosen):
                break
    return chosen


def read_sample(sample: dict, metric: str) -> dict:
    """One sample of lm-eval (by its API or its tracker) or of `compare`: prompt, expected, answer, score."""
    if "reply" in sample:
        texts = {"prompt": sample["prompt"], "expected": sample.get("answer") or "", "answer": sample["reply"]}
        scores = [sample[key] for key in ("gold_reward", "reward") if sample.get(key) is not None]
    else:
        arguments = sample["arguments"]
        request = list(arguments["gen_args_0"].values()) if isinstance(arguments, dict) else arguments[0]
        generated = len(request) > 1 and isinstance(request[1], dict)  # settings of generation: the reply is text
        response, filtered = (innermost(sample.get(key)) for key in ("resps", "filtered_resps"))
        answer = with_filtered(response, filtered) if generated else likelihood(response)
        texts = {"prompt": request[0], "expected": sample.get("target", ""), "answer": answer}
        keys = (metric.partition(",")[0], "exact_match", "acc")
        scores = [sample[key] for key in keys if isinstance(sample.get(key), int | float)]
    return {key: shorten(text) for key, text in texts.items()} | {"score": next(iter(scores), None)}


def innermost(responses: object) -> object:
    """The first response of lm-eval's nested lists."""
    while isinstance(responses, list) and responses:
        responses = responses[0]
    return responses


def likelihood(response: Any) -> Any:
    """A log-likelihood as text; a response that is not a number unchanged."""
    try:
        return f"log-likelihood {short(float(response))}"
    except (TypeError, ValueError):
        return response or ""


def with_filtered(response: object, filtered: object) -> object:
    """The generated text, and the answer that the task's filter extracted where it differs."""
    if not response or filtered in (None, response, ""):
        return response or filtered or ""
    return f"{response}\n[read as the answer: {filtered}]"


def shorten(text: object) -> str:
    """Text from a model or a data set, made visible; the middle of a long text is replaced by a note."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    if (left_out := len(text) - CHARACTERS) > 0:
        half = CHARACTERS // 2
        text = f"{text[:half]}\n[… {left_out:,} characters left out …]\n{text[-half:]}"
    return visible(text, "\n\t")
