"""What the stages wrote, read back and made safe (`clean`, `number`); the result table."""

import csv
import io
import json
import math
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from posttrain.ground.files import sha256
from posttrain.maths.intervals import over_seeds

COLUMNS = ("experiment", "seed", "policy", "task", "metric", "value", "stderr", "n", "artifact")
NOT_A_POLICY = {"fetch", "prepare", "reward", "reference", "evaluate", "compare", "lengths", "report"}
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


def visible(text: object, keep: str = "") -> str:
    """Text that can hide nothing: control, bidi, zero-width and unpaired characters become ⟨U+202E⟩."""
    hidden = {c for c in str(text) if not (c in keep or c.isprintable() or unicodedata.category(c) == "Zs")}
    return str(text).translate({ord(c): f"⟨U+{ord(c):04X}⟩" for c in hidden})


def clean(value: object) -> object:
    """The same JSON value with every string in it made visible, keys too."""
    if isinstance(value, dict):
        return {visible(key): clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(clean, value))
    return visible(value) if isinstance(value, str) else value


def number(value: object, what: str) -> float | int:
    """A number as it is, finite or not; anything else is an error that names the field."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is not a number: {visible(value)[:60]}")
    return value if isinstance(value, float) or abs(value) < 1e300 else math.inf


def read_json(path: Path) -> dict:
    """One JSON object, cleaned; however it may be unreadable, a ValueError names the file."""
    try:
        return clean({**json.loads(path.read_text(encoding="utf-8"))})
    except FileNotFoundError:
        raise ValueError(f"no {path.name}") from None
    except BROKEN as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None


def artifacts(campaign: dict, results: Path) -> list[dict]:
    """Every artifact that the campaign uses, once: where it lies, who owns the folder, who uses it.

    `results/OWNER/STAGE`, and for each policy `results/OWNER/JUDGE/POLICY` (judges: evaluate, compare, lengths):
    beside the policy unless the experiment names it under the key `JUDGE/POLICY`. Judges come last, after what they
    judge.
    """
    found: dict[str, dict] = {}
    for experiment in campaign["experiments"]:
        stages = experiment["stages"] | evaluations(experiment["stages"])
        owners = {stage: PurePosixPath(at).parents[stage.count("/")].name for stage, at in stages.items()}
        for stage, owner in owners.items():
            name = visible(f"results/{owner}/{stage}")
            entry = found.setdefault(name, {"users": [], "seed": experiment["seed"]})
            entry |= {"name": name, "experiment": visible(owner), "stage": stage}
            entry["path"] = results / owner / stage
            entry["users"].append(visible(experiment["name"]))
            if experiment["name"] == owner:
                entry["seed"] = experiment["seed"]
            if policy := stage.partition("/")[2]:
                entry["policy"] = visible(f"results/{owners.get(policy, owner)}/{policy}")
    return sorted(found.values(), key=lambda entry: "policy" in entry)


def evaluations(stages: dict[str, str]) -> dict[str, str]:
    """Where each policy's evaluation lies, unless the experiment says so itself."""
    if any("/" in stage for stage in stages):
        return {}
    beside = {stage: PurePosixPath(folder).parent for stage, folder in stages.items()}
    return {f"evaluate/{s}": str(at / "evaluate" / s) for s, at in beside.items() if s not in NOT_A_POLICY}


def load(artifact: dict) -> dict:
    """The artifact with its records read; a ValueError says why it is not whole."""
    manifest, metrics, made = (artifact["path"] / f"{x}.json" for x in ("manifest", "metrics", "provenance"))
    if not manifest.is_file():
        raise ValueError("not made: it has no manifest.json")
    read = {"id": f"{artifact['name']}@{sha256(manifest)[:12]}", "metrics": read_json(metrics)}
    known = read_json(manifest)["files"].get("metrics.json", {}).get("sha256")
    if known not in (None, sha256(metrics)):
        raise ValueError("metrics.json: its bytes differ from its manifest")
    # A clone with pulled artifacts may lack the record of who made them; the results are no worse for it.
    return artifact | read | {"provenance": read_json(made) if made.exists() else {}}


def rows(evaluation: dict, policy: dict) -> list[dict]:
    """The result rows of one evaluation; a group's own row (`world`) comes before the tasks in it."""
    files = [evaluation["path"] / name for name in ("data/results.json", "lm_eval.json")]
    groups = next((read_json(file).get("groups", {}) for file in files if file.exists()), {})
    same = {key: evaluation[key] for key in ("experiment", "seed")} | {"judge": evaluation["stage"].partition("/")[0]}
    same |= {"policy": policy["stage"], "artifact": policy["id"]}
    found = []
    for row in evaluation["metrics"]["rows"]:
        numbers = {key: None if row.get(key) is None else number(row[key], key) for key in ("stderr", "n")}
        numbers["value"] = float(number(row["value"], "value"))
        kind = {"higher": row.get("higher_is_better"), "group": row["task"] in groups}
        found.append(same | numbers | kind | {"task": str(row["task"]), "metric": str(row["metric"])})
    return sorted(found, key=lambda row: not row["group"])


def short(value: object) -> str:
    """A number for people: 0.912, 12.3, 1,024; a small one as 2.0e-05; `nan` as itself; None as nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else visible(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if 0 < abs(value) < 0.001 or abs(value) >= 1e7:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def table_csv(table: list[dict]) -> str:
    """The result table with every digit."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *([row[c] for c in COLUMNS] for row in table)])
    return text.getvalue()


def metrics_json(table: list[dict]) -> str:
    """The values as experiment, policy, task, metric, for programs that show and compare metrics (DVC)."""
    found: dict = {}
    for row in table:
        of_policy = found.setdefault(row["experiment"], {}).setdefault(row["policy"], {})
        of_policy.setdefault(row["task"], {})[row["metric"]] = row["value"] if math.isfinite(row["value"]) else None
    return json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def curves_csv(artifacts: list[dict]) -> str:
    """Training loss by step, a column for everything that was trained."""
    curves: dict[str, dict[int, float]] = {}
    for artifact in artifacts:
        points = {p["step"]: p["loss"] for p in artifact.get("history", []) if {"step", "loss"} <= p.keys()}
        if points:
            curves[artifact["name"].removeprefix("results/")] = points
    steps = sorted({step for points in curves.values() for step in points})
    lines = [[step, *(points.get(step, "") for points in curves.values())] for step in steps]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["step", *curves], *lines])
    return text.getvalue()


def seeds(table: list[dict]) -> list[dict]:
    """Every figure that several seeds have: mean, standard deviation over them (n - 1) and their number."""
    cells: dict[tuple, list[float]] = {}
    for row in table:
        cells.setdefault(tuple(row[c] for c in ("family", "policy", "task", "metric")), []).append(row["value"])
    found = []
    for cell, values in cells.items():
        if len(values) > 1:
            mean, deviation = over_seeds(values)
            named = dict(zip(("experiment", "policy", "task", "metric"), cell, strict=True))
            found.append(named | {"mean": mean, "deviation": deviation, "seeds": len(values)})
    return found


def seeds_md(table: list[dict]) -> str:
    """Means and deviations over seeds to read; nothing where no figure has several."""
    if not (found := seeds(table)):
        return ""
    lines = [list(found[0]), ["---"] * len(found[0])]
    lines += [[short(v) if isinstance(v, int | float) else str(v) for v in row.values()] for row in found]
    return "\nOver seeds:\n\n" + "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)


def cell(text: str) -> str:
    """Text that cannot open a new cell or an HTML element."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def table_md(table: list[dict]) -> str:
    """The result table to read; a name cannot open a new cell or an HTML element."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in table:
        cells = [short(row[c]) if c in ("value", "stderr", "n") else str(row[c]) for c in COLUMNS]
        lines.append([cell(text) for text in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_table(path: Path, width: int = 100) -> None:
    """The table beside `path` (table.csv or table.md) on a terminal: a line per policy, a column per task."""
    with Path(path).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    policies = dict.fromkeys((row["experiment"], row["seed"], row["policy"]) for row in table)
    cells = {tuple(row[c] for c in COLUMNS[:5]): terminal_cell(row) for row in table}
    metrics = sorted({row["metric"] for row in table})
    columns = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in table):
        head = [task[:14], metric[:14] if len(metrics) > 1 else ""]
        columns.append(head + [cells.get((*policy, task, metric), "") for policy in policies])
    one_metric = metrics[0] if len(metrics) == 1 else ""
    names = [["experiment", one_metric, *(p[0] for p in policies)], ["policy", "", *(p[2] for p in policies)]]
    print("\n".join(table_lines(names, columns, width)))


def terminal_cell(row: dict) -> str:
    """Value ± standard error in few characters: 0.93±.02."""
    error = f"±{float(row['stderr']):.2f}".replace("±0.", "±.") if row["stderr"] else ""
    return f"{float(row['value']):.2f}{error}"


def table_lines(names: list[list[str]], columns: list[list[str]], width: int) -> Iterator[str]:
    """Lines of aligned columns; columns that do not fit follow in a further block under the same names."""
    names = [[f"{text[:24]:{min(24, max(map(len, column)))}}" for text in column] for column in names]
    columns = [[f"{text:>{max(map(len, column))}}" for text in column] for column in columns]
    while columns:
        block = [*names, columns.pop(0)]
        while columns and sum(len(c[0]) + 2 for c in [*block, columns[0]]) <= width + 2:
            block.append(columns.pop(0))
        yield from ("  ".join(line).rstrip() for line in zip(*block, strict=True))
        yield ""
