"""Read the records of a campaign's stages: artifacts, metrics, and the rows of the result table."""

import contextlib
import json
import re
from pathlib import Path, PurePosixPath

from posttrain.ground.files import sha256
from posttrain.reporting.text import clean, number, short, visible

# Exceptions that a damaged or foreign record causes in the code below; the artifact is then reported as missing.
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


def gather(campaign: dict, results: Path, reasons: dict[str, str]) -> dict:
    """The readable records of the campaign (`artifacts`, `rows`), and the other artifacts with the reason (`missing`).

    reasons: name of an artifact to leave out -> reason.
    """
    whole: dict[str, dict] = {}
    missing: list[dict] = []
    for artifact in list_artifacts(campaign, results):
        try:
            if artifact["name"] in reasons:
                raise ValueError(visible(reasons[artifact["name"]]))
            whole[artifact["name"]] = read_artifact(artifact, whole)
        except BROKEN as error:
            log = results / "logs" / artifact["path"].relative_to(results).with_suffix(".log")
            missing.append({"name": artifact["name"], "users": artifact["users"]} | explain(error, log))
    families = {entry["name"]: entry["family"] for entry in campaign["experiments"] if "family" in entry}
    families |= campaign.get("owners", {})
    rows = [row for artifact in whole.values() for row in artifact.get("rows", [])]
    for row in rows:
        row["family"] = families.get(row["experiment"], row["experiment"])
    return {"artifacts": list(whole.values()), "rows": rows, "missing": missing}


def list_artifacts(campaign: dict, results: Path) -> list[dict]:
    """Every artifact that the campaign uses, once, with its path, its owner and the experiments that use it.

    The path is `results/OWNER/STAGE`, or `results/OWNER/JUDGE/POLICY` for a judge (evaluate, compare, lengths).
    Judgements come last, after the policies that they judge.
    """
    artifacts: dict[str, dict] = {}
    for experiment in campaign["experiments"]:
        stages = experiment["stages"]
        owners = {stage: PurePosixPath(folder).parents[stage.count("/")].name for stage, folder in stages.items()}
        for stage, owner in owners.items():
            name = visible(f"results/{owner}/{stage}")
            entry = artifacts.setdefault(name, {"users": [], "seed": experiment["seed"]})
            entry |= {"name": name, "experiment": visible(owner), "stage": stage}
            entry["path"] = results / owner / stage
            entry["users"].append(visible(experiment["name"]))
            if experiment["name"] == owner:
                entry["seed"] = experiment["seed"]
            if policy := stage.partition("/")[2]:
                entry["policy"] = visible(f"results/{owners.get(policy, owner)}/{policy}")
    return sorted(artifacts.values(), key=lambda entry: "policy" in entry)


def read_artifact(artifact: dict, whole: dict[str, dict]) -> dict:
    """One artifact with what the report shows: the rows of a judgement, a data card, or a training.

    whole: the artifacts read so far, by name. Raises one of BROKEN, with the reason, where it cannot be shown.
    """
    policy = artifact.get("policy")
    if policy and policy not in whole:
        raise ValueError(f"waits for {policy}, which is missing")
    artifact = read_records(artifact)
    metrics = artifact["metrics"]
    if policy:
        points = [numbers(entry, text=("series", "label")) for entry in metrics.get("frontier", [])]
        parts = [numbers(part) for part in metrics.get("positions", [])]
        shown = {"rows": read_rows(artifact, whole[policy]), "frontier": points, "positions": parts}
        generation = [generated(*entry) for entry in metrics.get("generation", {}).items()]
        return (
            artifact
            | shown
            | {"generation": generation, "warnings": [str(text) for text in metrics.get("warnings", [])]}
        )
    return artifact | ({"card": data_card(metrics)} if "sources" in metrics else training(metrics))


def read_records(artifact: dict) -> dict:
    """The artifact with its `id`, `metrics` and `provenance`. Raises ValueError, with the reason, if incomplete."""
    manifest, metrics, provenance = (artifact["path"] / f"{x}.json" for x in ("manifest", "metrics", "provenance"))
    if not manifest.is_file():
        raise ValueError("not made: it has no manifest.json")
    records = {"id": f"{artifact['name']}@{sha256(manifest)[:12]}", "metrics": read_json(metrics)}
    listed = read_json(manifest)["files"].get("metrics.json", {}).get("sha256")
    if listed not in (None, sha256(metrics)):
        raise ValueError("metrics.json: its bytes differ from its manifest")
    # A clone with pulled artifacts may lack the provenance; the results are valid without it.
    return artifact | records | {"provenance": read_json(provenance) if provenance.exists() else {}}


def read_json(path: Path) -> dict:
    """One JSON object, cleaned. Raises ValueError, naming the file, where it cannot be read."""
    try:
        return clean({**json.loads(path.read_text(encoding="utf-8"))})
    except FileNotFoundError:
        raise ValueError(f"no {path.name}") from None
    except BROKEN as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None


def read_rows(judgement: dict, policy: dict) -> list[dict]:
    """The result rows of one judgement of a policy; a group's own row (`world`) comes before the tasks in it."""
    groups = groups_of(judgement["path"] / "lm_eval.json")
    members = {task for tasks in groups.values() for task in tasks}
    shared = {key: judgement[key] for key in ("experiment", "seed")} | {"judge": judgement["stage"].partition("/")[0]}
    shared |= {"policy": policy["stage"], "artifact": policy["id"], "judgement": judgement["name"]}
    rows = []
    for row in judgement["metrics"]["rows"]:
        task = str(row["task"])
        values = {key: None if row.get(key) is None else number(row[key], key) for key in ("stderr", "n")}
        values["value"] = float(number(row["value"], "value"))
        kind = {
            "higher": row.get("higher_is_better"),
            "group": task in groups,
            "member": task in members or bool(row.get("member")),
        }
        rows.append(shared | values | kind | {"task": task, "metric": str(row["metric"])})
    return sorted(rows, key=lambda row: not row["group"])


def generated(task: str, settings: dict) -> str:
    """A task with its settings of generation, as a line."""
    return f"{task}: {', '.join(f'{key} {value}' for key, value in settings.items())}"


def groups_of(file: Path) -> dict[str, list[str]]:
    """lm-eval's groups by name, each with its tasks; {} without a file. Raises ValueError for a damaged file."""
    if not file.exists():
        return {}
    result = read_json(file)
    subtasks = result.get("group_subtasks", {})
    return {name: [str(task) for task in subtasks.get(name, [])] for name in result.get("groups", {})}


def training(metrics: dict) -> dict:
    """The records of a training: `summary`, `history`, `warnings`, and a reward model's calibration `bins`."""
    history = [numbers(entry, drop_none=True) for entry in metrics.get("history", [])]
    shown = {"summary": training_summary(metrics), "history": history}
    if calibration := metrics.get("calibration"):
        shown["bins"] = [numbers(part) for part in calibration["bins"]]
    return shown | {"warnings": [str(text) for text in metrics.get("warnings", [])]}


def training_summary(metrics: dict) -> dict:
    """The figures of a training by name: its own summary, tokens, accuracies and calibration."""
    summary = metrics.get("summary", {}) | {f"tokens: {k}": v for k, v in metrics.get("tokens", {}).items()}
    for kind, pairs in metrics.get("pairs", {}).items():
        error = f" ± {short(pairs['stderr'])}" if pairs.get("stderr") is not None else ""
        summary[f"accuracy, {kind} pairs"] = f"{short(pairs['accuracy'])}{error} (n {pairs['n']})"
    if calibration := metrics.get("calibration"):
        summary["expected calibration error"] = calibration["ece"]
    return summary


def numbers(entry: dict, text: tuple[str, ...] = (), drop_none: bool = False) -> dict:
    """A record with numbers or None as values, except under the keys `text`. Raises ValueError for other values."""
    checked = {key: value if key in text or value is None else number(value, key) for key, value in entry.items()}
    return {key: value for key, value in checked.items() if value is not None} if drop_none else checked


def data_card(metrics: dict) -> dict:
    """The data card, checked: sources with counts by reason, rows per split, token lengths, shares of a mixture."""
    sources = [
        {"name": source["name"], "task": source.get("task", "")}
        | {key: number(source[key], key) for key in ("total", "kept")}
        | {key: list(source.get(key, {}).items()) for key in ("dropped", "warnings")}
        | {key: str(source.get(key, "")) for key in ("licence", "origin", "languages")}
        for source in metrics["sources"]
    ]
    splits = [(task, list(sizes.items())) for task, sizes in metrics.get("splits", {}).items()]
    tokens = [
        (task, [(name, value) for name, value in lengths.items() if name != "histogram"])
        for task, lengths in metrics.get("tokens", {}).items()
    ]
    histograms = [
        {"task": task, "bars": [[number(part, task) for part in bar] for bar in lengths["histogram"]]}
        for task, lengths in metrics.get("tokens", {}).items()
        if "histogram" in lengths
    ]
    mixture = [
        (task, [numbers(one, ("source",)) for one in shares]) for task, shares in metrics.get("mixture", {}).items()
    ]
    return {"sources": sources, "splits": splits, "tokens": tokens, "mixture": mixture, "histograms": histograms}


def explain(error: Exception, log: Path) -> dict:
    """The `reason` why an artifact is missing, and the last lines of its `log`; "" without a log."""
    reason = f"{error.args[0]!r} is missing from its records" if isinstance(error, KeyError) else str(error)
    text = ""
    with contextlib.suppress(OSError):
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log.read_bytes()[-20_000:].decode(errors="replace"))
    lines = [visible(line.rstrip(), "\t")[:300] for line in re.split(r"[\r\n]+", text) if line.strip()]
    return {"reason": visible(reason)[:500], "log": "\n".join(lines[-8:])}
