"""The report's figures as SVG text: the same input gives the same bytes, on any machine.

Text stays text (small files, searchable, themed by the page) and is laid out by DejaVu Sans, which matplotlib
brings along. matplotlib is imported when something is drawn, not before: it costs a second.
"""

import io
import math
import re
import warnings
from collections.abc import Callable

from posttrain.maths.intervals import over_seeds, wilson
from posttrain.reporting.records import short

INK, PAPER, WARN = "#24292f", "#ffffff", "#c4432b"
COLOURS = {"base": "#8c959f", "sft": "#3b82c4", "reward": "#a371d9", "ppo": "#d9822b", "dpo": "#3f9d63",
           "longctx": "#c2589a", "best of n": "#57606a"}  # fmt: skip
OTHERS = ("#9a6dd0", "#b5495b", "#3a9ea5", "#a58b2c")
LINES = ("#57606a", "#3b82c4", "#d9822b", "#3f9d63", "#c2589a", "#8c6d1f", "#7a5cc9", "#3a9ea5", "#c4432b", "#9aa3ad")
WIDE = 3


HEALTH = {
    "reward": "reward", "gold_reward": "gold reward", "kl": "KL, nats an answer", "entropy": "entropy, nats a token",
    "clip_fraction": "clip fraction", "explained_variance": "explained variance", "eos_rate": "EOS rate",
    "length": "tokens an answer", "value_loss": "value loss", "policy_grad_norm": "policy gradient norm",
}  # fmt: skip
LINE = {"markersize": 3.5, "linewidth": 1.2, "elinewidth": 0.7}
SHOWN_OF_ANSWERS = ("gold_reward", "win_rate")  # the other metrics of `compare` stand in the table


LONG_TEXT = re.compile(r"long_text_(\d+)")
PASSKEY = re.compile(r"passkey_(\d+)_depth_(\d+)")


def figures(rows: list[dict], trained: list[dict], frontier: list[dict] = (), positions: list[dict] = ()) -> list[dict]:
    """What can be drawn, each as name, title, caption and `draw(columns)`; nothing is drawn yet."""
    found = []
    shown = [row for row in rows if row.get("judge") != "compare" or row["metric"] in SHOWN_OF_ANSWERS]
    shown = [row for row in shown if not LONG_TEXT.fullmatch(row["task"]) and not PASSKEY.fullmatch(row["task"])]
    for number, (metric, group) in enumerate(task_groups(bars(shown))):
        title = metric + {True: ", higher is better", False: ", lower is better"}.get(group[0]["higher"], "")
        slug = re.sub(r"\W+", "-", metric)[:40]
        name = f"benchmark-{slug}"
        if any(figure["name"] == name for figure in found):
            name += f"-{number + 1}"
        drawn = {"caption": error_caption(group), "draw": drawer(benchmark, group, name)}
        found.append({"name": name, "title": title} | drawn)
    if frontier:
        caption = (
            "Mean reward of answers to held-out prompts against KL to the SFT policy, ± 1 standard error over prompts: "
            "snapshots of PPO, joined in the order of their KL, DPO by its beta, and best of n from the SFT policy "
            "(its KL from the formula). "
            "Left gold, right learned: where the right rises and the left falls, the reward is over-optimised."
        )
        drawn = {"caption": caption, "draw": drawer(reward_kl, list(frontier), "frontier")}
        found.append({"name": "frontier", "title": "Reward against KL"} | drawn)
    found += long_figures(rows, list(positions))
    if judged := [artifact for artifact in trained if artifact.get("bins")]:
        caption = (
            "Share of pairs in which the reward model is right, by its confidence; the line is perfect calibration."
        )
        drawn = {"caption": caption, "draw": drawer(reliability, judged, "reliability")}
        found.append({"name": "reliability", "title": "Calibration of reward models"} | drawn)
    for artifact in trained:
        if artifact["stage"] == "ppo" and artifact["history"]:
            name = f"ppo-{artifact['experiment']}"
            drawn = {"caption": "Every iteration's health.", "draw": drawer(health, artifact["history"], name)}
            found.append({"name": name, "title": f"PPO of {artifact['experiment']}"} | drawn)
    curves = [artifact for artifact in trained if any("loss" in point for point in artifact["history"])]
    if curves:
        caption = "Loss at each logged step; dots are the loss on held-out rows, where it was measured."
        drawn = {"caption": caption, "draw": drawer(training, curves, "training-curves")}
        found.append({"name": "training-curves", "title": "Training curves"} | drawn)
    return found


def long_figures(rows: list[dict], positions: list[dict]) -> list[dict]:
    """Perplexity by length, loss by position and the passkey map, as far as they were measured."""
    found = []
    if texts := [row for row in rows if LONG_TEXT.fullmatch(row["task"])]:
        caption = "Perplexity on held-out documents with long dependence, ± 1 standard error over documents."
        drawn = {"caption": caption, "draw": drawer(by_length, texts, "long-perplexity")}
        found.append({"name": "long-perplexity", "title": "Perplexity by length"} | drawn)
    if positions:
        caption = "Loss of a token by where it stands in the longest window, ± 1 standard error over documents."
        drawn = {"caption": caption, "draw": drawer(by_position, positions, "long-positions")}
        found.append({"name": "long-positions", "title": "Loss by position"} | drawn)
    if keys := [row for row in rows if PASSKEY.fullmatch(row["task"])]:
        caption = "Share of pass words that are told, by length of the text and depth of the statement in it, with the "
        caption += "95 % Wilson interval."
        drawn = {"caption": caption, "draw": drawer(passkey_map, keys, "long-passkey")}
        found.append({"name": "long-passkey", "title": "Passkey retrieval"} | drawn)
    return found


def bars(rows: list[dict]) -> list[dict]:
    """Rows as bars: cells that differ in their seed only become one, with mean and deviation over seeds."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        family = row.get("family", row["experiment"])
        cells.setdefault((f"{family} · {row['policy']}", row["metric"], row["task"]), []).append(row)
    made = []
    for (label, _, _), cell in cells.items():
        value, deviation = over_seeds(row["value"] for row in cell)
        error = cell[0]["stderr"] if len(cell) == 1 else deviation
        made.append(cell[0] | {"label": label, "value": value, "error": error, "seeds": len(cell)})
    return made


def task_groups(made: list[dict]) -> list[tuple[str, list[dict]]]:
    """Bars that belong into one figure: one metric, over tasks that the same policies were asked."""
    asked: dict[tuple, list[str]] = {}
    for bar in made:
        asked.setdefault((bar["metric"], bar["task"]), []).append(bar["label"])
    groups: dict[tuple, list[dict]] = {}
    for bar in made:
        groups.setdefault((bar["metric"], *asked[bar["metric"], bar["task"]]), []).append(bar)
    return [(metric, group) for (metric, *_), group in groups.items()]


def error_caption(group: list[dict]) -> str:
    """What the error bars are, over what, and of how many."""
    said = []
    if questions := sorted({bar["n"] or 0 for bar in group if bar["seeds"] == 1}):
        many = f"{questions[0]}" if len(questions) == 1 else f"{questions[0]} to {questions[-1]}"
        said.append(f"± 1 standard error over n = {many} questions; one seed")
    if seeds := sorted({bar["seeds"] for bar in group if bar["seeds"] > 1}):
        said.append(f"± 1 standard deviation over {' or '.join(map(str, seeds))} seeds")
    lacking = any(bar["error"] is None for bar in group)
    return f"Error bars: {', and '.join(said)}." + (" No bar where no error was reported." if lacking else "")


def drawer(draw: Callable, data: list[dict], name: str) -> Callable[[int], str]:
    """`draw(data)` on a sheet of panels in so many columns, as SVG text."""

    def drawn(columns: int) -> str:
        import matplotlib

        rc = {"svg.fonttype": "none", "svg.hashsalt": f"{name}-{columns}", "text.parse_math": False,
              "font.family": "DejaVu Sans", "font.size": 8.5, "axes.titlesize": 9, "text.color": INK,
              "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
              "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}  # fmt: skip
        file = io.StringIO()
        with matplotlib.rc_context(rc), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name in a script that DejaVu lacks: the viewer has the font
            figure = draw(data, columns)
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(file, format="svg", facecolor=PAPER, metadata=nothing)
        return file.getvalue()

    return drawn


def sheet(panels: int, columns: int, height: float, left: float, gap: float) -> tuple:
    """A figure of panels so many inches high, ten inches wide or as wide as a phone.

    Laid out by hand: matplotlib's own layouts draw everything three times.
    """
    from matplotlib.figure import Figure

    lines, width = math.ceil(panels / columns), 10 if columns > 1 else 4.2
    tall = lines * (height + 0.55) + 0.15
    figure = Figure((width, tall))
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    edges = {"left": left / width, "right": 1 - 0.1 / width, "top": 1 - 0.25 / tall, "bottom": 0.45 / tall}
    figure.subplots_adjust(**edges, hspace=0.55 / height, wspace=gap * columns / (width - left))
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure, axes[:panels]


def colour(policy: str) -> str:
    """A policy keeps its colour through all figures; one that is new here gets one by its name."""
    return COLOURS.get(policy) or OTHERS[sum(policy.encode()) % len(OTHERS)]


def benchmark(group: list[dict], columns: int):
    """A panel per task, a bar per policy with its error and value; what is not finite is said instead."""
    labels, tasks = (list(dict.fromkeys(bar[key] for bar in group)) for key in ("label", "task"))
    room = 0.15 + 0.067 * len(cut(max(labels, key=len), 30))
    figure, axes = sheet(len(tasks), columns, height=0.1 + 0.19 * len(labels), left=room, gap=0.25)
    reach = max([abs(b["value"]) + error(b) for b in group if math.isfinite(b["value"])], default=1) or 1
    low = min([b["value"] - error(b) for b in group if math.isfinite(b["value"])] + [0])
    for place, (axis, task) in enumerate(zip(axes, tasks, strict=True)):
        for bar in (bar for bar in group if bar["task"] == task):
            draw_bar(axis, bar, labels.index(bar["label"]), reach)
        axis.set_title(cut(task, 40), loc="left", fontweight="bold" if group_row(group, task) else "normal")
        axis.set(xlim=(min(low * 1.2, 0), reach * 1.18), ylim=(len(labels) - 0.4, -0.6))
        axis.set_yticks(range(len(labels)), [cut(x, 30) for x in labels] if place % columns == 0 else [])
        axis.tick_params(length=0)
        axis.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines["bottom"].set_visible(False)
    return figure


def draw_bar(axis, bar: dict, y: int, reach: float) -> None:
    """One bar, its error, and its value behind both."""
    if not math.isfinite(bar["value"]):
        axis.text(reach * 0.01, y, short(bar["value"]), va="center", color=WARN)
        return
    axis.barh(y, bar["value"], height=0.68, color=colour(bar["policy"]))
    if error(bar):
        axis.errorbar(bar["value"], y, xerr=error(bar), color=INK, elinewidth=0.9, capsize=2, capthick=0.9)
    edge = max(bar["value"], 0) + error(bar) + reach * 0.015
    axis.text(edge, y, short(bar["value"]), va="center", fontsize=7.5, alpha=0.75)


def error(bar: dict) -> float:
    """The half length of a bar's error, nought where there is none that can be drawn."""
    return bar["error"] if bar["error"] is not None and math.isfinite(bar["error"]) else 0


def group_row(group: list[dict], task: str) -> bool:
    """Is this lm-eval's aggregate over a group, and not one task of it?"""
    return any(bar["group"] for bar in group if bar["task"] == task)


def training(trained: list[dict], columns: int):
    """A panel per trained artifact: loss against step; a step without a finite loss is a cross below."""
    figure, axes = sheet(len(trained), columns, height=1.35, left=0.6, gap=0.45)
    for place, (axis, artifact) in enumerate(zip(axes, trained, strict=True)):
        axis.set_xlabel("step" if place >= len(trained) - columns else "")
        axis.set_ylabel("" if place % columns else "loss")
        for key, style in (("loss", "-"), ("eval_loss", "o")):
            points = [(point["step"], point[key]) for point in artifact["history"] if key in point]
            finite = [(x, y) for x, y in points if math.isfinite(y)]
            x_y = zip(*finite, strict=True) if finite else ([], [])
            axis.plot(*x_y, style, color=colour(artifact["stage"]), linewidth=1.3, markersize=3.5)
            lost = [x for x, y in points if not math.isfinite(y)]
            axis.plot(lost, [0.03] * len(lost), "x", color=WARN, ms=4, transform=axis.get_xaxis_transform())
        axis.set_title(cut(f"{artifact['experiment']} · {artifact['stage']}", 40), loc="left")
        axis.grid(color=INK, alpha=0.12, linewidth=0.6)
        axis.tick_params(length=0)
        axis.locator_params(nbins=5)
    return figure


def reward_kl(points: list[dict], columns: int):
    """Gold and learned reward against KL, a panel each: snapshots of a PPO and a best-of-n joined, DPO by its beta."""
    kinds = [key for key in ("gold_reward", "reward") if any(point.get(key) is not None for point in points)]
    figure, axes = sheet(len(kinds), min(columns, len(kinds)), height=3.0, left=0.6, gap=0.5)
    for axis, kind in zip(axes, kinds, strict=True):
        series: dict[tuple, list[dict]] = {}
        for point in points:
            if point.get(kind) is not None and math.isfinite(point["kl"]):
                owner = point["experiment"] if point["series"] in ("ppo", "best of n") else ""
                series.setdefault((owner, point["series"]), []).append(point)
        several = sum(name == "ppo" for _, name in series) > 1
        for (experiment, name), line in series.items():
            line = sorted(line, key=lambda point: point["kl"])
            style = "-o" if experiment else "o"  # points of different runs make no line
            errors = {"yerr": [point[f"{kind}_stderr"] or 0 for point in line]}
            errors["xerr"] = [point.get("kl_stderr") or 0 for point in line]
            place = [[point[key] for point in line] for key in ("kl", kind)]
            label = f"{experiment} · ppo" if name == "ppo" else name
            for point in line if name == "dpo" else ():
                axis.annotate(
                    point["label"], (point["kl"], point[kind]), (4, -9), textcoords="offset points", fontsize=7
                )
            tint, drawn = colour(label if several and name == "ppo" else name), axis.get_legend_handles_labels()[1]
            known = None if label in drawn else cut(label, 34)
            axis.errorbar(*place, **errors, fmt=style, color=tint, label=known, **LINE)
        axis.set(xlabel="KL to SFT, nats an answer")
        axis.set_title({"gold_reward": "gold reward", "reward": "learned reward"}[kind], loc="left")
        axis.grid(color=INK, alpha=0.12, linewidth=0.6)
        axis.tick_params(length=0)
    axes[-1].legend(frameon=False, fontsize=7.5, loc="lower right")
    return figure


def reliability(judged: list[dict], columns: int):
    """A panel per reward model: accuracy by confidence."""
    figure, axes = sheet(len(judged), columns, height=1.8, left=0.6, gap=0.45)
    for axis, artifact in zip(axes, judged, strict=True):
        axis.plot([0, 1], [0, 1], color=INK, alpha=0.3, linewidth=0.8)
        places = [[part[key] for part in artifact["bins"]] for key in ("confidence", "accuracy")]
        axis.plot(*places, "-o", color=colour("reward"), markersize=3.5, linewidth=1.2)
        axis.set_title(cut(artifact["experiment"], 40), loc="left")
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
        axis.tick_params(length=0)
    return figure


def health(history: list[dict], columns: int):
    """A panel for each health figure of PPO, against the iteration."""
    keys = [key for key in HEALTH if any(key in point for point in history)]
    figure, axes = sheet(len(keys), columns, height=1.0, left=0.6, gap=0.45)
    for place, (axis, key) in enumerate(zip(axes, keys, strict=True)):
        line = [(point["step"], point[key]) for point in history if key in point and math.isfinite(point[key])]
        axis.plot(*zip(*line, strict=True), color=colour("ppo"), linewidth=1.2)
        axis.set_title(HEALTH[key], loc="left")
        axis.set_xlabel("iteration" if place >= len(keys) - columns else "")
        axis.grid(color=INK, alpha=0.12, linewidth=0.6)
        axis.tick_params(length=0)
        axis.locator_params(nbins=4)
    return figure


def by_length(rows: list[dict], columns: int):
    """Perplexity against length, both logarithmic, a line for each policy."""
    figure, axes = one_panel(columns)
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(f"{row['experiment']} · {row['policy']}", []).append(row)
    lengths = sorted({int(LONG_TEXT.fullmatch(row["task"]).group(1)) for row in rows})
    for place, (label, line) in enumerate(lines.items()):
        points = [(int(LONG_TEXT.fullmatch(row["task"]).group(1)), row["value"], row["stderr"] or 0) for row in line]
        x, y, errors = zip(*sorted(point for point in points if math.isfinite(point[1])), strict=True)
        axes[0].errorbar(x, y, yerr=errors, fmt="-o", color=shade(place), label=cut(label, 40), **LINE)
    axes[0].set(xscale="log", yscale="log", xlabel="tokens", ylabel="perplexity")
    axes[0].set_xticks(lengths, [str(length) for length in lengths], minor=False)
    axes[0].minorticks_off()
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    key_beside(figure, axes[0], columns)
    return figure


def by_position(curves: list[dict], columns: int):
    """Loss against position, a line for each policy."""
    figure, axes = one_panel(columns)
    for place, curve in enumerate(curves):
        x = [(part["from"] + part["to"]) / 2 for part in curve["parts"]]
        y, errors = ([part[key] or 0 for part in curve["parts"]] for key in ("loss", "stderr"))
        label = cut(f"{curve['experiment']} · {curve['policy']}", 40)
        axes[0].errorbar(x, y, yerr=errors, fmt="-o", color=shade(place), label=label, **LINE)
    axes[0].set(xlabel="position in the window", ylabel="loss, nats a token")
    key_beside(figure, axes[0], columns)
    return figure


def one_panel(columns: int) -> tuple:
    """A figure of one panel with room for a key."""
    figure, axes = sheet(1, 1, height=3.2 if columns > 1 else 2.6, left=0.6, gap=0.5)
    figure.set_figwidth(8 if columns > 1 else 4.2)
    return figure, axes


def key_beside(figure, axis, columns: int) -> None:
    """A grid, and the key beside the drawing, or above it on a phone: lines may run anywhere."""
    axis.grid(color=INK, alpha=0.12, linewidth=0.6)
    axis.tick_params(length=0)
    if columns > 1:
        figure.subplots_adjust(right=0.66)
        axis.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
        return
    lines = len(axis.get_legend_handles_labels()[1])
    figure.set_figheight(figure.get_figheight() + 0.16 * lines)
    figure.subplots_adjust(top=1 - (0.25 + 0.16 * lines) / figure.get_figheight())
    axis.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(-0.1, 1.0))


def passkey_map(rows: list[dict], columns: int):
    """A panel for each policy: lengths across, depths down; each cell with its share and interval."""
    cells: dict[str, dict[tuple[int, int], dict]] = {}
    for row in rows:
        length, depth = map(int, PASSKEY.fullmatch(row["task"]).groups())
        cells.setdefault(f"{row['experiment']} · {row['policy']}", {})[length, depth] = row
    lengths, depths = (sorted({key[n] for known in cells.values() for key in known}) for n in (0, 1))
    figure, axes = sheet(len(cells), columns, height=0.3 + 0.24 * len(depths), left=0.6, gap=0.45)
    for place, (axis, (label, known)) in enumerate(zip(axes, cells.items(), strict=True)):
        for (length, depth), row in known.items():
            x, y = lengths.index(length), depths.index(depth)
            axis.add_patch(plain_square(x, y, row["value"]))
            low, high = wilson(row["value"], row["n"]) if row["n"] else (math.nan, math.nan)
            text = f"{row['value']:.2f}  [{low:.2f}, {high:.2f}]"
            axis.text(
                x, y, text, ha="center", va="center", fontsize=6.5, color="#ffffff" if row["value"] > 0.5 else INK
            )
        axis.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(len(depths) - 0.5, -0.5))
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths] if place % columns == 0 else [])
        axis.tick_params(length=0)
        axis.set_title(cut(label, 40), loc="left")
    return figure


def plain_square(x: int, y: int, share: float):
    """A cell of a map, the darker the larger the share."""
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=COLOURS["sft"], alpha=0.06 + 0.94 * share, linewidth=0)


def shade(place: int) -> str:
    """The colour of a line among others that are told apart by their names only."""
    return LINES[place % len(LINES)]


def cut(text: str, length: int) -> str:
    """A label that leaves room for what it labels."""
    return text if len(text) <= length else text[: length - 1] + "…"


def themed(svg: str, label: str) -> str:
    """The SVG as it stands in the page: it takes the page's colours, and no name is used twice there."""
    from markupsafe import Markup, escape

    svg = svg[svg.index("<svg ") :].replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))
