"""The result table as CSV, Markdown and JSON, figures over seeds, and the training curves as CSV."""

import csv
import io
import json
import math

from posttrain.maths.intervals import over_seeds
from posttrain.reporting.text import cell, short

COLUMNS = ("experiment", "seed", "policy", "task", "metric", "value", "stderr", "n", "artifact")


def table_csv(rows: list[dict]) -> str:
    """The result table as CSV, with all digits."""
    return csv_text([COLUMNS, *([row[column] for column in COLUMNS] for row in rows)])


def table_md(rows: list[dict]) -> str:
    """The result table as Markdown, with short numbers."""
    numeric = ("value", "stderr", "n")
    cells = [[short(row[c]) if c in numeric else str(row[c]) for c in COLUMNS] for row in rows]
    return markdown(COLUMNS, cells)


def metrics_json(rows: list[dict]) -> str:
    """The values by experiment, policy, task and metric as JSON, for programs that compare metrics (DVC)."""
    values: dict = {}
    for row in rows:
        of_policy = values.setdefault(row["experiment"], {}).setdefault(row["policy"], {})
        of_policy.setdefault(row["task"], {})[row["metric"]] = row["value"] if math.isfinite(row["value"]) else None
    return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def curves_csv(artifacts: list[dict]) -> str:
    """Training loss by step as CSV, with a column for each trained artifact."""
    curves: dict[str, dict[int, float]] = {}
    for artifact in artifacts:
        points = {p["step"]: p["loss"] for p in artifact.get("history", []) if {"step", "loss"} <= p.keys()}
        if points:
            curves[artifact["name"].removeprefix("results/")] = points
    steps = sorted({step for points in curves.values() for step in points})
    return csv_text([["step", *curves], *([step, *(points.get(step, "") for points in curves.values())]
                                          for step in steps)])  # fmt: skip


def seeds(rows: list[dict]) -> list[dict]:
    """Figures with several seeds: mean, standard deviation over the seeds (n - 1) and number of seeds."""
    values: dict[tuple, list[float]] = {}
    for row in rows:
        values.setdefault(tuple(row[c] for c in ("family", "policy", "task", "metric")), []).append(row["value"])
    figures = []
    for figure, of_seeds in values.items():
        if len(of_seeds) > 1:
            mean, deviation = over_seeds(of_seeds)
            names = dict(zip(("experiment", "policy", "task", "metric"), figure, strict=True))
            figures.append(names | {"mean": mean, "deviation": deviation, "seeds": len(of_seeds)})
    return figures


def seeds_md(rows: list[dict]) -> str:
    """Means and deviations over seeds as Markdown; "" where no figure has several seeds."""
    if not (figures := seeds(rows)):
        return ""
    cells = [[short(v) if isinstance(v, int | float) else str(v) for v in figure.values()] for figure in figures]
    return "\nOver seeds:\n\n" + markdown(figures[0], cells)


def missing_md(missing: list[dict]) -> str:
    """A line that names missing artifacts, for below the table; "" where none is missing."""
    names = ", ".join(piece["name"].replace("<", "&lt;") for piece in missing)
    return f"\n**PARTIAL**, missing: {names}\n" if missing else ""


def markdown(head, rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *([cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_text(lines: list) -> str:
    """Lines as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
