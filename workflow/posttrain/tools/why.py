"""Explain which stages will rerun: the changed key, input or function, the affected stages, and the cost.

posttrain why [EXPERIMENT[/STAGE] [OTHER EXPERIMENT]]
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from posttrain.config.stages import JUDGES
from posttrain.dag.artifacts import REPORT, Artifact, at, flat
from posttrain.dag.frozen import summary
from posttrain.dag.plan import Plan
from posttrain.engine.records import damaged
from posttrain.ground import accepted, code
from posttrain.ground.errors import UserError
from posttrain.ground.files import sha256
from posttrain.ground.identity import canonical, named, record_of
from posttrain.reporting.departure import differing

NOTHING = "Nothing is stale: every artifact was made from its present settings, inputs and code."


def why(plan: Plan, wanted: str = "", other: str = "") -> str:
    """The artifacts that Snakemake would remake, each with the reasons and the cost.

    wanted: EXPERIMENT or EXPERIMENT/STAGE, to show its artifacts only. Raises UserError where the campaign has none.
    other: an experiment to compare `wanted` with instead.
    """
    if other:
        return compare(plan, wanted, other)
    artifacts = survey(plan)
    again = to_run(artifacts)
    selected = belonging(plan, artifacts, wanted) if wanted else artifacts
    shown = [folder for folder in again if folder in selected]
    if not shown:
        return "\n".join([f"Nothing of {wanted} is stale." if wanted else NOTHING, *accepted.edits(plan.code)])
    lines = []
    for folder in shown:
        artifact = artifacts[folder]
        above = [up for up in artifact["upstream"] if up in again]
        reasons = artifact["reasons"] or ([] if artifact["whole"] else ["not made yet"])
        reasons += [f"follows {', '.join(above)}"] if above else []
        reasons += [f"overwrites {replaced(folder, artifact['record'])}"] if artifact["record"] else []
        lines += [folder, *(f"  {text}" for text in [*reasons, f"takes {cost(folder, artifacts)}"])]
    return "\n".join([*lines, "", total(shown, artifacts), *mixed_versions(artifacts), *accepted.edits(plan.code)])


def survey(plan: Plan) -> dict[str, dict]:
    """Folder -> artifact of the campaign: its planned parameters, its provenance (`record`), and why it is stale."""
    artifacts = {artifact.folder: planned(plan, artifact) for artifact in plan.artifacts()}
    return {folder: artifact | {"reasons": list(changes(artifact))} for folder, artifact in artifacts.items()}


def belonging(plan: Plan, artifacts: dict[str, dict], wanted: str) -> set[str]:
    """Folders of the artifacts that an experiment uses, or that are under EXPERIMENT/STAGE."""
    folders = {folder for folder in artifacts if within(folder.removeprefix("results/"), wanted)}
    if wanted in plan.names:
        folders |= {artifact.folder for artifact in plan.of(wanted)}
    if not folders:
        raise UserError(f"{wanted}: nothing of this campaign; known: {', '.join(plan.names)}")
    return folders


def within(name: str, wanted: str) -> bool:
    """Whether an artifact is the wanted one, or is under it."""
    return f"{name}/".startswith(f"{wanted}/")


def planned(plan: Plan, artifact: Artifact) -> dict:
    """An artifact's stage, inputs, params and upstream folders in the plan; whether it exists; its provenance."""
    key = (artifact.experiment, artifact.stage, artifact.policy)
    section = named(canonical(summary(plan))) if artifact == REPORT else plan.section(*key[:2])
    inputs = {role: flat({role: files}) for role, files in plan.inputs(*key).items()}
    upstream = [str(Path(file).parent) for file in flat(inputs) if file.endswith("/manifest.json")]
    return {
        "stage": artifact.stage,
        "inputs": inputs,
        "params": [section, plan.code[artifact.stage], plan.lineage(*key)],
        "upstream": list(dict.fromkeys(upstream)),
        "whole": artifact.exists,
        "record": record_of(Path(artifact.folder)),
    }


def changes(artifact: dict) -> Iterator[str]:
    """The changes since an artifact was made: keys, inputs, functions."""
    record, stage = artifact["record"], artifact["stage"]
    if not artifact["whole"]:
        return  # `to_run` decides whether it is needed
    if not record:
        yield "of unknown origin: its provenance.json is gone or broken"
        return
    before, now = record["params"], artifact["params"]
    if before[0] != now[0]:
        if stage == "report":
            yield "the campaign's experiments, questions or title changed"
        else:
            yield from differences(stage, json.loads(before[0]), json.loads(now[0]))
    if before[1] != now[1]:
        yield from edited(stage, record, before[1], now[1])
    absent = [up for up in artifact["upstream"] if not Path(up, "manifest.json").is_file()]
    if before[2:] != now[2:] and absent:
        yield f"an absent input has other settings or code: {', '.join(absent)}"
    for role in sorted(record["inputs"].keys() | artifact["inputs"].keys()):
        yield from other_inputs(role, record["inputs"].get(role, {}), artifact["inputs"].get(role, []))


def differences(where: str, before, now) -> Iterator[str]:
    """Dotted keys whose values differ, each with both values."""
    for key, old, new in differing(before, now, where):
        yield f"{key}: {json.dumps(old)} -> {json.dumps(new)}"


def other_inputs(role: str, before: dict[str, str], now: list[str]) -> Iterator[str]:
    """Inputs that were added, removed or changed since an artifact was made."""
    gone, new = sorted(before.keys() - set(now)), sorted(set(now) - before.keys())
    if gone or new:
        yield f"{role}: {', '.join(gone) or 'none'} -> {', '.join(new) or 'none'}"
    for file in now:
        if file in before and damaged(file):
            yield f"{role}: {file}: its files are damaged"
        if file in before and Path(file).is_file() and (digest := sha256(Path(file))) != before[file]:
            yield f"{role}: {file}: {before[file][:12]} -> {digest[:12]}"


def edited(stage: str, record: dict, before: str, now: str) -> Iterator[str]:
    """The modules of a stage's code that changed, each with the definitions that did, and the pinned versions."""
    if before.partition("+")[0] != now.partition("+")[0]:
        yield from edited_modules(record.get("code", {}), code.definitions(stage))
    if before.partition("+")[2] != now.partition("+")[2]:
        yield "versions: envs/requirements.txt changed (strict)"


def edited_modules(past: dict[str, str], present: dict[str, str]) -> Iterator[str]:
    """Modules in which definitions differ. past, present: definition -> digest (`code.definitions`)."""
    changed: dict[str, list[str]] = {}
    for place in sorted(past.keys() | present.keys()):
        if past.get(place) != present.get(place):
            module, _, definition = place.partition(":")
            changed.setdefault(module, []).append(definition or "(module)")
    reached = {place.partition(":")[0] for place in present}
    if not any(":" in place for place in past):
        yield "code: its record does not list its functions"
    else:
        for module, names in changed.items():
            yield f"code: {module}" + (f": {', '.join(names)}" if module in reached else " is no longer reached")


def to_run(artifacts: dict[str, dict]) -> list[str]:
    """Folders that Snakemake will remake: stale ones, their descendants, and absent inputs of these."""
    run = {folder for folder, artifact in artifacts.items() if artifact["reasons"]}
    run |= {"results/report"} if not artifacts["results/report"]["whole"] else set()
    while True:
        down = {folder for folder, artifact in artifacts.items() if run & set(artifact["upstream"])}
        up = {up for folder in run for up in artifacts[folder]["upstream"] if up in artifacts}
        more = down | {folder for folder in up if not artifacts[folder]["whole"]}
        if more <= run:
            return [folder for folder in artifacts if folder in run]
        run |= more


def to_make(plan: Plan) -> list[Artifact]:
    """The artifacts that jobs will make; all but the report, which needs almost nothing."""
    return [artifact for artifact in map(at, to_run(survey(plan))) if artifact != REPORT]


def stale(plan: Plan) -> dict[str, str]:
    """Folder of an existing stale artifact -> why it must not be shown as this plan's result."""
    artifacts = survey(plan)
    folders = [folder for folder in to_run(artifacts) if artifacts[folder]["whole"]]
    reason = "stale, made from other settings, inputs or code: posttrain why"
    return {folder: f"{reason} {folder.removeprefix('results/')}" for folder in folders}


def replaced(folder: str, record: dict) -> str:
    """Date and size of an artifact that will be overwritten."""
    size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return f"the artifact of {record.get('started', 'an unknown date')} ({size / 1e6:.1f} MB)"


def seconds(folder: str, artifacts: dict[str, dict]) -> float | None:
    """Seconds that an artifact took, else the median of its stage's artifacts; None without a record."""
    stage, last = artifacts[folder]["stage"], artifacts[folder]["record"].get("seconds")
    times = [a["record"]["seconds"] for a in artifacts.values() if a["stage"] == stage and "seconds" in a["record"]]
    return last if last is not None else statistics.median(times) if times else None


def gpus(artifact: dict) -> int:
    """Number of GPUs that the last run of an artifact used."""
    shape = artifact["record"].get("shape", {})
    return shape.get("processes", 1) if shape.get("device", "cpu") != "cpu" else 0


def cost(folder: str, artifacts: dict[str, dict]) -> str:
    """The expected time of an artifact, and GPU-hours where it used GPUs, by earlier records."""
    time = seconds(folder, artifacts)
    if time is None:
        return "an unknown time"
    used = gpus(artifacts[folder])
    return f"about {duration(time)}" + (f", {used * time / 3600:.2f} GPU-hours" if used else "")


def total(shown: list[str], artifacts: dict[str, dict]) -> str:
    """One line: how many artifacts will be made, and the sum of their costs."""
    times = [seconds(folder, artifacts) for folder in shown]
    used = sum(gpus(artifacts[folder]) * (time or 0) for folder, time in zip(shown, times, strict=True)) / 3600
    unknown = f", {times.count(None)} of unknown time" if None in times else ""
    gpu = f", {used:.2f} GPU-hours" if used else ""
    return f"{len(shown)} to be made: about {duration(sum(time or 0 for time in times))}{gpu}{unknown}"


def duration(seconds: float) -> str:
    """Seconds as a rounded time with its unit."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def mixed_versions(artifacts: dict[str, dict]) -> list[str]:
    """A warning where the campaign's artifacts were made with different versions of packages."""
    versions: dict[str, set[str]] = {}
    for artifact in artifacts.values():
        for package, version in artifact["record"].get("shape", {}).get("versions", {}).items():
            versions.setdefault(package, set()).add(version)
    several = [f"{package} {' and '.join(sorted(used))}" for package, used in versions.items() if len(used) > 1]
    return [f"warning: these artifacts were made with different versions: {'; '.join(several)}"] if several else []


def compare(plan: Plan, one: str, other: str) -> str:
    """The keys in which two experiments differ, and the artifacts that they share."""
    unknown = [name for name in (one, other) if name not in plan.experiments]
    if unknown:
        raise UserError(f"{unknown[0]}: no experiment of this campaign; known: {', '.join(plan.experiments)}")
    lines = [f"{one} -> {other}"]
    stages = dict.fromkeys([*plan.stages(one), *JUDGES, *plan.stages(other)])
    for stage in stages:
        has = [plan.has(name, stage) for name in (one, other)]
        if all(has):
            lines += differences(stage, *(json.loads(plan.section(name, stage)) for name in (one, other)))
        elif any(has):
            lines.append(f"{stage}: only in {one if has[0] else other}")
    both = [s for s in plan.stages(one) if s in plan.stages(other) and plan.folder(one, s) == plan.folder(other, s)]
    return "\n".join([*lines, f"shared: {', '.join(both) or 'nothing'}"])
