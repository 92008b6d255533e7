"""dvc.yaml: DVC's ledger of a campaign. Snakemake decides and runs; DVC stores, moves and shows what was made.

posttrain ledger [CAMPAIGN]
"""

from pathlib import Path

import yaml

from posttrain.dag.campaign import DEFAULT
from posttrain.dag.plan import Plan

PAGES = ("table.csv", "table.md", "summary.txt", "index.html", "figures", "curves.csv")
TRAINED = ("base", "sft", "reward", "ppo", "dpo", "longctx")
HEAD = """# Written by `posttrain ledger`; write it again when the campaign's experiments change. One stage, since
# Snakemake decides what runs; one out for each artifact, so that each can be pulled alone. Without `persist` DVC would
# delete them before a run.
"""


def ledger(plan: Plan) -> str:
    """The text of dvc.yaml for a campaign."""
    named = f" --configfile {plan.configfile}" if plan.configfile else ""
    folder = Path(plan.configfile or DEFAULT).parent
    names = sorted({plan.origin(name) for name in plan.experiments})
    files = [plan.configfile or DEFAULT, *(f"{folder}/experiments/{name}.yaml" for name in names)]
    made = [out for out in plan.folders() if out != "results/report" and not from_hub(plan, out)]
    report = [f"results/report/{name}" for name in (*PAGES, "manifest.json", "provenance.json")]
    stage = {
        "cmd": f"snakemake --cores all{named}",
        "deps": ["workflow", "envs"],
        "params": [{file: None} for file in files],
        "outs": [{out: {"persist": True}} for out in [*made, *report]],
        "metrics": [{"results/report/metrics.json": {"persist": True}}],
    }
    trained = [out.removeprefix("results/") for out in made if out.split("/")[2] in TRAINED]
    curves = {"Training loss": {"x": "step", "y": {"results/report/curves.csv": trained}}}
    return HEAD + yaml.safe_dump({"stages": {"campaign": stage}, "plots": [curves]}, sort_keys=False, width=120)


def from_hub(plan: Plan, folder: str) -> bool:
    """Whether an artifact holds what the hub gave, models or data sets: which may be gated, and is had from there."""
    _, experiment, stage = [*folder.split("/"), ""][:3]
    return stage in ("prepare", "base") and bool(plan.fetched(experiment, stage))
