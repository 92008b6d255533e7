"""Read what a claim measures from the records of artifacts: weighted sums of numbers with their standard errors."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.ground.files import rows_of
from posttrain.ground.identity import of_params, record_of
from posttrain.maths.intervals import mean_stderr
from posttrain.maths.significance import clustered
from posttrain.reporting.records import BROKEN, groups_of, read_json, read_records
from posttrain.reporting.text import number, visible

COVERAGE = 0.9  # least share of questions that both sides of a difference have a score of
ANSWERS = {"kl_to_sft": "kl", "eos_rate": "ended"}
"""Metric of `compare` -> the column of its answers, where their names differ."""
ROUNDING = 1e-6  # of a metric beside the mean of its questions


class NotMade(Exception):
    """An artifact that a claim needs is not there, or was made with other settings or code than planned."""


class Refused(Exception):
    """Numbers that cannot be compared, with the difference."""


class Item(NamedTuple):
    """One question or prompt: its score, the cluster that it belongs to, and the digest of what was asked."""

    score: float
    cluster: Any
    asked: str


class Value(NamedTuple):
    """One number of an artifact."""

    value: float
    stderr: float | None = None
    n: int | None = None
    items: dict[Any, Item] | None = None
    protocol: dict | None = None
    limit: int | None = None


class Estimate(NamedTuple):
    """What a claim measures: its value, and where it has an error, the standard error, its degrees of freedom, and
    over what it is taken."""

    value: float
    stderr: float | None
    freedom: int
    over: str
    protocol: dict | None = None
    limited: bool = False


def measure(measured: dict, results: Path) -> Estimate:
    """The estimate of a measurement: over seeds where it has several, else over questions.

    Raises NotMade or Refused, naming the artifact.
    """
    estimates = [_of_run(run, measured, results) for run in measured["runs"]]
    if len(estimates) == 1:
        return estimates[0]
    mean, stderr = mean_stderr([estimate.value for estimate in estimates])
    over, first = f"{len(estimates)} seeds", estimates[0]
    return Estimate(mean, stderr, len(estimates) - 1, over, first.protocol, any(one.limited for one in estimates))


def _of_run(run: dict, measured: dict, results: Path) -> Estimate:
    """The estimate of one seed."""
    cluster, weights = measured["cluster"], [term["weight"] for term in run["terms"]]
    values = [_value(term, measured["planned"], cluster, results) for term in run["terms"]]
    divisors = [_value(term, measured["planned"], cluster, results) for term in run.get("over", [])]
    everything = values + divisors
    alike = len({term.get("value") for term in run["terms"] + run.get("over", [])}) == 1
    if alike:
        refuse_other_protocol(everything)
    limited = any(value.limit is not None for value in everything)
    protocol = values[0].protocol
    if alike and all(value.items for value in everything):
        return _paired(weights, values, divisors)._replace(protocol=protocol, limited=limited)
    total = math.fsum(weight * value.value for weight, value in zip(weights, values, strict=True))
    errors = [abs(w) * value.stderr for w, value in zip(weights, values, strict=True) if value.stderr is not None]
    stderr = math.hypot(*errors) if errors else None
    if divisors:
        below = divisors[0].value
        if not below:
            raise Refused("the number to divide by is 0")
        parts = [(stderr or 0.0) / below, total / below**2 * (divisors[0].stderr or 0.0)]
        stderr = math.hypot(*parts) if stderr is not None or divisors[0].stderr is not None else None
        total /= below
    counts = [value.n for value in everything if value.n]
    over = f"{min(counts):,} questions{', unpaired' * (len(everything) > 1)}" if counts and stderr is not None else ""
    return Estimate(total, stderr, max(1, min(counts, default=2) - 1), over, protocol, limited)


def _paired(weights: list[float], values: list[Value], divisors: list[Value]) -> Estimate:
    """An estimate from the scores of the questions that all numbers share.

    A ratio's error is that of its linearisation: of (a_i - R b_i) / mean(b).
    """
    columns = [value.items or {} for value in values + divisors]
    shared = [key for key in columns[0] if all(key in column for column in columns)]
    largest = max(map(len, columns))
    if len(shared) < COVERAGE * largest:
        raise Refused(f"only {len(shared):,} of {largest:,} questions are scored on both sides; at least 90 % must be")
    for key in shared:
        if len({column[key].asked for column in columns}) > 1:
            raise Refused(f"question {key[-1]} of {key[0]} differs between the two sides")
    sums = [math.fsum(w * value.items[key].score for w, value in zip(weights, values, strict=True)) for key in shared]  # type: ignore[index]
    clusters = [columns[0][key].cluster for key in shared]
    if divisors:
        below = [divisors[0].items[key].score for key in shared]  # type: ignore[index]
        mean = math.fsum(below) / len(below)
        if not mean:
            raise Refused("the number to divide by is 0")
        ratio = math.fsum(sums) / len(sums) / mean
        deviations = [(a - ratio * b) / mean for a, b in zip(sums, below, strict=True)]
        _, stderr, count = clustered(deviations, clusters)
        value = ratio
    else:
        value, stderr, count = clustered(sums, clusters)
    grouped = f" in {count:,} clusters" if count < len(shared) else ""
    return Estimate(value, stderr, max(1, count - 1), f"{len(shared):,} questions{grouped}")


def refuse_other_protocol(values: list[Value]) -> None:
    """Raise Refused, naming the difference, where numbers to compare were measured in different ways."""
    first, *others = [value.protocol or {} for value in values]
    for other in others:
        for key in first.keys() & other.keys():
            if other[key] != first[key]:
                raise Refused(f"{key} differs: {visible(first[key])} and {visible(other[key])}")


def _value(term: dict, planned: dict, cluster: str | None, results: Path) -> Value:
    """The number that a term names."""
    if "constant" in term:
        return Value(term["constant"])
    if "file" in term:
        return _of_file(term["file"], term["value"])
    folder = results.parent / term["folder"]
    try:
        record = read_records({"name": term["folder"], "path": folder})
    except BROKEN as error:
        raise NotMade(f"{term['folder']}: {error}") from None
    params = record_of(folder).get("params")
    if params and of_params(params) != planned[term["folder"]]:
        raise NotMade(f"{term['folder']}: it was made with other settings or other code")
    read = _of_row if "rows" in record["metrics"] else _of_key
    try:
        value = read(folder, record["metrics"], term["value"], cluster)
    except (Refused, *BROKEN) as error:
        raise Refused(f"{term['folder']}: {error}") from None
    if not math.isfinite(value.value):
        raise Refused(f"{term['folder']}: {term['value']} is {value.value}")
    return value


def _of_file(file: str, key: str) -> Value:
    """A number of a JSON file."""
    try:
        return _of_key(Path(file), json.loads(Path(file).read_text(encoding="utf-8")), key, None)
    except (OSError, ValueError) as error:
        raise Refused(f"{file}: {error}") from None


def _of_key(folder: Path, metrics: dict, key: str, cluster: str | None) -> Value:
    """The number under a dotted key, with the `stderr` and `n` beside it."""
    inner: Any = metrics
    above: Any = {}
    for part in key.split("."):
        if not isinstance(inner, dict) or part not in inner:
            keys = ", ".join(map(visible, inner)) if isinstance(inner, dict) else "a number"
            raise Refused(f"has no {key}: {part} is not among {keys}")
        above, inner = inner, inner[part]
    stderr, n = above.get("stderr"), above.get("n")
    return Value(float(number(inner, key)), None if stderr is None else float(stderr), n)


def _of_row(folder: Path, metrics: dict, name: str, cluster: str | None) -> Value:
    """The number of a row of a judgement, with its questions where they were recorded."""
    task, _, metric = name.partition(" ")
    row = next((row for row in metrics["rows"] if (row["task"], row["metric"]) == (task, metric)), None)
    if row is None:
        rows = ", ".join(dict.fromkeys(f"{row['task']} {row['metric']}" for row in metrics["rows"]))
        raise Refused(f"has no {name}; its table has {visible(rows)}")
    compared = (folder / "data" / "answers.jsonl").is_file()
    items = _answers(folder, metric, cluster) if compared else _questions(folder, task, metric, cluster)
    value, stderr = float(number(row["value"], "value")), row.get("stderr")
    if items:
        mean = math.fsum(item.score for item in items.values()) / len(items)
        if abs(mean - value) > ROUNDING * max(1.0, abs(value)):
            raise Refused(f"{name} is {value} in its table, and {mean} by its recorded questions")
    protocol = _protocol(folder, task, row, metrics)
    return Value(value, stderr, row.get("n"), items or None, protocol, metrics.get("limit"))


def _answers(folder: Path, metric: str, cluster: str | None) -> dict[Any, Item]:
    """The answers of a policy by prompt, as `compare` recorded them; {} where it records none of this metric."""
    column, file = ANSWERS.get(metric, metric), folder / "data" / "answers.jsonl"
    if not file.is_file():
        return {}
    rows = [row for row in rows_of(file) if row.get(column) is not None]
    return {
        ("answers", row["id"]): Item(float(row[column]), row.get(cluster) if cluster else row["id"], row["prompt"])
        for row in rows
    }


def _questions(folder: Path, task: str, metric: str, cluster: str | None) -> dict[Any, Item]:
    """The questions of a task or of a group's tasks, as lm-eval recorded them; {} where the metric is not the mean of
    scores of single questions."""
    groups = groups_of(folder / "lm_eval.json")
    items: dict[Any, Item] = {}
    for member in groups.get(task) or [task]:
        file = folder / "data" / "samples" / f"{member}.jsonl"
        for row in rows_of(file) if file.is_file() else ():
            score = row.get(metric)
            if isinstance(score, bool) or not isinstance(score, int | float):
                return {}
            key = (member, row["doc_id"])
            group = row["doc"].get(cluster) if cluster else key
            items[key] = Item(float(score), (member, group), row["doc_hash"] + row["target_hash"])
    return items


def _protocol(folder: Path, task: str, row: dict, metrics: dict) -> dict:
    """How a row of a judgement was measured: version, examples, settings of generation, template, type of the weights,
    number of questions."""
    file = folder / "lm_eval.json"
    if not file.is_file():
        judge = json.loads(record_of(folder).get("params", ["{}"])[0]).get("judge", {})
        return {"items": row.get("n")} | (judge if row["metric"].startswith("judge_") else {})
    result = read_json(file)
    return {
        "version": result.get("versions", {}).get(task),
        "shots": result.get("n-shot", {}).get(task),
        "template": metrics.get("chat_template") or "none",
        "dtype": result.get("config", {}).get("model_dtype"),
        "items": row.get("n"),
    } | ({"generation": given} if (given := metrics.get("generation", {}).get(task)) else {})
