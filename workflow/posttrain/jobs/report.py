"""Render the report of a run, and record what it was made from.

posttrain report --campaign .snakemake/campaigns/DIGEST.json --output results/report/manifest.json
"""

from pathlib import Path

from posttrain.config.stages import REPORTED, STAGES
from posttrain.ground import accepted, progress
from posttrain.ground.errors import UserError, gather
from posttrain.ground.files import read_json, sha256, write_json
from posttrain.jobs.damage import verify_artifact
from posttrain.stages.report import report


def run_report(
    campaign: Path, output: Path, code: str | None, lineage: str, partial: bool, left_out: Path | None
) -> None:
    """Render the report of a campaign's file, which was written when the workflow was planned, with its provenance.

    left_out: JSON file with `reasons`. Raises UserError for damaged or missing artifacts, unless the report may be
    partial.
    """
    progress.name = "report"
    summary, folder = read_json(campaign), output.parent
    places = (place for experiment in summary["experiments"] for place in experiment["stages"].items())
    read = sorted(f"{place}/manifest.json" for stage, place in places if stage.partition("/")[0] in REPORTED)
    if not partial:
        gather(verify_artifact, [Path(file) for file in read if Path(file).is_file()])
    digests = {"evaluations": {file: sha256(Path(file)) for file in read if Path(file).is_file()}}
    edits = {"accepted": accepted.edits([*STAGES, "report"])}
    missing = report(summary | edits, folder, reasons=read_json(left_out) if left_out else {})
    record = {"stage": "report", "params": [str(campaign), code or "", lineage], "inputs": digests}
    write_json(folder / "provenance.json", record | accepted.of_code("report"))
    if missing and not partial:
        raise UserError(*(f"{piece['name']}: {piece['reason']}" for piece in missing))
