"""Print the verdict on a campaign's claims, after a check that no artifact under it has changed.

posttrain verdict [results/report/verdict.json] [--record config/recorded/config.json]
"""

from pathlib import Path

from posttrain.ground.errors import UserError, gather
from posttrain.ground.files import read_json, write_json
from posttrain.jobs.damage import verify_artifact
from posttrain.reporting.departure import snapshot
from posttrain.reporting.verdict import table


def verdict(file: Path, record: Path | None = None) -> int:
    """Print the rulings, and return 0 if all of them hold, else 1.

    record: the file to which the artifacts under the claims are recorded. Raises UserError for a damaged artifact.
    """
    if not file.is_file():
        raise UserError(f"{file}: there is no verdict; run snakemake verify")
    ruled = read_json(file)
    folders = dict.fromkeys(folder for ruling in ruled["rulings"] for folder in ruling["artifacts"])
    manifests = [Path(folder) / "manifest.json" for folder in folders]
    gather(verify_artifact, [manifest for manifest in manifests if manifest.is_file()])
    if record:
        snapshots = {folder: snapshot(Path(folder)) for folder in folders}
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {folder: taken for folder, taken in snapshots.items() if taken})
    print(table(ruled))
    return 0 if ruled["holds"] else 1
