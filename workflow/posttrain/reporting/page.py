"""index.html: one self-contained page. Jinja escapes all text from models, data and logs."""

import re
import shlex
from pathlib import Path

from posttrain.reporting import figures, tables, verdict
from posttrain.reporting.text import clean, short, visible

ANSWERS = ("gold_reward", "reward", "exact_reward", "win_rate", "kl_to_sft", "length", "eos_rate", "distinct_2",
           "distinct_answers")  # fmt: skip


def page(campaign: dict, record: dict, drawn: list[dict]) -> str:
    """The report as HTML. record: artifacts, rows, missing, samples; drawn: the figures with their SVG."""
    from jinja2 import Environment, FileSystemLoader

    folder = FileSystemLoader(Path(__file__).parents[1] / "templates")
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests["match"] = lambda text, pattern: re.match(pattern, text) is not None
    environment.globals["explains"] = explains
    environment.filters |= {"short": short, "themed": figures.themed, "details": verdict.details}
    environment.filters |= {"figure": lambda ruling: verdict.figure(ruling["got"], ruling["stderr"])}
    experiments = {experiment["name"]: experiment for experiment in clean(campaign["experiments"])}
    for artifact in record["artifacts"]:  # a parent that owns an artifact may not be listed in the campaign
        experiments.setdefault(artifact["experiment"], {"name": artifact["experiment"], "outside": True})
    return environment.get_template("report.html.j2").render(
        record,
        side=side_by_side(record["artifacts"]),
        seeds=over_seeds(record["rows"]),
        title=visible(campaign["title"]),
        answer=verdict.answer(record["verdict"]),
        rulings=clean(record["verdict"]["rulings"]),
        accepted=clean(campaign.get("accepted", [])),
        again=lambda target: command(target, campaign.get("configfile", "")),
        experiments=list(experiments.values()),
        figures=drawn,
    )


def command(target: str, configfile: str) -> str:
    """The command that makes an artifact of this campaign or, without a target, everything.

    The target comes first, as Snakemake takes everything after `--configfile` for config files.
    """
    if not target and not configfile:
        return "make run"
    words = ["snakemake", "--cores", "2", *([target] if target else [])]
    return shlex.join([*words, *(["--configfile", configfile] if configfile else [])])


def over_seeds(rows: list[dict]) -> list[dict]:
    """The means over seeds, each with the `rows` that it is the mean of."""
    of_figure: dict[tuple, list[dict]] = {}
    for row in rows:
        of_figure.setdefault((row["family"], row["policy"], row["task"], row["metric"]), []).append(row)
    key = ("experiment", "policy", "task", "metric")
    return [figure | {"rows": of_figure[tuple(figure[part] for part in key)]} for figure in tables.seeds(rows)]


def explains(folder: str, number: str = "") -> str:
    """The command that traces an artifact, or one of its numbers, back to its bytes."""
    return shlex.join(["posttrain", "explain", folder.removeprefix("results/"), *([number] if number else [])])


def side_by_side(artifacts: list[dict]) -> dict:
    """One line for each compared policy: the first row of its benchmark, and the figures of its own answers."""
    judged = {(a["stage"].partition("/")[0], a["policy"]): a["rows"] for a in artifacts if "rows" in a}
    lines: list[dict] = []
    for artifact in artifacts:
        if artifact["stage"].startswith("compare/"):
            cells = {row["metric"]: row for row in artifact["rows"]}
            benchmark = next(iter(judged.get(("evaluate", artifact["policy"]), [])), None)
            name = f"{artifact['experiment']} · {artifact['stage'].partition('/')[2]}"
            lines.append({"name": name, "benchmark": benchmark, "cells": cells})
    first = next((line["benchmark"] for line in lines if line["benchmark"]), None)
    title = f"{first['task']} {first['metric']}" if first else "benchmark"
    shown = [key for key in ANSWERS if any(key in line["cells"] for line in lines)]
    for line in lines:
        line["cells"] = [line["cells"].get(key) for key in shown]
    return {"columns": [title, *(key.replace("_", " ") for key in shown)], "lines": lines}
