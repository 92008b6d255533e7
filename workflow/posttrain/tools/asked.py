"""Ask some questions of a recorded evaluation again, and compare answers and scores with the record."""

import json
import math
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.config.sections import Evaluate
from posttrain.ground.errors import UserError
from posttrain.ground.files import rows_of
from posttrain.jobs import recorded
from posttrain.jobs.recorded import Recorded
from posttrain.maths.intervals import most_differing
from posttrain.reporting.records import groups_of
from posttrain.reporting.text import short, visible

# Largest difference of a log-likelihood or a score: the padding of a batch of other questions changes its last digits
# (docs/spotcheck.md has what was measured). By the type of the arithmetic.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
LISTED = 5  # differences that are printed
HASHES = ("doc_hash", "prompt_hash", "target_hash")  # of a question, its prompt, its expected answer


def check(artifact: Recorded, count: int, seed: int) -> tuple[list[str], bool]:
    """Compute the reported numbers again from the recorded answers, and ask `count` questions, drawn by `seed`, again;
    returns the lines to print, and whether all agrees. Where answers were sampled all are asked, since each depends on
    the questions before it."""
    samples = samples_of(artifact)
    questions = [(task, number) for task, rows in samples.items() for number in sorted({row["doc_id"] for row in rows})]
    drawn = questions if sampled(samples) else draw(questions, count, seed)
    picked = {task: [number for name, number in drawn if name == task] for task in samples}
    numbers, now = recorded.run(artifact, lambda section, **inputs: again(artifact, samples, picked, section, **inputs))
    count = len(drawn) if now else 0
    lines = [f"asked again: {count:,} of {len(questions):,} questions (--seed {seed} draws the same)"]
    problems = [*numbers, *differences(samples, now, TOLERANCE[recorded.arithmetic(artifact)])]
    return told(artifact, lines, problems, confidence(artifact, samples, picked))


def sampled(samples: dict[str, list[dict]]) -> bool:
    """Whether answers were drawn at random."""
    return any('"do_sample": true' in json.dumps(row["arguments"]) for rows in samples.values() for row in rows[:1])


def draw(questions: list, count: int, seed: int) -> list:
    """So many of the questions, or all, at random, in their order."""
    places = random.Random(seed).sample(range(len(questions)), min(count, len(questions)))
    return [questions[place] for place in sorted(places)]


def told(artifact: Recorded, lines: list[str], problems: list[str], worth: Iterable[str]) -> tuple[list[str], bool]:
    """The lines with what differs or, where nothing does, with what that is worth; and whether all agrees."""
    lines += [f"  not as recorded here: {change}" for change in recorded.otherwise(artifact)]
    if problems:
        more = [f"  and {len(problems) - LISTED:,} more"] if len(problems) > LISTED else []
        return [*lines, *(f"  differs: {problem}" for problem in problems[:LISTED]), *more], False
    lines.append(f"  equal: every answer, and its scores to {TOLERANCE[recorded.arithmetic(artifact)]:g}")
    lines.append("  equal: the reported numbers, computed again from all recorded answers")
    return [*lines, *worth], True


def samples_of(artifact: Recorded) -> dict[str, list[dict]]:
    """Task -> the recorded answers. Raises UserError where there are none, or where a file holds something else."""
    files = sorted((artifact.folder / "data" / "samples").glob("*.jsonl"))
    if not files:
        raise UserError(f"{artifact.folder}/data/samples: is gone, so that there is no answer to compare with")
    samples = {}
    for file in files:
        try:
            samples[file.stem] = sorted(rows_of(file), key=lambda row: (row["filter"], row["doc_id"]))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{file}: holds a line that is no answer of lm-eval") from None
    return samples


def again(
    artifact: Recorded,
    samples: dict[str, list[dict]],
    picked: dict[str, list[int]],
    section: Evaluate,
    data: Path,
    policy: Path,
    base: Path | None = None,
    fetched: Sequence[Path] = (),
) -> tuple[list[str], dict[str, list[dict]]]:
    """(what is wrong with the reported numbers, task -> the answers to the picked questions, now; {} where the recorded
    ones are not those of the tasks' questions).

    lm-eval would ask all questions of a task of which none is picked, so that these tasks are left out.
    """
    from posttrain.models.policy import load_policy
    from posttrain.stages import evaluate

    with tempfile.TemporaryDirectory() as packs:
        manager, names = evaluate.load_tasks(section, data, list(fetched), Path(packs))
        loaded = manager.load(names)
        if strange := samples.keys() ^ loaded["tasks"].keys():
            return [f"{', '.join(sorted(strange))}: answers and tasks are not of the same names"], {}
        if lacking := list(left_out(samples, loaded["tasks"], section.limit)):
            return lacking, {}
        wrong = list(other_numbers(artifact.metrics["rows"], numbers_of(samples, loaded)))
        tasks = [task for name, task in loaded["tasks"].items() if picked[name]]
        model, tokenizer = load_policy(policy, base, section.merge, section.four_bits)
        result, _ = evaluate.measure(section, model, tokenizer, manager, tasks, policy, picked)
    return wrong, evaluate.as_json(result["samples"])


def left_out(samples: dict[str, list[dict]], tasks: dict, limit: int | None) -> Iterator[str]:
    """The tasks whose recorded answers are not those of their first `limit` questions, or of all."""
    for name, task in tasks.items():
        asked = range(min(len(task.eval_docs), limit or len(task.eval_docs)))
        numbers = {row["doc_id"] for row in samples[name]}
        if numbers != {*asked}:
            yield f"{name}: {len(asked)} questions were to be asked, {len(numbers & {*asked})} of them have answers"


def numbers_of(samples: dict[str, list[dict]], loaded: dict[str, dict]) -> dict[str, dict]:
    """Task or group -> lm-eval's numbers by `METRIC,FILTER`, of recorded answers. loaded: tasks and groups."""
    numbers = {}
    for task, rows in samples.items():
        scores: dict[str, list] = {}
        for row in rows:
            for metric in row["metrics"]:
                scores.setdefault(f"{metric},{row['filter']}", []).append(row[metric])
        aggregations = loaded["tasks"][task].aggregation()
        values = {key: aggregations[key.partition(",")[0]](of_key) for key, of_key in scores.items()}
        numbers[task] = values | {"sample_len": len({row["doc_id"] for row in rows})}
    return numbers | {name: group.aggregate(numbers) for name, group in loaded["groups"].items()}


def other_numbers(reported: list[dict], numbers: dict[str, dict]) -> Iterator[str]:
    """The reported numbers that are not those of the recorded answers (`numbers_of`)."""
    for row in reported:
        of_task, label = numbers.get(row["task"], {}), row["metric"]
        values = [value for key, value in of_task.items() if label in (key, key.partition(",")[0])]
        count = of_task.get("sample_len")
        if len(values) != 1 or not same(row["value"], values[0], 1e-9) or row["n"] != count:
            made = f"make {values[0] if values else 'none'} ({count})"
            yield f"{row['task']} {label}: {row['value']} of {row['n']} questions is reported, their answers {made}"


def differences(samples: dict[str, list[dict]], now: dict[str, list[dict]], tolerance: float) -> Iterator[str]:
    """The first thing that differs of each question that was asked again."""
    for task, rows in now.items():
        before = {(row["doc_id"], row["filter"]): row for row in samples[task]}
        for row in rows:
            one = before[row["doc_id"], row["filter"]]
            for key in (*HASHES, "resps", "filtered_resps", *row["metrics"]):
                if not same(one.get(key), row[key], tolerance):
                    word = {"resps": "answer", "filtered_resps": "answer"}.get(key, key)
                    values = " recorded, ".join(visible(json.dumps(side.get(key))) for side in (one, row))
                    yield f"{task} question {row['doc_id']}: {word} {values} now"
                    break


def same(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two JSON values are equal, their numbers to a tolerance: relative, and of those under 1 absolute."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(*pair, tolerance) for pair in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance) or (one != one and other != other)
    return one == other


def confidence(artifact: Recorded, samples: dict[str, list[dict]], picked: dict[str, list[int]]) -> Iterator[str]:
    """What the agreement is worth for the numbers of each group, and of each task of no group."""
    groups = groups_of(artifact.folder / "lm_eval.json")
    inside = {member for members in groups.values() for member in members}
    for task in dict.fromkeys(row["task"] for row in artifact.metrics["rows"] if row["task"] not in inside):
        members, rows = groups.get(task) or [task], [row for row in artifact.metrics["rows"] if row["task"] == task]
        asked, total = sum(len(picked[member]) for member in members), rows[0]["n"]
        most = most_differing(total, asked)
        off = [
            f"{row['metric']} {short(row['value'])} is off by at most {most / total:.2g}"
            for row in rows
            if all(is_share(sample, row["metric"]) for member in members for sample in samples[member])
        ]
        worth = f"with 95 % confidence at most {most} of them differ" + (f", so that {', '.join(off)}" if off else "")
        yield f"confidence: {task}: {asked} of its {total} questions were asked again, all equal: {worth}"


def is_share(sample: dict, metric: str) -> bool:
    """Whether the score of an answer lies between 0 and 1, as a mean of such scores does."""
    score = sample.get(metric.partition(",")[0])
    return isinstance(score, int | float) and 0 <= score <= 1
