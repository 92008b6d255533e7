"""The drawings of the report's figures: each function takes records and returns a matplotlib figure.

columns: number of panels in a row; 1 for the width of a phone. matplotlib is imported when something is drawn.
"""

import math
import re

from posttrain.maths.intervals import wilson
from posttrain.reporting.text import short

INK, WARN = "#24292f", "#c4432b"
COLOURS = {"base": "#8c959f", "sft": "#3b82c4", "reward": "#a371d9", "ppo": "#d9822b", "grpo": "#b5495b",
           "dpo": "#3f9d63", "longctx": "#c2589a", "best of n": "#57606a"}  # fmt: skip
OTHERS = ("#9a6dd0", "#7d5ba6", "#3a9ea5", "#a58b2c")
LINES = ("#57606a", "#3b82c4", "#d9822b", "#3f9d63", "#c2589a", "#8c6d1f", "#7a5cc9", "#3a9ea5", "#c4432b", "#9aa3ad")
LINE = {"markersize": 3.5, "linewidth": 1.2, "elinewidth": 0.7}
HEALTH = {
    "reward": "reward", "gold_reward": "gold reward", "kl": "KL, nats an answer", "entropy": "entropy, nats a token",
    "clip_fraction": "clip fraction", "explained_variance": "explained variance", "eos_rate": "EOS rate",
    "length": "tokens an answer", "value_loss": "value loss", "policy_grad_norm": "policy gradient norm",
    "equal_groups": "groups of equal rewards",
}  # fmt: skip
SAMPLED = ("ppo", "grpo")
JOINED = (*SAMPLED, "best of n")  # series of the frontier whose points belong to one run and are joined

LONG_TEXT = re.compile(r"long_text_(\d+)")
PASSKEY = re.compile(r"(landmark_)?passkey_(\d+)_depth_(\d+)")


def sheet(panels: int, columns: int, height: float, width: float = 10) -> tuple:
    """(figure, axes) of panels. height: of a panel, in inches; width: of the figure, in inches, but for a phone."""
    from matplotlib.figure import Figure

    lines = math.ceil(panels / columns)
    figure = Figure((width if columns > 1 else 4.2, lines * (height + 0.55) + 0.15))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.07)  # inches around each panel
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure, axes[:panels]


def benchmark(bars: list[dict], columns: int):
    """A panel per task with a bar per policy, its error and its value; a value that is not finite is text only."""
    labels, tasks = (list(dict.fromkeys(bar[key] for bar in bars)) for key in ("label", "task"))
    figure, axes = sheet(len(tasks), columns, height=0.1 + 0.19 * len(labels))
    finite = [bar for bar in bars if math.isfinite(bar["value"])]
    reach = max([abs(bar["value"]) + error(bar) for bar in finite], default=1) or 1
    low = min([bar["value"] - error(bar) for bar in finite] + [0])
    for place, (axis, task) in enumerate(zip(axes, tasks, strict=True)):
        of_task = [bar for bar in bars if bar["task"] == task]
        for bar in of_task:
            draw_bar(axis, bar, labels.index(bar["label"]), reach)
        weight = "bold" if any(bar["group"] for bar in of_task) else "normal"
        axis.set_title(cut(task, 40), fontweight=weight)
        axis.set(xlim=(min(low * 1.2, 0), reach * 1.18), ylim=(len(labels) - 0.4, -0.6))
        axis.set_yticks(range(len(labels)), [cut(x, 30) for x in labels] if place % columns == 0 else [])
        axis.grid(axis="x")
        axis.spines["bottom"].set_visible(False)
    return figure


def draw_bar(axis, bar: dict, y: int, reach: float) -> None:
    """Draw one bar, its error, and its value to the right of both."""
    if not math.isfinite(bar["value"]):
        axis.text(reach * 0.01, y, short(bar["value"]), va="center", color=WARN)
        return
    axis.barh(y, bar["value"], height=0.68, color=colour(bar["policy"]))
    if error(bar):
        axis.errorbar(bar["value"], y, xerr=error(bar), color=INK, elinewidth=0.9, capsize=2, capthick=0.9)
    edge = max(bar["value"], 0) + error(bar) + reach * 0.015
    axis.text(edge, y, short(bar["value"]), va="center", fontsize=7.5, alpha=0.75)


def error(bar: dict) -> float:
    """Half the length of a bar's error; 0 without a finite error."""
    return bar["error"] if bar["error"] is not None and math.isfinite(bar["error"]) else 0


def training(trained: list[dict], columns: int):
    """A panel per trained artifact with loss against step; a cross at the bottom marks a step without a finite loss."""
    figure, axes = sheet(len(trained), columns, height=1.35)
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
        axis.set_title(cut(f"{artifact['experiment']} · {artifact['stage']}", 40))
        axis.grid()
        axis.locator_params(nbins=5)
    return figure


def reward_kl(points: list[dict], columns: int):
    """Two panels with gold reward and reward against KL; points of one run of PPO or GRPO, and of best-of-n, are
    joined."""
    kinds = [key for key in ("gold_reward", "reward") if any(point.get(key) is not None for point in points)]
    figure, axes = sheet(len(kinds), min(columns, len(kinds)), height=3.0)
    for axis, kind in zip(axes, kinds, strict=True):
        series: dict[tuple, list[dict]] = {}
        for point in points:
            if point.get(kind) is not None and math.isfinite(point["kl"]):
                run = point["experiment"] if point["series"] in JOINED else ""
                series.setdefault((run, point["series"]), []).append(point)
        several = sum(name in SAMPLED for _, name in series) > 1
        for (run, name), line in series.items():
            label = f"{run} · {name}" if name in SAMPLED else name
            draw_frontier(axis, line, kind, label, colour(label if several and name in SAMPLED else name))
        axis.set_xlabel("KL to SFT, nats an answer")
        axis.set_title({"gold_reward": "gold reward", "reward": "reward"}[kind])
        axis.grid()
    axes[-1].legend(loc="lower right")
    return figure


def draw_frontier(axis, points: list[dict], kind: str, label: str, tint: str) -> None:
    """Draw one series of the frontier, joined where its points belong to one run; the legend has each label once."""
    points = sorted(points, key=lambda point: point["kl"])
    style = "-o" if points[0]["series"] in JOINED else "o"
    for point in points if style == "o" else ():
        if "beta" in point:
            place = (point["kl"], point[kind])
            axis.annotate(point["beta"], place, (4, -9), textcoords="offset points", fontsize=7)
    errors = {"yerr": [point[f"{kind}_stderr"] or 0 for point in points]}
    errors["xerr"] = [point.get("kl_stderr") or 0 for point in points]
    x, y = ([point[key] for point in points] for key in ("kl", kind))
    in_legend = cut(label, 34) in axis.get_legend_handles_labels()[1]
    axis.errorbar(x, y, **errors, fmt=style, color=tint, label=None if in_legend else cut(label, 34), **LINE)


def reliability(judged: list[dict], columns: int):
    """A panel per reward model with accuracy against confidence."""
    figure, axes = sheet(len(judged), columns, height=1.8)
    for axis, artifact in zip(axes, judged, strict=True):
        axis.plot([0, 1], [0, 1], color=INK, alpha=0.3, linewidth=0.8)
        x, y = ([part[key] for part in artifact["bins"]] for key in ("confidence", "accuracy"))
        axis.plot(x, y, "-o", color=colour("reward"), markersize=3.5, linewidth=1.2)
        axis.set_title(cut(artifact["experiment"], 40))
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
    axes[0].set_ylabel("accuracy")
    return figure


def health(history: list[dict], columns: int):
    """A panel for each health figure of PPO or GRPO, against the iteration."""
    keys = [key for key in HEALTH if any(key in point for point in history)]
    figure, axes = sheet(len(keys), columns, height=1.0)
    for place, (axis, key) in enumerate(zip(axes, keys, strict=True)):
        line = [(point["step"], point[key]) for point in history if key in point and math.isfinite(point[key])]
        axis.plot(*zip(*line, strict=True), color=colour("ppo"), linewidth=1.2)
        axis.set_title(HEALTH[key])
        axis.set_xlabel("iteration" if place >= len(keys) - columns else "")
        axis.grid()
        axis.locator_params(nbins=4)
    return figure


def by_length(rows: list[dict], columns: int):
    """Perplexity against length, both logarithmic, a line for each policy."""
    figure, (axis,) = sheet(1, 1, height=3.2)
    lines: dict[str, list[tuple]] = {}
    for row in rows:
        point = (int(LONG_TEXT.findall(row["task"])[0]), row["value"], row["stderr"] or 0)
        lines.setdefault(f"{row['experiment']} · {row['policy']}", []).append(point)
    for place, (label, points) in enumerate(lines.items()):
        finite = sorted(point for point in points if math.isfinite(point[1]))
        x, y, errors = zip(*finite, strict=True) if finite else ([], [], [])
        axis.errorbar(x, y, yerr=errors, fmt="-o", color=LINES[place % len(LINES)], label=cut(label, 40), **LINE)
    lengths = sorted({length for points in lines.values() for length, _, _ in points})
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="perplexity")
    axis.set_xticks(lengths, [str(length) for length in lengths], minor=False)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return with_key(figure, axis, columns)


def by_position(curves: list[dict], columns: int):
    """Loss against position, a line for each policy."""
    figure, (axis,) = sheet(1, 1, height=3.2)
    for place, curve in enumerate(curves):
        x = [(part["from"] + part["to"]) / 2 for part in curve["parts"]]
        y, errors = ([part[key] or 0 for part in curve["parts"]] for key in ("loss", "stderr"))
        label = cut(f"{curve['experiment']} · {curve['policy']}", 40)
        axis.errorbar(x, y, yerr=errors, fmt="-o", color=LINES[place % len(LINES)], label=label, **LINE)
    axis.set(xlabel="position in the window", ylabel="loss, nats a token")
    return with_key(figure, axis, columns)


def lengths(histograms: list[dict], columns: int):
    """A panel for each task of prepared data, with a bar for each class of lengths."""
    figure, axes = sheet(len(histograms), columns, height=1.6)
    for axis, histogram in zip(axes, histograms, strict=True):
        bounds, rows = zip(*histogram["bars"], strict=True)
        axis.bar(range(len(rows)), rows, width=0.9, color=LINES[1])
        axis.set_xticks(range(len(rows)), [short(bound) for bound in bounds], fontsize=7)
        axis.set_title(cut(f"{histogram['data']} · {histogram['task']}", 40))
        axis.set(xlabel="tokens, at most", ylabel="rows")
    return figure


def with_key(figure, axis, columns: int):
    """The figure with a grid, and its legend to the right, or above on a phone, where it hides no line."""
    axis.grid()
    if columns > 1:
        figure.set_figwidth(8)
        figure.legend(loc="outside right center")
    else:
        figure.set_figheight(3.2 + 0.16 * len(axis.get_legend_handles_labels()[1]))
        figure.legend(loc="outside upper left")
    return figure


def passkey_map(rows: list[dict], columns: int):
    """A panel for each policy: lengths across, depths down. A cell has its share and interval, and is darker for a
    larger share."""
    from matplotlib.patches import Rectangle

    maps: dict[str, dict[tuple[int, int], dict]] = {}
    for row in rows:
        kind, length, depth = PASSKEY.findall(row["task"])[0]
        label = f"{row['experiment']} · {row['policy']}" + (" · numbers" if kind else "")
        maps.setdefault(label, {})[int(length), int(depth)] = row
    lengths, depths = (sorted({key[n] for cells in maps.values() for key in cells}) for n in (0, 1))
    figure, axes = sheet(len(maps), columns, height=0.3 + 0.24 * len(depths))
    for place, (axis, (label, cells)) in enumerate(zip(axes, maps.items(), strict=True)):
        for (length, depth), row in cells.items():
            x, y, share = lengths.index(length), depths.index(depth), row["value"]
            shade = {"color": COLOURS["sft"], "alpha": 0.06 + 0.94 * share, "linewidth": 0}
            axis.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, **shade))
            low, high = wilson(share, row["n"]) if row["n"] else (math.nan, math.nan)
            text = f"{share:.2f}  [{low:.2f}, {high:.2f}]"
            axis.text(x, y, text, ha="center", va="center", fontsize=6.5, color="#ffffff" if share > 0.5 else INK)
        axis.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(len(depths) - 0.5, -0.5))
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths] if place % columns == 0 else [])
        axis.set_title(cut(label, 40))
    return figure


def colour(policy: str) -> str:
    """A policy's colour, the same in all figures; a policy without a set colour gets one by its name."""
    return COLOURS.get(policy) or OTHERS[sum(policy.encode()) % len(OTHERS)]


def cut(text: str, length: int) -> str:
    """A label of at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"
