"""Accept an edit of a stage's code that changes no result, so that no artifact becomes stale.

posttrain accept [STAGE ...] --because "..." [--from FINGERPRINT] [--same FOLDER FOLDER]
"""

import datetime
import subprocess
from pathlib import Path

from posttrain.dag.plan import Plan
from posttrain.ground import accepted, code
from posttrain.ground.errors import UserError, gather
from posttrain.ground.files import verify
from posttrain.ground.identity import record_of


def accept(plan: Plan, stages: list[str], because: str, former: str = "", same: list[Path] | None = None) -> str:
    """Record that the code of some stages still makes the same artifacts; returns the records as text.

    stages: empty for all whose code changed. former: the fingerprint that the code counts as, where artifacts do not
    have one. same: two folders with a stage's artifact by the former and by the present code; equal bytes from equal
    settings and inputs are the proof. Raises UserError for a stage whose code did not change, or whose artifacts were
    made with several other codes.
    """
    if unknown := [stage for stage in stages if stage not in plan.code]:
        raise UserError(f"{unknown[0]}: no such stage; known: {', '.join(plan.code)}")
    if not accepted.is_text(because):
        raise UserError("--because: say in one line why the results do not change")
    if (former or same) and len(stages) != 1:
        raise UserError("--from and --same apply to one stage: name it")
    if same:
        former = proven(stages[0], *same)
    named = stages or [stage for stage in plan.code if made_with(plan, stage).keys() - {current(plan, stage)}]
    if not named:
        raise UserError("accept: no stage's code has changed since its artifacts were made")
    formers = gather(lambda stage: former or only_former(plan, stage), named)
    rest = {"because": because, "date": datetime.date.today().isoformat(), "by": author()}
    rest["shown"] = "same bytes" if same else "word"
    records = gather(lambda edit: record(edit[0], edit[1], rest), list(zip(named, formers, strict=True)))
    accepted.add(records)
    anew = [folder for new in records if (folder := made_with(plan, new["stage"]).get(new["to"]))]
    warnings = [f"{folder} was made with the code as it is, and will be made anew" for folder in anew]
    return "\n".join([*map(accepted.in_words, records), *warnings, f"commit {accepted.file()} with the code"])


def record(stage: str, former: str, rest: dict[str, str]) -> dict[str, str]:
    """The record of one edit. Raises UserError where there is no edit, or the code already counts as another one."""
    present = code.fingerprint_of(stage)
    if former == accepted.standing(stage):
        raise UserError(f"{stage}: its code counts as {former} already; there is nothing to accept")
    if steps := accepted.chain(stage, present):
        raise UserError(
            f"{stage}: its code is accepted as {steps[-1]['from']} and cannot count as {former} too; "
            f"to change that, remove the record from {accepted.file()}: {accepted.in_words(steps[0])}"
        )
    return {"stage": stage, "from": former, "to": present} | rest


def current(plan: Plan, stage: str) -> str:
    """The fingerprint that a stage is planned with, without that of pinned versions (`strict`)."""
    return plan.code[stage].partition("+")[0]


def made_with(plan: Plan, stage: str) -> dict[str, str]:
    """Fingerprint -> folder of an artifact of the stage that was made with that code."""
    folders = {}
    for artifact in plan.artifacts():
        record = record_of(Path(artifact.folder)) if artifact.stage == stage else {}
        if record and Path(artifact.folder, "manifest.json").is_file():
            folders[record["params"][1].partition("+")[0]] = artifact.folder
    return folders


def only_former(plan: Plan, stage: str) -> str:
    """The other code that a stage's artifacts were made with. Raises UserError unless there is exactly one."""
    folders = made_with(plan, stage)
    former = {fingerprint: folder for fingerprint, folder in folders.items() if fingerprint != current(plan, stage)}
    if len(former) == 1:
        return next(iter(former))
    if former:
        which = "; ".join(f"{folder}: --from {fingerprint}" for fingerprint, folder in former.items())
        raise UserError(f"{stage}: its artifacts were made with {len(former)} other codes; name one: {which}")
    if folders:
        raise UserError(f"{stage}: its code has not changed since its artifacts were made; there is nothing to accept")
    raise UserError(f"{stage}: no artifact here records its former code; name it: --from FINGERPRINT")


def proven(stage: str, before: Path, after: Path) -> str:
    """The fingerprint of the code that made the artifact `before`, if the present code made the same bytes, `after`.

    Raises UserError, naming what differs: settings, inputs or bytes.
    """
    gather(verify, [before / "manifest.json", after / "manifest.json"])
    one, other = record_of(before), record_of(after)
    if {record.get("stage") for record in (one, other)} != {stage}:
        raise UserError(f"--same: {before} and {after} must both be artifacts of {stage}, with their provenance.json")
    inputs = [{role: sorted(files.values()) for role, files in record["inputs"].items()} for record in (one, other)]
    if inputs[0] != inputs[1] or one["params"][0] != other["params"][0]:
        raise UserError(f"--same: {before} and {after} differ in their settings or inputs, and prove nothing")
    if other["code"] != code.definitions(stage) or one["code"] == other["code"]:
        raise UserError(f"--same: {before} must be made by the former code, {after} by the present code")
    if (before / "manifest.json").read_bytes() != (after / "manifest.json").read_bytes():
        raise UserError(f"--same: {before} and {after} differ in their bytes: the results change")
    return one["params"][1].partition("+")[0]


def author() -> str:
    """The user's name in git's configuration."""
    run = subprocess.run(["git", "config", "user.name"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"
