"""The last lines of a run: headline figures on a terminal, one line for each policy; the rest is in the report.

posttrain summary
"""

import itertools
import re
from collections import Counter
from pathlib import Path

from posttrain.ground.files import sha256
from posttrain.ground.identity import record_of
from posttrain.reporting.text import short

WIDTH = 100
OF_ANSWERS = ("gold_reward", "win_rate")  # headline metrics of `compare`
INSTEAD = {"gold_reward": "reward"}  # metric -> the metric that replaces it where it was not measured


def text(rows: list[dict], missing: list[dict], width: int = WIDTH) -> str:
    """A table of at most `width` characters, the number of further figures and, for a partial report, what is missing.

    rows: of the result table, with `judge`, `group` and `member`. Names are never cut: columns that do not fit are left
    out, and experiments' names that take over half of the width get lines of their own. Only a name longer than `width`
    makes a longer line.
    """
    lines = table_lines(rows, width) if rows else ["Nothing was measured."]
    if missing:
        names = [piece["name"] for piece in missing]
        lines.append(f"PARTIAL: {len(names)} missing:")
        lines += [f"  {name}" for name in names[:5]] + [f"  and {len(names) - 5} more"] * (len(names) > 5)
    return "\n".join(lines) + "\n"


def table_lines(rows: list[dict], width: int) -> list[str]:
    """The table's lines, with the number of figures that it leaves out in the last one."""
    experiments = list(dict.fromkeys(row["experiment"] for row in rows))
    pairs = dict.fromkeys((row["experiment"], row["policy"]) for row in rows)
    policies = sorted(pairs, key=lambda policy: experiments.index(policy[0]))
    room = max(map(len, [*experiments, "experiment"]))
    nested = room > width // 2
    names = ["policy" if nested else f"{'experiment':{room}}  policy", ""]
    names += [f"  {policy}" if nested else f"{experiment:{room}}  {policy}" for experiment, policy in policies]
    columns = columns_that_fit(rows, policies, width - max(map(len, names)))
    head, metrics, *lines = ["  ".join(line).rstrip() for line in zip(padded(names), *columns.values(), strict=True)]
    if nested:
        grouped = itertools.groupby(zip(policies, lines, strict=True), key=lambda pair: pair[0][0])
        lines = [line for experiment, group in grouped for line in (experiment, *(text for _, text in group))]
    more = sum((row["task"], row["metric"]) not in columns for row in rows)
    further = f" {more:,} more figures are in the report." if more else ""
    return [head, metrics, *lines, f"Value ± standard error.{further}"]


def columns_that_fit(rows: list[dict], policies: list[tuple], room: int) -> dict[tuple[str, str], list[str]]:
    """(task, metric) -> the lines of its column, of equal width: one column of each judge in turn, as long as they fit.

    The first column is always included.
    """
    by_judge = headlines(rows)
    chosen: dict[tuple[str, str], list[str]] = {}
    for turn in itertools.zip_longest(*by_judge):
        for column in filter(None, turn):
            lines = column_lines(rows, policies, *column)
            if not chosen or len(lines[0]) + 2 <= room:
                room -= len(lines[0]) + 2
                chosen[column] = lines
    return {column: chosen[column] for of_judge in by_judge for column in of_judge if column in chosen}


def headlines(rows: list[dict]) -> list[list[tuple[str, str]]]:
    """(task, metric) of the headline figures, one list for each judge, sorted by falling number of policies.

    A task's headline is its first metric. A group of tasks has the group's own figure only. Of tasks whose names differ
    in numbers only (`passkey_64`, `passkey_256`), the one with the largest numbers is included.
    """
    policies = Counter((row["judge"], row["task"], row["metric"]) for row in rows)
    largest: dict[tuple[str, str], list[int]] = {}
    for judge, task, _ in policies:
        series, figures = number_of(task)
        largest[judge, series] = max(largest.get((judge, series), []), figures)
    members = {row["task"] for row in rows if row["member"]}
    chosen = []
    for judge in dict.fromkeys(row["judge"] for row in rows):
        columns: dict[str, tuple[str, str]] = {}
        for of, task, metric in policies:
            series, figures = number_of(task)
            if of == judge and task not in members and largest[judge, series] == figures:
                columns.setdefault(f"{task} {metric}" if judge == "compare" else task, (task, metric))
        if judge == "compare":
            measured = {metric for _, metric in columns.values()}
            wanted = [key if key in measured else INSTEAD.get(key) for key in OF_ANSWERS]
            columns = {key: column for key, column in columns.items() if column[1] in wanted}
        chosen.append(sorted(columns.values(), key=lambda column: -policies[judge, *column]))
    return chosen


def number_of(task: str) -> tuple[str, list[int]]:
    """A task's name without its numbers, and the numbers."""
    return re.sub(r"\d+", "#", task), [int(figure) for figure in re.findall(r"\d+", task)]


def column_lines(rows: list[dict], policies: list[tuple], task: str, metric: str) -> list[str]:
    """The lines of a column: task, metric, and each policy's value ± standard error, aligned at the signs."""
    cells = {(row["experiment"], row["policy"]): row for row in rows if (row["task"], row["metric"]) == (task, metric)}
    values = padded([short(cells[policy]["value"]) if policy in cells else "" for policy in policies], right=True)
    stderrs = [cells[policy]["stderr"] if policy in cells else None for policy in policies]
    errors = padded(["" if stderr is None else f" ±{short(stderr)}" for stderr in stderrs])
    figures = [value + error for value, error in zip(values, errors, strict=True)]
    return padded([task, metric, *figures], right=True)


def padded(texts: list[str], right: bool = False) -> list[str]:
    """The texts padded with spaces to equal length."""
    width = max(map(len, texts), default=0)
    return [f"{text:>{width}}" if right else f"{text:{width}}" for text in texts]


def last_lines(folder: Path) -> str:
    """The summary table of a report, and the path of its page."""
    return f"{(folder / 'summary.txt').read_text(encoding='utf-8')}report: {folder / 'index.html'}"


def last_lines_of_run(artifacts: list[str], folder: Path, campaign: str, lineage: str, shown: int = 5) -> str:
    """The last lines of a run: those of its report where it made one, else what it made, and the reason why the report
    in `folder` shows other numbers.

    artifacts: names of those that it made, of which at most `shown` are listed. campaign, lineage: as of `outdated`.
    """
    reason = outdated(folder, campaign, lineage)
    if folder.name in artifacts and not reason:
        return last_lines(folder)
    more = f" and {len(artifacts) - shown:,} more" if len(artifacts) > shown else ""
    listed = f"made: {', '.join(artifacts[:shown])}{more}" if artifacts else "nothing was made"
    return f"{listed}\n{folder}: {reason or 'is older than this run; run snakemake without a target'}"


def outdated(folder: Path, campaign: str, lineage: str) -> str:
    """The reason why the report in a folder is not that of a plan; "" where it is.

    campaign: the file that names the plan's artifacts; lineage: digest of everything that the plan's report depends on.
    The report of other settings or code, or of artifacts that were remade since, shows other numbers.
    """
    if not (folder / "summary.txt").is_file():
        return "there is no report; run snakemake"
    record = record_of(folder)
    if record.get("params", [])[::2] != [campaign, lineage]:
        return "is another campaign's, or the settings or the code have changed since it was made; run snakemake"
    evaluations = record["inputs"].get("evaluations", {})
    other = [file for file, digest in evaluations.items() if not Path(file).is_file() or sha256(Path(file)) != digest]
    return f"was made from another {other[0]}; run snakemake" if other else ""
