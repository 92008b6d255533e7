"""Write dvc.yaml, DVC's ledger of a campaign. Snakemake runs the stages; DVC stores, moves and shows artifacts.

posttrain ledger [CAMPAIGN]
"""

import os
import re
from pathlib import Path

import yaml

from posttrain.config.stages import TRAINERS
from posttrain.dag.artifacts import REPORT, Artifact
from posttrain.dag.campaign import DEFAULT
from posttrain.dag.plan import Plan
from posttrain.ground.errors import UserError
from posttrain.ground.files import write_text
from posttrain.ground.progress import say

PAGES = ("table.csv", "table.md", "summary.txt", "index.html", "figures", "curves.csv", "verdict.json", "compute.json")
FILE = Path("dvc.yaml")
KEYS = ["stages", "plots", "campaign", "cmd", "deps", "params", "outs", "metrics"]  # of the file, and of its stages
HEAD = """# Written by `posttrain ledger`, and by each run of its campaign whose experiments changed. One stage, since
# Snakemake decides what runs; one out for each artifact, so that each can be pulled alone. Without `persist` DVC would
# delete them before a run.
"""


def write(plan: Plan) -> None:
    """Write dvc.yaml."""
    write_text(FILE, ledger(plan))


def keep_up(plan: Plan, overridden: bool) -> str:
    """Bring dvc.yaml up to date when a run begins; returns what it lacks all the same (`lacking`).

    Only the ledger of this campaign is written, to which nothing was added by hand; and not for settings that one
    command line overrides. Raises UserError where DVC runs the command and dvc.yaml lacks artifacts: DVC has read the
    file already, and would leave them out.
    """
    lack = lacking(plan)
    if "DVC_STAGE" in os.environ:  # set by DVC for the command that it runs
        if lack:
            raise UserError(f"{lack}; then run dvc again")
        return ""
    if not FILE.is_file() or overridden or not (lack or is_outdated(plan)) or not is_own(plan):
        if lack:
            say(lack)
        return lack
    write(plan)
    say(f"{FILE}: written for the artifacts of {plan.configfile or DEFAULT}; commit it with dvc.lock")
    return ""


def lacking(plan: Plan) -> str:
    """What dvc.yaml lacks of a campaign's artifacts, which DVC would not store, and the command to add them; "" where
    it lacks nothing, or there is no dvc.yaml."""
    if not FILE.is_file():
        return ""
    listed = outs()
    absent = [artifact.folder for artifact in stored(plan) if not within(artifact.folder, listed)]
    if not absent:
        return ""
    more = f" and {len(absent) - 3:,} more" if len(absent) > 3 else ""
    todo = f"posttrain ledger {plan.configfile}".strip()
    return f"{FILE} lacks {', '.join(absent[:3])}{more}, which dvc commit and dvc push leave out: {todo}"


def is_outdated(plan: Plan) -> bool:
    """Whether dvc.yaml lists artifacts that a campaign does not make, or lacks a file of its config, whose edits DVC
    would not notice."""
    text = FILE.read_text(encoding="utf-8")
    listed = {out for out in outs() if not within(out, {REPORT.folder})}
    surplus = listed - {artifact.folder for artifact in stored(plan)}
    return bool(surplus) or any(file not in text for file in config_files(plan))


def outs() -> set[str]:
    """The paths in results/ that dvc.yaml lists. It is not read as YAML, which takes seconds for thousands of them."""
    listed = r"""^\s*(?:[-?]\s+)+['"]?(results(?:/[^\s:'"]+)?)"""
    return set(re.findall(listed, FILE.read_text(encoding="utf-8"), re.M))


def within(path: str, listed: set[str]) -> bool:
    """Whether a path, or a folder that contains it, is listed."""
    parts = path.split("/")
    return any("/".join(parts[:length]) in listed for length in range(1, len(parts) + 1))


def is_own(plan: Plan) -> bool:
    """Whether dvc.yaml is the ledger of a campaign, and nothing was added to it by hand."""
    try:
        content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
        stages, plots = content["stages"], content["plots"]
        keys, added = [*content, *stages, *stages["campaign"]], len(plots) - 1
    except (yaml.YAMLError, KeyError, TypeError):
        return False
    return keys == KEYS and not added and stages["campaign"]["cmd"] == command(plan)


def command(plan: Plan) -> str:
    """The command with which DVC runs a campaign."""
    return "snakemake --cores all" + (f" --configfile {plan.configfile}" if plan.configfile else "")


def ledger(plan: Plan) -> str:
    """The text of dvc.yaml for a campaign."""
    artifacts = stored(plan)
    pages = [f"{REPORT.folder}/{name}" for name in (*PAGES, "manifest.json", "provenance.json")]
    stage = {
        "cmd": command(plan),
        "deps": ["workflow", "envs"],
        "params": [{file: None} for file in config_files(plan)],
        "outs": [{out: {"persist": True}} for out in [*(artifact.folder for artifact in artifacts), *pages]],
        "metrics": [{f"{REPORT.folder}/metrics.json": {"persist": True}}],
    }
    trained = [artifact.name for artifact in artifacts if artifact.stage in TRAINERS]
    curves = {"Training loss": {"x": "step", "y": {f"{REPORT.folder}/curves.csv": trained}}}
    return HEAD + yaml.safe_dump({"stages": {"campaign": stage}, "plots": [curves]}, sort_keys=False, width=120)


def config_files(plan: Plan) -> list[str]:
    """The campaign's file, and those of its experiments and their parents."""
    configfile = plan.configfile or DEFAULT
    names = sorted({plan.origin(name) for name in plan.experiments})
    return [configfile, *(f"{Path(configfile).parent}/experiments/{name}.yaml" for name in names)]


def stored(plan: Plan) -> list[Artifact]:
    """The artifacts of a campaign that DVC stores as folders; it stores the report file by file."""
    return [artifact for artifact in plan.artifacts() if artifact != REPORT and not from_hub(plan, artifact)]


def from_hub(plan: Plan, artifact: Artifact) -> bool:
    """Whether an artifact holds models or data from the hub. They may be gated, and are fetched from there."""
    return not artifact.policy and bool(plan.fetched(artifact.experiment, artifact.stage))
