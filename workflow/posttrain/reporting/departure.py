"""Record what each artifact under a campaign's claims is, and find the first one that departs from the record."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.ground.errors import UserError
from posttrain.ground.files import listed
from posttrain.ground.identity import canonical, record_of
from posttrain.reporting.records import BROKEN, read_json
from posttrain.reporting.text import short, visible

CLOSE = 0.01  # share by which a number may depart on another processor without being named first


def snapshot(folder: Path) -> dict[str, Any]:
    """An artifact as a record: its settings, a digest of its data or weights, and its numbers by name; {} where it
    cannot be read."""
    try:
        files = {name: digest for name, (digest, _) in listed(folder / "manifest.json").items() if "/" in name}
        return {
            "settings": json.loads(record_of(folder).get("params", ["{}"])[0]),
            "bytes": hashlib.sha256(canonical(files).encode()).hexdigest()[:16],
            "numbers": dict(sorted(numbers(read_json(folder / "metrics.json")).items())),
        }
    except (UserError, *BROKEN):
        return {}


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
    or from other data, and in what; "" where none was."""
    for folder, before, now in _pairs(folders, recorded, root):
        differing = [
            key for key, value in _flat(before["settings"]).items() if _flat(now["settings"]).get(key) != value
        ]
        differing += [key for key in _flat(now["settings"]) if key not in _flat(before["settings"])]
        if differing:
            old, new = (_flat(part["settings"]).get(differing[0], "unset") for part in (before, now))
            return f"{folder}: {visible(differing[0])} is {visible(new)}, and {visible(old)} in the record"
        if folder.endswith("/prepare") and now["bytes"] != before["bytes"]:
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


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _first(before: dict[str, float], now: dict[str, float], reach: float) -> str:
    """The first number that departs by more than a share of itself, as `: loss 0.31 recorded, 0.52 here`."""
    for name, value in before.items():
        other = now.get(name, math.nan)
        if not math.isclose(value, other, rel_tol=reach, abs_tol=1e-9):
            return f": {visible(name)} {short(value)} recorded, {short(other)} here"
    return ""
