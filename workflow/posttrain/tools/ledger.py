"""Write dvc.yaml, DVC's ledger of a campaign. Snakemake runs the stages; DVC stores, moves and shows artifacts.

posttrain ledger [CAMPAIGN]
"""

from pathlib import Path

import yaml

from posttrain.config.stages import TRAINERS
from posttrain.dag.artifacts import REPORT, Artifact
from posttrain.dag.campaign import DEFAULT
from posttrain.dag.plan import Plan

PAGES = ("table.csv", "table.md", "summary.txt", "index.html", "figures", "curves.csv")
HEAD = """# Written by `posttrain ledger`; write it again when the campaign's experiments change. One stage, since
# Snakemake decides what runs; one out for each artifact, so that each can be pulled alone. Without `persist` DVC would
# delete them before a run.
"""


def write(plan: Plan) -> None:
    """Write dvc.yaml."""
    Path("dvc.yaml").write_text(ledger(plan), encoding="utf-8")


def ledger(plan: Plan) -> str:
    """The text of dvc.yaml for a campaign."""
    configfile = plan.configfile or DEFAULT
    names = sorted({plan.origin(name) for name in plan.experiments})
    files = [configfile, *(f"{Path(configfile).parent}/experiments/{name}.yaml" for name in names)]
    stored = [artifact for artifact in plan.artifacts() if artifact != REPORT and not from_hub(plan, artifact)]
    pages = [f"{REPORT.folder}/{name}" for name in (*PAGES, "manifest.json", "provenance.json")]
    stage = {
        "cmd": "snakemake --cores all" + (f" --configfile {plan.configfile}" if plan.configfile else ""),
        "deps": ["workflow", "envs"],
        "params": [{file: None} for file in files],
        "outs": [{out: {"persist": True}} for out in [*(artifact.folder for artifact in stored), *pages]],
        "metrics": [{f"{REPORT.folder}/metrics.json": {"persist": True}}],
    }
    trained = [artifact.name for artifact in stored if artifact.stage in TRAINERS]
    curves = {"Training loss": {"x": "step", "y": {f"{REPORT.folder}/curves.csv": trained}}}
    return HEAD + yaml.safe_dump({"stages": {"campaign": stage}, "plots": [curves]}, sort_keys=False, width=120)


def from_hub(plan: Plan, artifact: Artifact) -> bool:
    """Whether an artifact holds models or data from the hub. They may be gated, and are fetched from there."""
    return not artifact.policy and bool(plan.fetched(artifact.experiment, artifact.stage))
