"""A folder of a group: its users run, look, and take over from each other; a run as people see it, of one stage.

As root these are two users of one group, else one user, and what is about permissions is skipped.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from project import commit_of, copy_of, environment

FIRST, SECOND, GROUP = 60001, 60002, 60010
TARGET = "results/mini/prepare/manifest.json"
LOOK = """
import sys
from posttrain.__main__ import main
from snakemake.cli import main as snakemake
assert main(["status"]) == main(["why"]) == 0
sys.argv = ["snakemake", "-n", sys.argv[1]]
snakemake(sys.argv[1:])
"""


def as_user(user: int) -> list[str]:
    """The start of a command of another user, who may read everything: the environment may lie in root's own folder."""
    who = [f"--reuid={user}", f"--regid={GROUP}", "--clear-groups"]
    return ["setpriv", *who, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def can_change_user() -> bool:
    """Whether these tests may start processes of other users."""
    if os.getuid() or not shutil.which("setpriv"):
        return False
    return subprocess.run([*as_user(FIRST), "true"], capture_output=True).returncode == 0


SEVERAL = can_change_user()
alone = pytest.mark.skipif(not SEVERAL, reason="only root, with setpriv, may run processes of two users")


def run(folder: Path, user: int, *command: str, umask: int = 0o002) -> subprocess.CompletedProcess:
    """A command of a user in a folder. Snakemake asks for the user's name, which is in the environment alone."""
    names = {"USER": f"user{user}", "LOGNAME": f"user{user}", "HOME": str(folder / f"home-{user}")}
    start = as_user(user) if SEVERAL else []
    environ = environment(OMP_NUM_THREADS="1", **names)
    return subprocess.run([*start, *command], cwd=folder, capture_output=True, text=True, env=environ, umask=umask)


@pytest.fixture(scope="module")
def place():
    """A folder that every user may enter; pytest's own are for one."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def folder(root, place) -> Path:
    """A copy of the project with a tiny campaign, which belongs to the group."""
    folder = copy_of(root, place / "project")
    shutil.rmtree(folder / "config")
    (folder / "config/experiments").mkdir(parents=True)
    (folder / "config/config.yaml").write_text("experiments: [mini]\n")
    write(folder, documents=20)
    commit_of(folder)
    if SEVERAL:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 0, GROUP)
            path.chmod(0o2775 if path.is_dir() else 0o664)
        for user in (FIRST, SECOND):
            (folder / f"home-{user}").mkdir()
            os.chown(folder / f"home-{user}", user, GROUP)
    return folder


def write(folder: Path, documents: int) -> None:
    """The experiment, with a number of documents."""
    world = {"documents": documents, "questions": 20, "test_questions": 5, "pairs": 5}
    prepare = {"world": world, "tokenizer": {"vocab_size": 300}}
    settings = {"question": "Who runs it?", "prepare": prepare, "base": {"scratch": {}}, "evaluate": {}}
    (folder / "config/experiments/mini.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def first(folder) -> subprocess.CompletedProcess:
    """The run of the first user."""
    ran = run(folder, FIRST, "snakemake", "--cores", "1", TARGET)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran


def test_a_run_of_one_target_ends_with_what_it_made_and_enters_its_artifacts(folder, first):
    assert "made: mini/prepare\nresults/report: there is no report; run snakemake" in first.stdout
    assert "dvc.yaml: written for the artifacts of config/config.yaml" in first.stderr
    assert "results/mini/base:" in (folder / "dvc.yaml").read_text()


def record(folder: Path) -> dict:
    """The provenance of what was made."""
    return json.loads((folder / "results/mini/prepare/provenance.json").read_text())


def files_of_runs(folder: Path) -> dict[str, os.stat_result]:
    """The files and folders that runs made."""
    paths = [path for top in (".snakemake", "results") for path in (folder / top, *(folder / top).rglob("*"))]
    return {str(path.relative_to(folder)): path.lstat() for path in paths}


@alone
def test_what_is_made_belongs_to_the_group_which_may_write_it(folder, first):
    statuses = files_of_runs(folder)
    assert {TARGET, "results/.kept", ".snakemake/controller.json"} <= statuses.keys()
    assert [name for name, status in statuses.items() if status.st_gid != GROUP] == []
    allowed = {name: stat.S_IMODE(status.st_mode) & 0o777 for name, status in statuses.items()}
    assert [name for name, mode in allowed.items() if mode & 0o060 != 0o060] == []
    assert [name for name, mode in allowed.items() if mode & 0o002] == [], "control: others may not"


def changes(folder: Path) -> dict[Path, tuple]:
    """When each file and folder below a folder was changed, and which it is."""
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (status.st_mtime_ns, status.st_ctime_ns, status.st_ino) for path, status in stats.items()}


def test_the_second_user_looks_and_changes_nothing(folder, first):
    before = changes(folder / "results")
    looked = run(folder, SECOND, sys.executable, "-c", LOOK, TARGET)
    assert looked.returncode == 0, looked.stderr[-3000:]
    assert "mini/prepare" in looked.stdout and "Nothing to be done" in looked.stdout
    assert changes(folder / "results") == before


def test_the_second_user_takes_over_from_the_first_and_keeps_what_was_pulled(folder, first):
    """The first one's Snakemake died, with its lock; what it made counts as pulled, as nothing of it is kept."""
    lock = folder / ".snakemake/locks/0.input.lock"
    assert run(folder, FIRST, "bash", "-c", f"mkdir -p {lock.parent} && touch {lock}").returncode == 0
    shutil.rmtree(folder / "results/.kept")
    before = record(folder)["identity"]
    write(folder, documents=21)
    ran = run(folder, SECOND, "snakemake", "--cores", "1", TARGET)
    assert ran.returncode == 0 and "cleared the lock of a Snakemake that died" in ran.stderr, ran.stderr[-3000:]
    kept = {path.name for path in (folder / "results/.kept").iterdir() if path.is_dir()}
    assert kept == {before, record(folder)["identity"]} and len(kept) == 2
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()
    assert record(folder)["git_commit"] == f"{commit}+changes", "of a repository that belongs to another user"
    assert (folder / TARGET).stat().st_uid == (SECOND if SEVERAL else os.getuid())


@alone
def test_a_strict_umask_is_kept(folder, first, place):
    own = place / "own"
    own.mkdir()
    os.chown(own, FIRST, GROUP)
    section = str(folder / "results/mini/prepare/config.yaml")
    output = str(own / "prepare/manifest.json")
    ran = run(folder, FIRST, "posttrain", "prepare", "--config", section, "--output", output, umask=0o077)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert [path for path in own.rglob("*") if path.lstat().st_mode & 0o077] == [] and Path(output).is_file()
