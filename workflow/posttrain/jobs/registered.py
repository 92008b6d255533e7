"""Whether a claim was stated before its results: git decides, by the commits of the claim and of the artifacts."""

from pathlib import Path
from typing import Any

import yaml

from posttrain.ground.code import PACKAGE
from posttrain.ground.identity import record_of
from posttrain.jobs.provenance import git

PROJECT = PACKAGE.parents[1]


def registered(claims: list[dict], experiments: Path) -> dict[str, str]:
    """Id of a claim -> why it does not count as stated before its results; "" where it does.

    It does where the commit in which it got its present text is that of every measured artifact, or an ancestor of it.
    experiments: the folder of the experiments' files.
    """
    files = {claim["experiment"]: experiments / f"{claim['experiment']}.yaml" for claim in claims}
    commits = {name: _commits(file) for name, file in files.items()}
    return {claim["id"]: _reason(commits[claim["experiment"]].get(claim["id"]), claim) for claim in claims}


def _commits(file: Path) -> dict[str, str]:
    """Id -> the commit in which a claim of a file got its present text; claims that are not committed lack."""
    present = _claims(file.read_text(encoding="utf-8")) if file.is_file() else {}
    log = git(PROJECT, "log", "--format=%H", "--", str(file.resolve()))
    place = git(PROJECT, "ls-files", "--full-name", "--", str(file.resolve()))
    commits: dict[str, str] = {}
    for commit in (log or "").split() if place else ():
        then = _claims(git(PROJECT, "show", f"{commit}:{place}") or "")
        same = {key for key, claim in present.items() if then.get(key) == claim}
        commits |= dict.fromkeys(same, commit)
        present = {key: claim for key, claim in present.items() if key in same}
        if not present:
            break
    return commits


def _claims(text: str) -> dict[str, Any]:
    """The claims in the text of an experiment's file; {} where it cannot be read."""
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    claims = settings.get("claims") if isinstance(settings, dict) else None
    return claims if isinstance(claims, dict) else {}


def _reason(commit: str | None, claim: dict) -> str:
    """Why a claim of a commit does not count as stated before its results."""
    if commit is None:
        return "its present text is in no commit"
    for folder in claim["measured"]["above"]:
        made_at = record_of(Path(folder)).get("git_commit", "unknown").removesuffix("+changes")
        if made_at == "unknown":
            return f"{folder} has no commit on record"
        if git(PROJECT, "merge-base", "--is-ancestor", commit, made_at) is None:
            return f"its commit {commit[:9]} is not among those of {folder}, which was made at {made_at[:9]}"
    return ""
