"""Record what each artifact under a campaign's claims is, and find the first one that departs from the record."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.ground.errors import UserError
from posttrain.ground.files import listed
from posttrain.ground.identity import canonical, record_of
from posttrain.reporting.records import BROKEN, read_json
from posttrain.reporting.text import short, visible

ROWS = re.compile(r"data/[^/]+/[^/]+\.jsonl")  # the same bytes on every machine, as tokens and weights are not
CLOSE = 0.01  # share by which a number may depart on another processor without being named first


def snapshot(folder: Path) -> dict[str, Any]:
    """An artifact as a record: its settings, a digest of its rows, how lm-eval measured, and its numbers by name; {}
    where it cannot be read."""
    try:
        files = {name: digest for name, (digest, _) in listed(folder / "manifest.json").items() if ROWS.fullmatch(name)}
        metrics = read_json(folder / "metrics.json")
        return {
            "settings": json.loads(record_of(folder).get("params", ["{}"])[0]),
            "rows": hashlib.sha256(canonical(files).encode()).hexdigest()[:16],
            "protocol": protocol(folder, metrics),
            "numbers": dict(sorted(numbers(metrics).items())),
        }
    except (UserError, *BROKEN):
        return {}


def protocol(folder: Path, metrics: dict) -> dict[str, Any]:
    """How lm-eval measured: template, type of the weights, limit, and version, examples and questions of each task; {}
    for an artifact that it did not make."""
    if not (folder / "lm_eval.json").is_file():
        return {}
    result = read_json(folder / "lm_eval.json")
    shots, counts = result.get("n-shot", {}), {row["task"]: row["n"] for row in metrics["rows"]}
    tasks = {
        task: f"version {version}, {shots.get(task)} examples, {counts.get(task)} questions"
        for task, version in result.get("versions", {}).items()
    }
    whole = {"template": metrics.get("chat_template"), "dtype": result.get("config", {}).get("model_dtype")}
    return whole | {"limit": metrics.get("limit"), "tasks": tasks}


def numbers(metrics: dict) -> dict[str, float]:
    """The numbers of an artifact: the rows of a judgement, or the summary and the last losses of a training."""
    if "rows" in metrics:
        return {f"{row['task']} {row['metric']}": row["value"] for row in metrics["rows"]}
    last = metrics["history"][-1] if metrics.get("history") else {}
    parts = [metrics.get("summary", {}), {key: value for key, value in last.items() if key.endswith("loss")}]
    parts += [{f"{kind} pairs": pairs["accuracy"]} for kind, pairs in metrics.get("pairs", {}).items()]
    parts += [{f"{task} {side}": n} for task, sides in metrics.get("splits", {}).items() for side, n in sides.items()]
    return {key: value for part in parts for key, value in part.items() if isinstance(value, int | float)}


def other_settings(folders: list[str], recorded: dict[str, dict], root: Path) -> str:
    """The first of some artifacts, in the order of the stages, that was made with other settings than the recorded one,
    measured in another way, or made of other data, and in what; "" where none was."""
    for folder, before, now in _pairs(folders, recorded, root):
        for part in ("settings", "protocol"):
            for key, recorded_value, value in differing(before[part], now[part], "", absent="unset"):
                return f"{folder}: {visible(key)} is {visible(value)}, and {visible(recorded_value)} in the record"
        if folder.endswith("/prepare") and now["rows"] != before["rows"]:
            return f"{folder}: its data are not the recorded ones{_first(before['numbers'], now['numbers'], 0.0)}"
    return ""


def departure(folders: list[str], recorded: dict[str, dict], root: Path) -> str:
    """The first of some artifacts, in the order of the stages, with a number that departs from its record by more than
    CLOSE, or else at all; "" where none does."""
    pairs = list(_pairs(folders, recorded, root))
    for reach in (CLOSE, 0.0):
        for folder, before, now in pairs:
            if text := _first(before["numbers"], now["numbers"], reach):
                return f"{folder}{text}"
    return ""


def _pairs(folders: list[str], recorded: dict[str, dict], root: Path) -> Iterator[tuple[str, dict, dict]]:
    """(folder, its record, what it is now) of the artifacts that have a record and can be read."""
    for folder in folders:
        if folder in recorded and (now := snapshot(root / folder)):
            yield folder, recorded[folder], now


def differing(before, now, where: str, absent=None) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, the value before, the value now) of each key in which two nested mappings differ, sorted by key.

    where: dotted key of the mappings themselves. absent: the value of a key that one of them lacks.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            inner = f"{where}.{key}".removeprefix(".")
            yield from differing(before.get(key, absent), now.get(key, absent), inner, absent)
    elif before != now:
        yield where, before, now


def _first(before: dict[str, float], now: dict[str, float], reach: float) -> str:
    """The first number that departs by more than a share of itself, as `: loss 0.31 recorded, 0.52 here`."""
    for name, value in before.items():
        other = now.get(name, math.nan)
        if not math.isclose(value, other, rel_tol=reach, abs_tol=1e-9):
            return f": {visible(name)} {short(value)} recorded, {short(other)} here"
    return ""
