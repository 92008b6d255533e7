"""The figures of the report as SVG text: equal input gives equal bytes on any machine.

Text stays text (small files, searchable, themed by the page); its layout is that of DejaVu Sans, which matplotlib
contains. matplotlib is imported only when something is drawn, as it takes a second.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

from posttrain.maths.intervals import over_seeds
from posttrain.reporting import panels
from posttrain.reporting.panels import INK, LONG_TEXT, PASSKEY
from posttrain.reporting.text import short, visible

PAPER = "#ffffff"
WIDE = 3  # columns of panels on a wide screen; on a phone there is one
COUNTED = {"compare": "prompts", "lengths": "documents"}  # what n counts for a judge; for others it counts questions
SHOWN_OF_ANSWERS = ("gold_reward", "win_rate")  # metrics of `compare` with a figure; the table has all


def draw(record: dict) -> list[dict]:
    """Each figure as SVG, wide and for a phone; a figure that cannot be drawn is added to the record's `missing`."""
    artifacts, drawn = record["artifacts"], []
    trained = [artifact for artifact in artifacts if "history" in artifact]
    points = [
        point | {"experiment": artifact["experiment"]} | beta_label(point, artifact, artifacts)
        for artifact in artifacts
        for point in artifact.get("frontier", [])
        if point["series"] != "base"  # it is so far from the SFT policy that the other points would coincide
    ]
    curves = [
        {"experiment": artifact["experiment"], "policy": artifact["stage"].partition("/")[2], "parts": parts}
        for artifact in artifacts
        if (parts := artifact.get("positions"))
    ]
    lengths = [
        bars | {"data": artifact["name"]}
        for artifact in artifacts
        if "card" in artifact
        for bars in artifact["card"]["histograms"]
    ]
    for figure in figures(record["rows"], trained, points, curves, lengths):
        try:
            drawn.append(figure | {"wide": svg(figure, WIDE), "narrow": svg(figure, 1)})
        except Exception as error:  # an error of matplotlib for odd numbers must not prevent the table
            piece = {"name": f"figures/{figure['name']}.svg", "users": [], "log": ""}
            record["missing"].append(piece | {"reason": f"cannot be drawn: {visible(error)}"})
    return drawn


def beta_label(point: dict, judgement: dict, artifacts: list[dict]) -> dict:
    """The label of a frontier's point by the policy's beta; {} for a policy without beta."""
    summaries = [a["summary"] for a in artifacts if a["name"] == judgement["policy"] and "summary" in a]
    beta = summaries[0].get("beta") if summaries else None
    return {} if beta is None else {"beta": f"beta {short(beta)}"}


def figures(
    rows: list[dict], trained: list[dict], frontier: list[dict], positions: list[dict], lengths: list[dict]
) -> list[dict]:
    """The figures that have data, each with name, title and caption; nothing is drawn yet."""
    health = [artifact for artifact in trained if any("eos_rate" in point for point in artifact["history"])]
    curves = [artifact for artifact in trained if any("loss" in point for point in artifact["history"])]
    listed = [
        *benchmark_figures(rows),
        figure("frontier", "Reward against KL",
                "Mean reward of answers to held-out prompts against KL to the SFT policy, ± 1 standard error over "
                "prompts: snapshots of PPO and GRPO, joined in the order of their KL, others by beta, and best of n "
                "from the SFT policy (its KL from the formula). Left gold, right learned or checked: where the right "
                "rises and the left falls, the reward is over-optimised.", panels.reward_kl, frontier),
        figure("long-perplexity", "Perplexity by length",
                "Perplexity on held-out documents with long dependence, ± 1 standard error over documents.",
                panels.by_length, [row for row in rows if LONG_TEXT.fullmatch(row["task"])]),
        figure("long-positions", "Loss by position",
                "Loss of a token by its position in the longest window, ± 1 standard error over documents.",
                panels.by_position, positions),
        figure("long-passkey", "Passkey retrieval",
                "Share of pass words, or numbers, that are answered, by length of the text and depth of the statement "
                "in it, with the 95 % Wilson interval.",
                panels.passkey_map, [row for row in rows if PASSKEY.fullmatch(row["task"])]),
        figure("reliability", "Calibration of reward models",
                "Share of pairs in which the reward model is right, by its confidence; the line is perfect "
                "calibration.", panels.reliability, [artifact for artifact in trained if artifact.get("bins")]),
        *(figure(f"{artifact['stage']}-{artifact['experiment']}",
                 f"{artifact['stage'].upper()} of {artifact['experiment']}", "The health of every iteration.",
                 panels.health, artifact["history"]) for artifact in health),
        figure("training-curves", "Training curves",
                "Loss at each logged step; dots are the loss on held-out rows, where it was measured.",
                panels.training, curves),
        figure("lengths", "Tokens of a row",
                "Rows of prepared data by their number of tokens, chat template included, in classes that grow with "
                "the length.", panels.lengths, lengths),
    ]  # fmt: skip
    return [one for one in listed if one["data"]]


def figure(name: str, title: str, caption: str, panel: Callable, data: list[dict]) -> dict:
    """A figure of some data, to be drawn by `panel(data, columns)`."""
    return {"name": name, "title": title, "caption": caption, "panel": panel, "data": data}


def benchmark_figures(rows: list[dict]) -> list[dict]:
    """Bar charts of the metrics that have no other figure."""
    shown = [row for row in rows if row.get("judge") != "compare" or row["metric"] in SHOWN_OF_ANSWERS]
    shown = [row for row in shown if not LONG_TEXT.fullmatch(row["task"]) and not PASSKEY.fullmatch(row["task"])]
    drawable: list[dict] = []
    for number, (metric, group) in enumerate(task_groups(bars(shown)), start=1):
        title = metric + {True: ", higher is better", False: ", lower is better"}.get(group[0]["higher"], "")
        name = "benchmark-" + re.sub(r"\W+", "-", metric)[:40]
        if any(other["name"] == name for other in drawable):
            name += f"-{number}"
        drawable.append(figure(name, title, error_caption(group), panels.benchmark, group))
    return drawable


def bars(rows: list[dict]) -> list[dict]:
    """Rows as bars. Rows that differ only in their seed become one bar, with mean and deviation over seeds."""
    same_but_seed: dict[tuple, list[dict]] = {}
    for row in rows:
        label = f"{row.get('family', row['experiment'])} · {row['policy']}"
        same_but_seed.setdefault((label, row["metric"], row["task"]), []).append(row)
    merged = []
    for (label, _, _), group in same_but_seed.items():
        value, deviation = over_seeds(row["value"] for row in group)
        error = group[0]["stderr"] if len(group) == 1 else deviation
        merged.append(group[0] | {"label": label, "value": value, "error": error, "seeds": len(group)})
    return merged


def task_groups(all_bars: list[dict]) -> list[tuple[str, list[dict]]]:
    """Bars grouped by figure: one metric, over tasks with the same policies."""
    policies: dict[tuple, list[str]] = {}
    for bar in all_bars:
        policies.setdefault((bar["metric"], bar["task"]), []).append(bar["label"])
    groups: dict[tuple, list[dict]] = {}
    for bar in all_bars:
        groups.setdefault((bar["metric"], *policies[bar["metric"], bar["task"]]), []).append(bar)
    return [(metric, group) for (metric, *_), group in groups.items()]


def error_caption(group: list[dict]) -> str:
    """The caption of error bars: their kind, what they are over, and the number of it."""
    parts = []
    if questions := sorted({bar["n"] or 0 for bar in group if bar["seeds"] == 1}):
        many = f"{questions[0]}" if len(questions) == 1 else f"{questions[0]} to {questions[-1]}"
        asked = "questions" if group[0]["metric"] in ("exact_match", "k_max") else ""
        counted = asked or COUNTED.get(group[0].get("judge", ""), "questions")
        parts.append(f"± 1 standard error over n = {many} {counted}; one seed")
    if seeds := sorted({bar["seeds"] for bar in group if bar["seeds"] > 1}):
        parts.append(f"± 1 standard deviation over {' or '.join(map(str, seeds))} seeds")
    lacking = any(bar["error"] is None for bar in group)
    return f"Error bars: {', and '.join(parts)}." + (" No bar where no error was reported." if lacking else "")


def svg(figure: dict, columns: int) -> str:
    """A figure as SVG text, with its panels in so many columns."""
    import matplotlib

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": f"{figure['name']}-{columns}", "text.parse_math": False,
                "font.family": "DejaVu Sans", "font.size": 8.5, "axes.titlesize": 9, "text.color": INK,
                "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
                "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
                "xtick.major.size": 0, "ytick.major.size": 0, "axes.titlelocation": "left",
                "grid.color": INK, "grid.alpha": 0.12, "grid.linewidth": 0.6, "axes.axisbelow": True,
                "legend.frameon": False, "legend.fontsize": 7.5}  # fmt: skip
    file = io.StringIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that DejaVu lacks: the viewer has the font
        undated = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawing = figure["panel"](figure["data"], columns)
        drawing.savefig(file, format="svg", facecolor=PAPER, metadata=undated)
    return file.getvalue()


def themed(text: str, label: str) -> str:
    """The SVG for the page: in the page's colours, and without ids, which several figures would share."""
    from markupsafe import Markup, escape

    text = text[text.index("<svg ") :].replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))
