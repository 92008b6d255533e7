"""report: what the campaign's stages recorded, as one table, figures and one page that opens anywhere.

It reads JSON and knows no model. What a stage failed to make is named with its reason and takes nothing from
the rest; the page is then marked partial and has no manifest, so that the workflow comes back to it.
"""

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from posttrain.ground.files import write_json
from posttrain.ground.identity import manifest_of
from posttrain.reporting import figures, records
from posttrain.reporting.records import BROKEN, number, short, visible

FIRST_SAMPLES, SAMPLE_CHARACTERS = 3, 1200


def report(
    campaign: dict, output: Path, results: Path = Path("results"), reasons: dict[str, str] | None = None
) -> list[dict]:
    """Write table, figures and page into `output`; returns what is missing: nothing, if it is complete.

    campaign: {"title", "experiments": [{"name", "family", "question", "seed", "stages": {stage: artifact folder}}]};
    experiments of one family differ in their seeds only. `owners`: the family of what several cells of a grid share.
    reasons: what the caller knows about failed artifacts, by name, e.g. {"results/tiny/ppo": "KL exploded"}.
    """
    record = gather(campaign, results, reasons or {})
    drawn = draw(record)
    texts = {f"figures/{figure['name']}.svg": figure["wide"] for figure in drawn}
    texts["table.csv"] = records.table_csv(record["rows"])
    tables = records.table_md(record["rows"]) + records.seeds_md(record["rows"])
    texts["table.md"] = tables + partial_note(record["missing"])
    texts["metrics.json"] = records.metrics_json(record["rows"])
    texts["curves.csv"] = records.curves_csv(record["artifacts"])
    texts["index.html"] = page(campaign, record, drawn)
    publish(output, {name: text.encode() for name, text in texts.items()}, complete=not record["missing"])
    return record["missing"]


def gather(campaign: dict, results: Path, reasons: dict[str, str]) -> dict:
    """Every record of the campaign that can be read, and what cannot, with its reason."""
    whole: dict[str, dict] = {}
    missing: list[dict] = []
    for artifact in records.artifacts(campaign, results):
        try:
            if artifact["name"] in reasons:
                raise ValueError(visible(reasons[artifact["name"]]))
            whole[artifact["name"]] = read(artifact, whole)
        except BROKEN as error:
            log = results / "logs" / artifact["path"].relative_to(results).with_suffix(".log")
            missing.append({"name": artifact["name"], "users": artifact["users"]} | because(error, log))
    evaluated = [artifact for artifact in whole.values() if "rows" in artifact]
    samples = [sample for artifact in evaluated for sample in read_samples(artifact, missing)]
    families = {entry["name"]: entry["family"] for entry in campaign["experiments"] if "family" in entry}
    families |= campaign.get("owners", {})
    rows = [
        row | {"family": families.get(row["experiment"], row["experiment"])}
        for artifact in evaluated
        for row in artifact["rows"]
    ]
    return {"artifacts": list(whole.values()), "rows": rows, "samples": samples, "missing": missing}


def read(artifact: dict, whole: dict[str, dict]) -> dict:
    """One artifact with what the report shows of it: rows of an evaluation, a data card, or a training."""
    policy = artifact.get("policy")
    if policy and policy not in whole:
        raise ValueError(f"waits for {policy}, which is missing")
    artifact = records.load(artifact)
    metrics = artifact["metrics"]
    if policy:
        points = [frontier_point(entry) for entry in metrics.get("frontier", [])]
        parts = [{key: part[key] and number(part[key], key) for key in part} for part in metrics.get("positions", [])]
        return artifact | {"rows": records.rows(artifact, whole[policy]), "frontier": points, "positions": parts}
    if artifact["stage"] == "prepare":
        return artifact | {"card": card(metrics)}
    if artifact["stage"] == "fetch":
        return artifact
    numbers = metrics.get("summary", {}) | {f"tokens: {k}": v for k, v in metrics.get("tokens", {}).items()}
    for kind, found in metrics.get("pairs", {}).items():
        error = f" ± {short(found['stderr'])}" if found.get("stderr") is not None else ""
        numbers[f"accuracy, {kind} pairs"] = f"{short(found['accuracy'])}{error} (n {found['n']})"
    made = {"summary": numbers, "history": [point(entry) for entry in metrics.get("history", [])]}
    if calibration := metrics.get("calibration"):
        numbers["expected calibration error"] = number(calibration["ece"], "ece")
        made["bins"] = [{key: number(part[key], key) for key in part} for part in calibration["bins"]]
    return artifact | made | {"warnings": [str(text) for text in metrics.get("warnings", [])]}


def point(entry: dict) -> dict:
    """One logged step with the numbers it has."""
    return {key: number(value, key) for key, value in entry.items() if value is not None}


def frontier_point(entry: dict) -> dict:
    """A point of the reward-KL frontier: its names, and its numbers checked."""
    return {key: v if key in ("series", "label") or v is None else number(v, key) for key, v in entry.items()}


def card(metrics: dict) -> dict:
    """The data card, checked: sources with counts by reason, rows per split, token lengths."""
    sources = [
        {"name": source["name"], "task": source.get("task", "")}
        | {key: number(source[key], key) for key in ("total", "kept")}
        | {key: list(source.get(key, {}).items()) for key in ("dropped", "warnings")}
        for source in metrics["sources"]
    ]
    splits = [(task, list(sizes.items())) for task, sizes in metrics.get("splits", {}).items()]
    tokens = [(task, list(lengths.items())) for task, lengths in metrics.get("tokens", {}).items()]
    return {"sources": sources, "splits": splits, "tokens": tokens}


def because(error: Exception, log: Path) -> dict:
    """Why something is missing: the error in words, and the last lines of its log where there are any."""
    reason = f"{error.args[0]!r} is missing from its records" if isinstance(error, KeyError) else str(error)
    text = ""
    with contextlib.suppress(OSError):
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log.read_bytes()[-20_000:].decode(errors="replace"))
    lines = [visible(line.rstrip(), "\t")[:300] for line in re.split(r"[\r\n]+", text) if line.strip()]
    return {"reason": visible(reason)[:500], "log": "\n".join(lines[-8:])}


def read_samples(evaluation: dict, missing: list[dict]) -> Iterator[dict]:
    """Sample answers per task, in the order of the result rows; an unreadable file is named as missing."""
    tasks = {row["task"]: row["metric"] for row in evaluation["rows"]}
    for task, metric in tasks.items():
        file = evaluation["path"] / "data" / "samples" / f"{task.replace(os.sep, '_')}.jsonl"
        if evaluation["stage"].startswith("compare/"):
            file = evaluation["path"] / "data" / "answers.jsonl"
        try:
            if file.is_file():
                yield {"artifact": evaluation, "task": task, "examples": choose(file, metric)}
        except BROKEN as error:
            piece = {"name": f"{evaluation['name']}/data/samples/{file.name}", "users": evaluation["users"]}
            missing.append(piece | because(error, log=Path(os.devnull)))


def choose(file: Path, metric: str) -> list[dict]:
    """The first few answers as they come, then the next wrong one if none was: by place, not by taste."""
    chosen: list[dict] = []
    with file.open(encoding="utf-8") as lines:
        for line in filter(str.strip, lines):
            example = answer(json.loads(line), metric)
            if len(chosen) < FIRST_SAMPLES or example["score"] == 0:
                chosen.append(example)
            if len(chosen) >= FIRST_SAMPLES and any(example["score"] == 0 for example in chosen):
                break
    return chosen


def answer(sample: dict, metric: str) -> dict:
    """One sample of lm-eval (by its API or its tracker) or of `compare`: prompt, expected, answer, score."""
    if "reply" in sample:
        scores = [sample[key] for key in ("gold_reward", "reward") if sample.get(key) is not None]
        shown = {"prompt": sample["prompt"], "expected": sample.get("answer") or "", "answer": sample["reply"]}
        return {key: shorten(text) for key, text in shown.items()} | {"score": scores[0] if scores else None}
    arguments = sample["arguments"]
    asked = list(arguments["gen_args_0"].values()) if isinstance(arguments, dict) else arguments[0]
    generated = len(asked) > 1 and isinstance(asked[1], dict)  # settings of generation, where text was asked for
    said, found = (innermost(sample.get(key)) for key in ("resps", "filtered_resps"))
    keys = (metric.partition(",")[0], "exact_match", "acc")
    scores = [sample[key] for key in keys if isinstance(sample.get(key), int | float)]
    given = spoken(said, found) if generated else likelihood(said)
    texts = {"prompt": asked[0], "expected": sample.get("target", ""), "answer": given}
    return {key: shorten(text) for key, text in texts.items()} | {"score": scores[0] if scores else None}


def innermost(responses: object) -> object:
    """The first response of lm-eval's nested lists."""
    while isinstance(responses, list) and responses:
        responses = responses[0]
    return responses


def likelihood(said: object) -> object:
    """A log-likelihood in words; what is no number as it is."""
    try:
        return f"log-likelihood {short(float(said))}"
    except (TypeError, ValueError):
        return said or ""


def spoken(said: object, found: object) -> object:
    """What the model said, and what the task's filter took for its answer, where that is something else."""
    if not said or found in (None, said, ""):
        return said or found or ""
    return f"{said}\n[read as the answer: {found}]"


def shorten(text: object) -> str:
    """Text from a model or a data set, made visible, its middle left out with a note where it is long."""
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    if (left_out := len(text) - SAMPLE_CHARACTERS) > 0:
        half = SAMPLE_CHARACTERS // 2
        text = f"{text[:half]}\n[… {left_out:,} characters left out …]\n{text[-half:]}"
    return visible(text, "\n\t")


def draw(record: dict) -> list[dict]:
    """Each figure as SVG, wide and for a phone; one that cannot be drawn is named as missing."""
    trained = [artifact for artifact in record["artifacts"] if "history" in artifact]
    drawn = []
    points = [
        point | {"experiment": artifact["experiment"]} | named(point, artifact, record["artifacts"])
        for artifact in record["artifacts"]
        for point in artifact.get("frontier", [])
        if point["series"] != "base"  # so far from the SFT policy that nothing else could be told apart
    ]
    curves = [
        {"experiment": artifact["experiment"], "policy": artifact["stage"].partition("/")[2], "parts": parts}
        for artifact in record["artifacts"]
        if (parts := artifact.get("positions"))
    ]
    for figure in figures.figures(record["rows"], trained, points, curves):
        try:
            drawn.append(figure | {"wide": figure["draw"](figures.WIDE), "narrow": figure["draw"](1)})
        except Exception as error:  # whatever matplotlib makes of odd numbers must not cost the table
            piece = {"name": f"figures/{figure['name']}.svg", "users": [], "log": ""}
            record["missing"].append(piece | {"reason": f"cannot be drawn: {visible(error)}"})
    return drawn


def named(point: dict, artifact: dict, artifacts: list[dict]) -> dict:
    """A point of DPO on the frontier is called after its beta."""
    made = [a["summary"].get("beta") for a in artifacts if a["name"] == artifact["policy"] and "summary" in a]
    return {"label": f"beta {short(made[0])}"} if point["series"] == "dpo" and made else {}


def page(campaign: dict, record: dict, drawn: list[dict]) -> str:
    """index.html: one page that needs nothing else; autoescape stands between it and what models wrote."""
    from jinja2 import Environment, FileSystemLoader

    folder = FileSystemLoader(Path(__file__).parents[1] / "templates")
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests["match"] = lambda text, pattern: re.match(pattern, text) is not None
    environment.filters |= {"short": short, "themed": figures.themed, "quote": shlex.quote}
    experiments = {experiment["name"]: experiment for experiment in records.clean(campaign["experiments"])}
    for artifact in record["artifacts"]:  # a parent that owns an artifact need not be in the campaign itself
        experiments.setdefault(artifact["experiment"], {"name": artifact["experiment"], "outside": True})
    return environment.get_template("report.html.j2").render(
        record,
        side=side_by_side(record["artifacts"]),
        seeds=records.seeds(record["rows"]),
        title=visible(campaign["title"]),
        again=lambda target: again(target, campaign.get("configfile", "")),
        experiments=list(experiments.values()),
        figures=drawn,
    )


def again(target: str, configfile: str) -> str:
    """The command that makes an artifact, or without one everything, of this campaign. The target comes first:
    Snakemake takes all that follows `--configfile` for files of the config."""
    if not target and not configfile:
        return "make run"
    words = ["snakemake", "--cores", "2", *([target] if target else [])]
    return shlex.join([*words, *(["--configfile", configfile] if configfile else [])])


ANSWERS = ("gold_reward", "reward", "win_rate", "kl_to_sft", "length", "eos_rate", "distinct_2", "distinct_answers")


def side_by_side(artifacts: list[dict]) -> dict:
    """One line for each policy that was compared: task accuracy (the benchmark's first row) and its own answers."""
    judged = {(a["stage"].partition("/")[0], a["policy"]): a["rows"] for a in artifacts if "rows" in a}
    lines = []
    for artifact in artifacts:
        if artifact["stage"].startswith("compare/"):
            cells = {row["metric"]: row for row in artifact["rows"]}
            benchmark = next(iter(judged.get(("evaluate", artifact["policy"]), [])), None)
            name = f"{artifact['experiment']} · {artifact['stage'].partition('/')[2]}"
            lines.append({"name": name, "benchmark": benchmark, "cells": [cells.get(key) for key in ANSWERS]})
    first = next((line["benchmark"] for line in lines if line["benchmark"]), None)
    title = f"{first['task']} {first['metric']}" if first else "benchmark"
    return {"columns": [title, *(key.replace("_", " ") for key in ANSWERS)], "lines": lines}


def partial_note(missing: list[dict]) -> str:
    """A line under the table that says what it lacks; nothing under a complete one."""
    names = ", ".join(piece["name"].replace("<", "&lt;") for piece in missing)
    return f"\n**PARTIAL**, missing: {names}\n" if missing else ""


def publish(output: Path, files: dict[str, bytes], complete: bool) -> None:
    """Put the files in place by rename; a complete report gets its manifest, last, a partial one has none."""
    (output / "figures").mkdir(parents=True, exist_ok=True)
    (output / "manifest.json").unlink(missing_ok=True)
    for name, content in files.items():
        beside = (output / name).with_name(f".{Path(name).name}.new")
        beside.write_bytes(content)
        os.replace(beside, output / name)
    for old in (output / "figures").iterdir():
        if f"figures/{old.name}" not in files:
            old.unlink()
    if complete:
        write_json(output / "manifest.json", manifest_of(output, sorted(files)))
