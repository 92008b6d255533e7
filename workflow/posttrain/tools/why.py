"""Why stages will run again: the key, the input or the function that changed, what follows, what it costs.

posttrain why [EXPERIMENT[/STAGE] [OTHER EXPERIMENT]]
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from posttrain.config.stages import JUDGES
from posttrain.dag.artifacts import flat
from posttrain.dag.frozen import summary
from posttrain.dag.plan import Plan
from posttrain.engine.records import damaged
from posttrain.ground import accepted, code
from posttrain.ground.errors import UserError
from posttrain.ground.files import sha256
from posttrain.ground.identity import canonical, named, record_of

NOTHING = "Nothing is stale: every artifact is what its settings, its inputs and its code make."


def why(plan: Plan, wanted: str = "") -> str:
    """What Snakemake would make anew, artifact by artifact, each with its reasons; or that there is nothing.

    wanted: EXPERIMENT or EXPERIMENT/STAGE, to be told of these alone. Raises UserError for one that is not there.
    """
    artifacts = survey(plan)
    again = to_run(artifacts)
    asked = belonging(plan, artifacts, wanted) if wanted else artifacts
    shown = [folder for folder in again if folder in asked]
    if not shown:
        return "\n".join([f"Nothing of {wanted} is stale." if wanted else NOTHING, *accepted.edits(plan.code)])
    lines = []
    for folder in shown:
        artifact = artifacts[folder]
        above = [up for up in artifact["upstream"] if up in again]
        said = artifact["reasons"] or ([] if artifact["whole"] else ["not made yet"])
        said += [f"follows {', '.join(above)}"] if above else []
        said += [f"overwrites {replaced(folder, artifact['record'])}"] if artifact["record"] else []
        lines += [folder, *(f"  {text}" for text in [*said, f"takes {cost(folder, artifacts)}"])]
    return "\n".join([*lines, "", total(shown, artifacts), *mixed(artifacts), *accepted.edits(plan.code)])


def survey(plan: Plan) -> dict[str, dict]:
    """Folder -> every artifact of a campaign as it should be made, as it was, and what is not as it was."""
    artifacts = {folder: found(plan, folder) for folder in plan.folders()}
    return {folder: artifact | {"reasons": list(changes(artifact))} for folder, artifact in artifacts.items()}


def belonging(plan: Plan, artifacts: dict[str, dict], wanted: str) -> set[str]:
    """The artifacts that an experiment uses, or that lie under EXPERIMENT/STAGE."""
    folders = {folder for folder in artifacts if within(folder.removeprefix("results/"), wanted)}
    if wanted in plan.names:
        folders |= {artifact.folder for artifact in plan.of(wanted)}
    if not folders:
        raise UserError(f"{wanted}: nothing of this campaign; known: {', '.join(plan.names)}")
    return folders


def within(name: str, wanted: str) -> bool:
    """Whether an artifact is the wanted one, or lies under it."""
    return f"{name}/".startswith(f"{wanted}/")


def found(plan: Plan, folder: str) -> dict:
    """An artifact as it should be made, and the record of how it was."""
    if folder == "results/report":
        experiment, stage, policy = "", "report", ""
        section = named(canonical(summary(plan)))
    else:
        _, experiment, stage, policy = [*folder.split("/"), ""][:4]
        section = plan.section(experiment, stage)
    inputs = plan.inputs(experiment, stage, policy)
    inputs = {role: flat({role: files}) for role, files in inputs.items()}
    upstream = [str(Path(file).parent) for file in flat(inputs) if file.endswith("/manifest.json")]
    whole = Path(folder, "manifest.json").is_file()
    record = record_of(Path(folder))
    made = {"stage": stage, "inputs": inputs}
    made["params"] = [section, plan.code[stage], plan.lineage(experiment, stage, policy)]
    return made | {"upstream": list(dict.fromkeys(upstream)), "whole": whole, "record": record}


def changes(artifact: dict) -> Iterator[str]:
    """What is not as it was when an artifact was made: keys, inputs, functions."""
    record, stage = artifact["record"], artifact["stage"]
    if not artifact["whole"]:
        return  # whether it is needed is another question
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
        yield f"what it is built on has other settings or code, or is not here: {', '.join(absent)}"
    for role in sorted(record["inputs"].keys() | artifact["inputs"].keys()):
        yield from other_inputs(role, record["inputs"].get(role, {}), artifact["inputs"].get(role, []))


def differences(where: str, before, now) -> Iterator[str]:
    """Dotted keys whose values differ, each with both."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(f"{where}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield f"{where}: {json.dumps(before)} -> {json.dumps(now)}"


def other_inputs(role: str, before: dict[str, str], now: list[str]) -> Iterator[str]:
    """Inputs that are others, or have other bytes, than those that an artifact was made from."""
    gone, new = sorted(before.keys() - set(now)), sorted(set(now) - before.keys())
    if gone or new:
        yield f"{role}: {', '.join(gone) or 'none'} -> {', '.join(new) or 'none'}"
    for file in now:
        if file in before and damaged(file):
            yield f"{role}: {file}: what it lists is damaged"
        if file in before and Path(file).is_file() and (digest := sha256(Path(file))) != before[file]:
            yield f"{role}: {file}: {before[file][:12]} -> {digest[:12]}"


def edited(stage: str, record: dict, before: str, now: str) -> Iterator[str]:
    """The modules of a stage's code that changed, each with the definitions that did."""
    past, present = record.get("code", {}), code.definitions(stage)
    changed: dict[str, list[str]] = {}
    for place in sorted(past.keys() | present.keys()):
        if past.get(place) != present.get(place):
            module, _, definition = place.partition(":")
            changed.setdefault(module, []).append(definition or "(module)")
    reached = {place.partition(":")[0] for place in present}
    if not any(":" in place for place in past):
        yield "code: its record does not say which functions it used"
    else:
        for module, names in changed.items():
            yield f"code: {module}" + (f": {', '.join(names)}" if module in reached else " is no longer reached")
    if before.partition("+")[2] != now.partition("+")[2]:
        yield "versions: envs/requirements.txt changed (strict)"


def to_run(artifacts: dict[str, dict]) -> list[str]:
    """What Snakemake runs: what is stale, what descends from it, and what these need that is not there."""
    run = {folder for folder, artifact in artifacts.items() if artifact["reasons"]}
    run |= {"results/report"} if not artifacts["results/report"]["whole"] else set()
    while True:
        down = {folder for folder, artifact in artifacts.items() if run & set(artifact["upstream"])}
        up = {up for folder in run for up in artifacts[folder]["upstream"] if up in artifacts}
        more = down | {folder for folder in up if not artifacts[folder]["whole"]}
        if more <= run:
            return [folder for folder in artifacts if folder in run]
        run |= more


def stale(plan: Plan) -> dict[str, str]:
    """Artifacts that are there, but not as the plan makes them: folder -> why it is not to be shown as its result."""
    artifacts = survey(plan)
    folders = [folder for folder in to_run(artifacts) if artifacts[folder]["whole"]]
    reason = "stale, made from other settings, inputs or code: posttrain why"
    return {folder: f"{reason} {folder.removeprefix('results/')}" for folder in folders}


def replaced(folder: str, record: dict) -> str:
    """What goes when an artifact is made anew."""
    size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return f"what was made {record.get('started', 'earlier')} ({size / 1e6:.1f} MB)"


def seconds(folder: str, artifacts: dict[str, dict]) -> float | None:
    """How long an artifact took, or others of its stage where it was not made yet."""
    own = artifacts[folder]["record"].get("seconds")
    alike = [a["record"]["seconds"] for a in artifacts.values()
             if a["stage"] == artifacts[folder]["stage"] and "seconds" in a["record"]]  # fmt: skip
    return own if own is not None else statistics.median(alike) if alike else None


def gpus(artifact: dict) -> int:
    """How many GPUs the last run of an artifact used."""
    shape = artifact["record"].get("shape", {})
    return shape.get("processes", 1) if shape.get("device", "cpu") != "cpu" else 0


def cost(folder: str, artifacts: dict[str, dict]) -> str:
    """Time, and GPU-hours where there were GPUs, by the last run's record."""
    known = seconds(folder, artifacts)
    if known is None:
        return "a time that no record tells yet"
    used = gpus(artifacts[folder])
    return f"about {duration(known)}" + (f", {used * known / 3600:.2f} GPU-hours" if used else "")


def total(shown: list[str], artifacts: dict[str, dict]) -> str:
    """One line over all that is to be made."""
    known = [seconds(folder, artifacts) for folder in shown]
    used = sum(gpus(artifacts[folder]) * (time or 0) for folder, time in zip(shown, known, strict=True)) / 3600
    unknown = f", {known.count(None)} of unknown time" if None in known else ""
    gpu = f", {used:.2f} GPU-hours" if used else ""
    return f"{len(shown)} to be made: about {duration(sum(time or 0 for time in known))}{gpu}{unknown}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def mixed(artifacts: dict[str, dict]) -> list[str]:
    """A warning where artifacts of one table were made with different versions of the software."""
    versions: dict[str, set[str]] = {}
    for artifact in artifacts.values():
        for package, version in artifact["record"].get("shape", {}).get("versions", {}).items():
            versions.setdefault(package, set()).add(version)
    several = [f"{package} {' and '.join(sorted(found))}" for package, found in versions.items() if len(found) > 1]
    return [f"warning: these artifacts were made with different versions: {'; '.join(several)}"] if several else []


def compare(plan: Plan, one: str, other: str) -> str:
    """How two experiments differ: key by key, and which artifacts they share."""
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
