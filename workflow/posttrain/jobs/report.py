"""Render the report of a run, and record what it was made from.

posttrain report --campaign .snakemake/campaigns/DIGEST.json --output results/report/manifest.json
"""

from pathlib import Path

from posttrain.config.stages import REPORTED, STAGES
from posttrain.dag import campaign as campaign_file
from posttrain.ground import accepted, progress
from posttrain.ground.errors import UserError, gather
from posttrain.ground.files import read_json, sha256, write_json
from posttrain.jobs.damage import verify_artifact
from posttrain.jobs.registered import registered
from posttrain.stages.report import report


def run_report(
    campaign: Path,
    output: Path,
    code: str | None,
    lineage: str,
    partial: bool,
    left_out: Path | None,
    claimed: bool = False,
) -> None:
    """Render the report of a campaign's file, which was written when the workflow was planned, with its provenance.

    left_out: JSON file with `reasons`. claimed: what no claim needs may be missing. Raises UserError for damaged or
    missing artifacts, unless the report may be partial.
    """
    progress.name = "report"
    summary, folder = read_json(campaign), output.parent
    places = (place for experiment in summary["experiments"] for place in experiment["stages"].items())
    read = sorted(f"{place}/manifest.json" for stage, place in places if stage.partition("/")[0] in REPORTED)
    measured, above = claimed_artifacts(summary)
    if not partial:
        checked = dict.fromkeys([*read, *above])
        gather(verify_artifact, [Path(file) for file in checked if Path(file).is_file()])
    shown = measured if claimed else read
    digests = {"evaluations": {file: sha256(Path(file)) for file in shown if Path(file).is_file()}}
    beside = {"accepted": accepted.edits([*STAGES, "report"])} | beside_claims(summary)
    reasons = read_json(left_out) if left_out else {}
    missing = report(summary | beside, folder, reasons=reasons, needed=above if claimed else None)
    record = {"stage": "report", "params": [str(campaign), code or "", lineage], "inputs": digests}
    write_json(folder / "provenance.json", record | accepted.of_code("report"))
    if missing and not partial:
        raise UserError(*(f"{piece['name']}: {piece['reason']}" for piece in missing))


def claimed_artifacts(summary: dict) -> tuple[list[str], list[str]]:
    """(manifests of the artifacts that claims measure, and these with those that they depend on), each once."""
    parts = [claim[part]["above"] for claim in summary["claims"] if claim["tested"] for part in ("measured", "control")]
    folders = dict.fromkeys(folder for above in parts for folder in above)
    above = dict.fromkeys(folder for part in parts for folders in part.values() for folder in folders)
    return [f"{folder}/manifest.json" for folder in sorted(folders)], [f"{folder}/manifest.json" for folder in above]


def beside_claims(summary: dict) -> dict:
    """Whether each claim was stated before its results (`registered`), and the record of the artifacts on which the
    expected values rest (`recorded`), from `recorded/CAMPAIGN.json` beside the campaign's file."""
    configfile = Path(summary["configfile"] or campaign_file.DEFAULT)
    record = configfile.parent / "recorded" / f"{configfile.stem}.json"
    return {
        "registered": registered(summary["claims"], configfile.parent / "experiments"),
        "recorded": read_json(record) if record.is_file() else {},
    }
