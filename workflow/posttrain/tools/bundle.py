"""Pack a campaign for a reviewer as a Workflow Run RO-Crate: code, config, data, results, provenance and checksums.

posttrain bundle [CAMPAIGN] [--partial] [--named] [--largest-mb 5] [--output results/bundle.zip]
"""

import datetime
import importlib.metadata
import shutil
import tempfile
import zipfile
from pathlib import Path

from posttrain.bundle import blind, contents, papers, verify_bundle
from posttrain.bundle.contents import RESULTS, Absent, Part
from posttrain.bundle.crate import Crate
from posttrain.bundle.verify_bundle import INDEX, METADATA, SUMS
from posttrain.dag import campaign as campaign_file
from posttrain.dag.artifacts import at
from posttrain.dag.frozen import summary as summary_of
from posttrain.ground.errors import UserError
from posttrain.ground.files import manifest_of, read_json, read_object, sha256, verify, write_json, write_text
from posttrain.ground.identity import record_of
from posttrain.tools import why

EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of every file in the archive, so that equal files give equal bytes
REPORT = RESULTS / "report"
TOLD = 15  # problems that are named; the others are counted


def bundle(campaign: str, output: Path, largest_mb: float, partial: bool = False, named: bool = False) -> str:
    """Write the bundle of a campaign; returns what it holds.

    campaign: its YAML file, or the JSON file that a run of Snakemake writes for its report. largest_mb: size of a file
    of weights beyond which it is named with its digest in place of its bytes. partial: what is missing is no error.
    named: names and paths stay. Raises UserError for missing artifacts, damaged ones, and for files that hold secrets
    or, unless named, names of people, machines or folders.
    """
    summary, reasons = read_campaign(campaign)
    folders = contents.folders(summary)
    missing = lacking(folders, reasons)
    if missing and not partial:
        raise UserError(
            *first([f"{one['name']}: {one['error'] or 'not made'}" for one in missing]),
            "make what is missing, or bundle what there is: posttrain bundle --partial",
        )
    gone = {one["name"] for one in missing}
    there = [folder for folder in folders if folder not in gone] + only_claimed(folders, gone)
    if not there:
        raise UserError(f"{campaign}: there is no artifact to bundle; run snakemake first")
    parts, absent = parts_of(summary, [*there, *gone], there, largest_mb * 1e6)
    index = index_of(summary, there, missing, absent, blind=not named)
    with tempfile.TemporaryDirectory(dir=RESULTS) as scratch:
        staged = Path(scratch)
        stage(parts, staged, None if named else blind.Names(hosts(there)))
        finish(staged, index, [part.name for part in contents.config(summary)], absent)
        if faults := list(verify_bundle.faults_of(staged)):
            raise UserError(f"{output}: the bundle does not hold what it should", *first(faults))
        pack(staged, output)
    return sentence(output, index)


def first(problems: list[str]) -> list[str]:
    """As many problems as are told, and the number of the others."""
    more = len(problems) - TOLD
    return [*problems[:TOLD], *([f"and {more} more"] if more > 0 else [])]


def read_campaign(campaign: str) -> tuple[dict, dict[str, str]]:
    """(the campaign as the report reads it, folder -> why its artifact is none of it)."""
    if campaign.endswith(".json"):
        summary = read_object(Path(campaign))
        if not {"title", "configfile", "experiments"} <= summary.keys():
            raise UserError(f"{campaign}: is no campaign: name its YAML file")
        return summary, {}
    plan = campaign_file.load(campaign)
    return summary_of(plan), why.stale(plan)


def lacking(folders: list[str], reasons: dict[str, str]) -> list[dict]:
    """The artifacts that are not there or not whole, with the error of those that failed."""
    missing = []
    for folder in folders:
        reason, failed = reasons.get(folder, ""), contents.failure(folder)
        if not reason and Path(folder, "manifest.json").is_file():
            try:
                verify(Path(folder, "manifest.json"))
                if not record_of(Path(folder)):
                    raise UserError(f"{folder}/provenance.json: is gone or cannot be read")
                continue
            except UserError as damage:
                reason = damage.problems[0]
        error = str(failed.get("reason") or reason)
        missing.append({"name": folder, "stage": at(folder).stage, "error": error, "when": failed.get("when")})
    return missing


def only_claimed(folders: list[str], gone: set[str]) -> list[str]:
    """The artifacts on which rulings rest beside those of the campaign, without those made from a missing one."""
    more = []
    for folder in contents.ruled_on():
        record = record_of(Path(folder))
        above = {str(Path(file).parent) for files in record.get("inputs", {}).values() for file in files}
        if folder not in folders and record and not above & gone and not lacking([folder], {}):
            more.append(folder)
        elif folder not in folders:
            gone.add(folder)
    return more


def parts_of(summary: dict, folders: list[str], there: list[str], limit: float) -> tuple[list[Part], list[Absent]]:
    """(the files of the bundle, the weights that are not in it), each once."""
    of_artifacts = [item for folder in there for item in contents.artifact(folder, limit)]
    absent = [item for item in of_artifacts if isinstance(item, Absent)]
    parts = [*contents.code(), *contents.config(summary), *contents.beside_artifacts(folders)]
    parts += [item for item in of_artifacts if isinstance(item, Part)]
    return list({part.name: part for part in parts}.values()), absent


def index_of(summary: dict, there: list[str], missing: list[dict], absent: list[Absent], blind: bool) -> dict:
    """The content of bundle.json."""
    records = [record_of(Path(folder)) for folder in there]
    starts = [datetime.datetime.fromisoformat(record["started"]) for record in records if "started" in record]
    ends = [
        datetime.datetime.fromisoformat(record["started"]) + datetime.timedelta(seconds=round(record["seconds"]))
        for record in records
        if "started" in record and "seconds" in record
    ]
    return {
        "title": summary["title"] or "A posttrain campaign",
        "version": importlib.metadata.version("posttrain"),
        "snakemake": importlib.metadata.version("snakemake"),
        "started": min(starts).isoformat(),
        "published": max(ends).isoformat(),
        "blind": blind,
        "artifacts": [{"name": folder, "stage": at(folder).stage} for folder in there],
        "missing": missing,
        "absent": [one._asdict() for one in absent],
    }


def hosts(folders: list[str]) -> list[str]:
    """The machines on which artifacts were made."""
    return sorted({str(record_of(Path(folder)).get("host", "")) for folder in folders} - {""})


def stage(parts: list[Part], staged: Path, names: blind.Names | None) -> None:
    """Write the files of the bundle into a folder. Raises UserError, naming all of them, for those that hold what the
    bundle must not."""
    problems, secrets = [], blind.environment_secrets()
    for part in parts:
        content = blind.content_of(part, names)
        if fault := blind.faults(part, content, names, secrets):
            problems.append(fault)
        file = staged / part.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    if problems:
        raise UserError(*first(problems))


def finish(staged: Path, index: dict, configs: list[str], absent: list[Absent]) -> None:
    """Write what describes the files: index, cards, checklists, the crate's metadata and the checksums."""
    pages = staged / REPORT
    if (pages / "manifest.json").is_file():  # the pages may have lost names
        write_json(pages / "manifest.json", manifest_of(pages, list(read_json(pages / "manifest.json")["files"])))
    verdict = read_json(pages / "verdict.json") if (pages / "verdict.json").is_file() else {}
    shutil.copyfile(verify_bundle.__file__, staged / "verify_bundle.py")
    for name, text in papers.texts(index, verdict).items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text(text, encoding="utf-8")
    write_json(staged / INDEX, index)
    Crate(staged, index, configs, absent, digests(staged)).write()
    sums = digests(staged)
    write_text(staged / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def digests(folder: Path) -> dict[str, str]:
    """Path -> sha256, of all files in a folder."""
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return {name: sha256(folder / name) for name in files}


def pack(staged: Path, output: Path) -> None:
    """Write the archive by rename; the checksums and the metadata come first in it."""
    names = sorted(digests(staged), key=lambda name: (name not in (SUMS, METADATA, INDEX), name))
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.new")
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in names:
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            packed.writestr(entry, (staged / name).read_bytes())
    beside.replace(output)


def sentence(output: Path, index: dict) -> str:
    """What a bundle holds, and how it is checked."""
    size, absent = output.stat().st_size / 1e6, index["absent"]
    lines = [f"{output}: {len(index['artifacts'])} artifacts, {size:,.1f} MB"]
    if absent:
        large = sum(one["size"] for one in absent) / 1e6
        lines.append(
            f"{len(absent)} files ({large:,.1f} MB) are named by digest alone: weights over --largest-mb, the hub's"
        )
    if index["missing"]:
        lines.append(f"{len(index['missing'])} artifacts are missing, and named so")
    return "\n".join([*lines, f"check it: posttrain verify-bundle {output}"])
