"""The files of a bundle: the project's code, the campaign's config, its artifacts, its report and its logs."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from posttrain.dag.artifacts import at
from posttrain.dag.campaign import DEFAULT
from posttrain.ground.code import PACKAGE
from posttrain.ground.files import listed, sha256
from posttrain.ground.identity import record_of
from posttrain.reporting.compute import FOLDER
from posttrain.training import spotchecks

PROJECT = PACKAGE.parents[1]
RESULTS = Path("results")
BESIDE = ("manifest.json", "provenance.json", "config.yaml", "lm_eval.json")  # of an artifact, in no manifest
FROM_HUB = ("base", "prepare")  # stages whose artifacts may hold what came from there
KEPT_OUT = (".dvc/", ".github/", "results/", "slurm/site.yaml")  # a remote's address, a site's accounts

# How a file is treated: LISTED is of an artifact's manifest and stays as it is; CODE stays as it is too; names and
# folders in OWN, the campaign's settings, records and logs, are replaced.
LISTED, CODE, OWN = "listed", "code", "own"


class Part(NamedTuple):
    """A file of the bundle: its path in it, where it is, and how it is treated."""

    name: str
    file: Path
    kind: str


class Absent(NamedTuple):
    """A file of an artifact whose bytes are not in the bundle. place: where they are."""

    name: str
    sha256: str
    size: int
    place: str


def code() -> Iterator[Part]:
    """The project's files that git tracks; all of the workflow and its pins outside a repository."""
    listing = subprocess.run(["git", "-C", str(PROJECT), "ls-files", "-z"], capture_output=True, text=True)
    names = listing.stdout.split("\0") if listing.returncode == 0 and listing.stdout else list(untracked())
    for name in sorted(filter(None, names)):
        if not name.startswith(KEPT_OUT) and (PROJECT / name).is_file():
            yield Part(name, PROJECT / name, OWN if name.startswith("config/") else CODE)


def untracked() -> Iterator[str]:
    """The files of the workflow and its pins."""
    for folder in ("workflow", "envs"):
        for file in (PROJECT / folder).rglob("*"):
            if "__pycache__" not in file.parts:
                yield str(file.relative_to(PROJECT))


def config(summary: dict) -> Iterator[Part]:
    """The campaign's file and those of its experiments; they need not be tracked, nor lie in config/."""
    configfile = Path(summary["configfile"] or DEFAULT)
    names = dict.fromkeys(experiment["name"].partition("@")[0] for experiment in summary["experiments"])
    folder = os.path.relpath(configfile.parent)
    folder = "campaign" if folder.startswith("..") else folder  # it lies outside of the project
    for name in [configfile.name, *(f"experiments/{name}.yaml" for name in names)]:
        if (configfile.parent / name).is_file():
            yield Part(os.path.normpath(f"{folder}/{name}"), configfile.parent / name, OWN)


def folders(summary: dict) -> list[str]:
    """The folders of the artifacts that a campaign makes, each once."""
    made = (folder for experiment in summary["experiments"] for folder in experiment["stages"].values())
    return list(dict.fromkeys(made))


def ruled_on() -> list[str]:
    """The folders of the artifacts on which the report's rulings rest, those that only claims need too."""
    try:
        rulings = json.loads((RESULTS / "report" / "verdict.json").read_text(encoding="utf-8"))["rulings"]
        return list(dict.fromkeys(folder for ruling in rulings for folder in ruling["artifacts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return []


def artifact(folder: str, limit: float) -> Iterator[Part | Absent]:
    """The files of an artifact. limit: bytes of a file of weights beyond which it is absent.

    Models and data from the hub are absent: they may be gated, and are fetched from there.
    """
    outs, fetched = dvc_outs(), record_of(Path(folder)).get("inputs", {}).get("fetched")
    from_hub = bool(fetched) and at(folder).stage in FROM_HUB
    for name, (digest, size) in sorted(listed(Path(folder) / "manifest.json").items()):
        path = f"{folder}/{name}"
        if from_hub and name.startswith(("data/", "model/")):
            yield Absent(path, digest, size, f"the hub: posttrain fetch; the ids are in {folder}/config.yaml")
        elif size > limit and is_weights(name):
            yield Absent(path, digest, size, stored_as(path, outs))
        else:
            yield Part(path, Path(path), LISTED)
    for name in BESIDE:
        if Path(folder, name).is_file():
            yield Part(f"{folder}/{name}", Path(folder, name), OWN)
    yield from states(folder, limit)


def states(folder: str, limit: float) -> Iterator[Part | Absent]:
    """The states of a training that `posttrain spotcheck` replays, where it kept some."""
    for file in sorted(Path(folder, spotchecks.FOLDER).rglob("*")):
        if file.is_file() and file.stat().st_size > limit:
            yield Absent(str(file), sha256(file), file.stat().st_size, "unknown: a state of the training")
        elif file.is_file():
            yield Part(str(file), file, LISTED)


def is_weights(name: str) -> bool:
    """Whether a file of an artifact holds weights: a model's tensors, or the log-probabilities of a reference."""
    return name.endswith((".safetensors", ".npz", ".npy"))


def dvc_outs() -> dict[str, str]:
    """Path -> digest, of what DVC has stored of the campaign; {} without its lock file."""
    try:
        lock = yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8"))
        return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage.get("outs", [])}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}


def stored_as(path: str, outs: dict[str, str]) -> str:
    """The out of DVC that holds a file, with its digest and the command that brings it."""
    places = (f"DVC: dvc pull {out} (md5 {md5})" for out, md5 in outs.items() if f"{path}/".startswith(f"{out}/"))
    return next(places, "unknown: not in DVC")


def beside_artifacts(folders: list[str]) -> Iterator[Part]:
    """The report, and the logs and accounts of attempts of some artifacts; those of an artifact that failed too."""
    files = sorted((RESULTS / "report").rglob("*"))
    for folder in folders:
        name = Path(folder).relative_to(RESULTS)
        files += [(RESULTS / "logs" / name).with_suffix(".log"), *sorted((RESULTS / FOLDER / name).glob("*.json"))]
    for file in files:
        if file.is_file() and not file.name.startswith("."):
            yield Part(str(file), file, OWN)


def failure(folder: str) -> dict:
    """Why the last attempt at an artifact failed; {} where none did."""
    records = sorted(Path(folder, "checkpoints").glob("*/failed.json"), key=lambda file: file.stat().st_mtime)
    try:
        return json.loads(records[-1].read_text(encoding="utf-8")) if records else {}
    except (OSError, ValueError):
        return {}
