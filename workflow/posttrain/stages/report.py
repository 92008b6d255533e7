"""Render what the campaign's stages recorded as a table, figures and one page that needs no network.

posttrain report --campaign .snakemake/campaigns/DIGEST.json --output results/report/manifest.json

It reads JSON and loads no model. A missing artifact is named with the reason, and the rest is shown; the page is then
marked partial and gets no manifest, so that the workflow renders it again.
"""

import json
import os
from pathlib import Path

from posttrain.ground.files import manifest_of, write_json
from posttrain.reporting import compute, figures, records, samples, summary, tables, verdict
from posttrain.reporting.page import page


def report(
    campaign: dict,
    output: Path,
    results: Path = Path("results"),
    reasons: dict[str, str] | None = None,
    needed: list[str] | None = None,
) -> list[dict]:
    """Write table, figures and page into `output`; returns the missing artifacts, none if the report is complete.

    campaign: {"title", "experiments": [{"name", "family", "question", "seed", "stages": {stage: artifact folder}}]},
    where a stage is STAGE or JUDGE/POLICY; experiments of one family differ in their seeds only. `owners`: the family
    of artifacts that several cells of a grid share.
    reasons: artifacts to leave out, each with the reason, e.g. {"results/tiny/ppo": "KL exploded"}. needed: manifests
    of the artifacts that must not be missing; all where None.
    """
    record = records.gather(campaign, results, reasons or {})
    if needed is not None:
        record["missing"] = [piece for piece in record["missing"] if f"{piece['name']}/manifest.json" in needed]
    record["verdict"] = verdict.verdict(
        campaign.get("claims", []), results, campaign.get("registered"), campaign.get("recorded")
    )
    record["samples"] = samples.read_samples(record["artifacts"], record["missing"])
    record["compute"] = compute.compute(campaign, record["artifacts"], results)
    drawn = figures.draw(record)
    rows, missing = record["rows"], record["missing"]
    texts = {f"figures/{figure['name']}.svg": figure["wide"] for figure in drawn}
    texts["table.csv"] = tables.table_csv(rows)
    texts["table.md"] = tables.table_md(rows) + tables.seeds_md(rows) + tables.missing_md(missing)
    texts["metrics.json"] = tables.metrics_json(rows)
    texts["curves.csv"] = tables.curves_csv(record["artifacts"])
    texts["summary.txt"] = summary.text(rows, missing)
    texts["verdict.json"] = json.dumps(record["verdict"], indent=1, ensure_ascii=False) + "\n"
    texts["compute.json"] = json.dumps(record["compute"], indent=1, ensure_ascii=False) + "\n"
    texts["index.html"] = page(campaign, record, drawn)
    publish(output, texts, complete=not missing)
    return missing


def publish(output: Path, texts: dict[str, str], complete: bool) -> None:
    """Write the files by rename. A complete report gets a manifest, last; a partial one has none."""
    (output / "figures").mkdir(parents=True, exist_ok=True)
    (output / "manifest.json").unlink(missing_ok=True)
    for name, text in texts.items():
        beside = (output / name).with_name(f".{Path(name).name}.new")
        beside.write_bytes(text.encode())
        os.replace(beside, output / name)
    for old in (output / "figures").iterdir():
        if f"figures/{old.name}" not in texts:
            old.unlink()
    if complete:
        write_json(output / "manifest.json", manifest_of(output, sorted(texts)))
