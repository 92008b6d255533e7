"""DVC stores and shows what Snakemake made: push, pull on another machine, interruptions, links, experiments."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fabricated import fabricate, rerun

from posttrain.dag import campaign
from posttrain.tools import ledger

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
S3 = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def run(*command: str, ok: bool = True, **environment) -> str:
    """A command's output, with the environment of these tests active."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    known = os.environ | {"PATH": path} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=known)
    assert not ok or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def lay_out(root: Path, folder: Path) -> None:
    """A git repository with the project's rules, and no config yet, which becomes the working directory. It has no
    package of its own, so that these tests' is used in this process too."""
    folder.mkdir()
    os.chdir(folder)
    ours = (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore")
    for name in ("workflow", "envs", *ours):
        (folder / name).parent.mkdir(exist_ok=True)
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("posttrain"))
        else:
            shutil.copy(root / name, folder / name)
    run("git", "init", "-q")


@pytest.fixture(scope="module", autouse=True)
def author():
    """Who commits, and where the tests are afterwards."""
    previous = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        for who in ("AUTHOR", "COMMITTER"):
            patch.setenv(f"GIT_{who}_NAME", "tester")
            patch.setenv(f"GIT_{who}_EMAIL", "tester@example.org")
        yield
    os.chdir(previous)


@pytest.fixture
def repository(root, tmp_path, monkeypatch) -> None:
    """A git repository of the project, as the working directory."""
    monkeypatch.chdir(tmp_path)
    lay_out(root, tmp_path / "project")


@pytest.fixture(scope="module")
def stored(root, tmp_path_factory) -> Path:
    """A folder with a project, of which the campaign of every stage is done and its ledger committed, and its store."""
    folder = tmp_path_factory.mktemp("stored")
    lay_out(root, folder / "project")
    shutil.copytree(HERE / "whole", "config")
    plan = campaign.load("config/config.yaml")
    Path("dvc.yaml").write_text(ledger.ledger(plan))
    fabricate(plan)
    run("dvc", "commit", "-q", "-f", "campaign")
    run("git", "add", "-A")
    run("git", "commit", "-qm", "done")
    shutil.copytree("../project", "../pushed", symlinks=True)
    os.chdir("../pushed")
    remote("../store")
    run("dvc", "push", "-q")
    return folder


@pytest.fixture
def project(stored, tmp_path, monkeypatch) -> Path:
    """A copy of that project, which nothing was pushed from yet, as the working directory."""
    shutil.copytree(stored / "project", tmp_path / "project", symlinks=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def pushed(stored, tmp_path, monkeypatch) -> Path:
    """A copy of that project after it was pushed, as the working directory."""
    for name in ("store", "pushed"):
        shutil.copytree(stored / name, tmp_path / name, symlinks=True)
    monkeypatch.chdir(tmp_path / "pushed")
    return tmp_path / "pushed"


def clone(project: Path, folder: Path, monkeypatch) -> None:
    """Another machine: a clone beside the project, which becomes the working directory."""
    run("git", "clone", "-q", str(project), str(folder))
    monkeypatch.chdir(folder)


@pytest.fixture
def bucket():
    """A server that speaks S3's protocol, and what is to be known of it."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([Path(sys.executable).parent / "moto_server", "-p", str(port)], stderr=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL)  # fmt: skip
    for _ in range(1800):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    boto3.client("s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="test",
                 aws_secret_access_key="test").create_bucket(Bucket="artifacts")  # fmt: skip
    yield url
    server.terminate()
    server.wait()


def remote(url: str, endpoint: str = "") -> None:
    """Name the default remote, and commit it."""
    run("dvc", "remote", "add", "-q", "-f", "-d", "store", url)
    if endpoint:
        run("dvc", "remote", "modify", "-q", "store", "endpointurl", endpoint)
    run("git", "commit", "-qam", "remote")


def change(key: str, value) -> None:
    """Set a key of a section of `whole`."""
    file = Path("config/experiments/whole.yaml")
    values = yaml.safe_load(file.read_text())
    section, _, last = key.partition(".")
    values[section][last] = value
    file.write_text(yaml.safe_dump(values))


DPO = {f"whole/{name}" for name in ("dpo", "evaluate/dpo", "compare/dpo", "lengths/dpo")}


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_clone_that_pulls_needs_nothing_and_reruns_exactly_what_changed(tmp_path, monkeypatch, where, request):
    pushed = request.getfixturevalue("project" if where == "s3" else "pushed")
    if where == "s3":
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for key, value in S3.items():
            monkeypatch.setenv(key, value)
        remote("s3://artifacts/store", request.getfixturevalue("bucket"))
        run("dvc", "push", "-q")
    clone(pushed, tmp_path / "clone", monkeypatch)
    assert "whole/prepare" in rerun(), "control: nothing is there yet"
    run("dvc", "pull", "-q")
    assert rerun() == {}
    assert "No changes" in run("dvc", "diff") or run("dvc", "diff").strip() == ""
    change("dpo.beta", 0.3)
    assert {name for name in rerun() if not name.startswith("other/")} == DPO | {"report"}
    assert "dpo.beta" in run("dvc", "params", "diff")


@pytest.mark.parametrize("link", ["hardlink", "symlink", "copy"])
def test_links_into_the_cache_are_never_written_through(pushed, tmp_path, monkeypatch, link):
    clone(pushed, tmp_path / "clone", monkeypatch)
    run("dvc", "config", "cache.type", link)
    run("dvc", "pull", "-q")
    assert rerun() == {}
    modes = {file: file.stat().st_mode for file in Path(".dvc/cache").rglob("*") if file.is_file()}
    plan = campaign.load("config/config.yaml")
    from posttrain.config.sections import Reference
    from posttrain.jobs import artifact

    def made(section, work, checkpoints, **inputs):
        (work / "data").mkdir()
        (work / "data/bytes").write_text("made anew")
        return {}

    target = Path(plan.folder("whole", "reference"), "manifest.json")
    for _ in range(2):
        artifact.make("reference", made, Reference(), {}, target, keep_gb=1.0)
    assert (target.parent / "data/bytes").read_text() == "made anew"
    assert modes == {file: file.stat().st_mode for file in modes}, "what DVC protects stays protected"
    assert os.access(target.parent / "data/bytes", os.W_OK)
    run("dvc", "commit", "-q", "-f", "campaign")  # what is kept may be a name of DVC's own file now
    modes = {file: file.stat().st_mode for file in Path(".dvc/cache").rglob("*") if file.is_file()}
    target.unlink()
    artifact.make("reference", made, Reference(), {}, target, keep_gb=1.0)
    assert modes == {file: file.stat().st_mode for file in modes}
    run("git", "checkout", "-q", "dvc.lock")
    shutil.rmtree(target.parent)
    run("dvc", "checkout", "-q", "-f")
    assert (target.parent / "data/bytes").read_text() == "results/whole/reference data", "the cache is what it was"
    assert rerun() == {}


def test_a_part_can_be_pulled_alone(pushed, tmp_path, monkeypatch):
    clone(pushed, tmp_path / "clone", monkeypatch)
    run("dvc", "pull", "-q", "results/whole/sft", "results/whole/base", "results/whole/prepare")
    assert sorted(path.name for path in Path("results/whole").iterdir()) == ["base", "prepare", "sft"]
    found = rerun()
    assert not {"whole/sft", "whole/base", "whole/prepare"} & set(found) and "whole/dpo" in found


def test_entering_what_was_pulled_in_part_is_refused(pushed, tmp_path, monkeypatch):
    """Why each artifact is an out of its own: one out for all is entered with the pulled files alone, in silence."""

    def entered() -> int:
        outs = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["campaign"]["outs"]
        return sum(out.get("nfiles", 1) for out in outs)

    part = [f"results/whole/{stage}" for stage in ("sft", "base", "prepare")]
    clone(pushed, tmp_path / "clone", monkeypatch)
    run("dvc", "pull", "-q", *part)
    before = entered()
    assert "does not exist" in run("dvc", "commit", "-f", "campaign", ok=False) and entered() == before
    monkeypatch.chdir(pushed)
    one = {"cmd": "snakemake", "deps": ["workflow/Snakefile"], "outs": [{"results": {"persist": True}}]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"campaign": one}}))
    Path("dvc.lock").unlink()
    run("dvc", "commit", "-q", "-f", "campaign")
    run("git", "commit", "-qam", "one")
    run("dvc", "push", "-q")
    clone(pushed, tmp_path / "other", monkeypatch)
    run("dvc", "pull", "-q", *part)
    before = entered()
    run("dvc", "commit", "-q", "-f", "campaign")
    assert entered() < before / 4, "control: one out for all loses what was not pulled"
    print(f"one out for all: entered with {entered()} files in place of {before}")


def test_an_interrupted_pull_is_nothing_half_believed(pushed, tmp_path, monkeypatch):
    clone(pushed, tmp_path / "clone", monkeypatch)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    pull = subprocess.Popen(["dvc", "pull", "-q"], env=os.environ | {"PATH": path})
    while pull.poll() is None and not list(Path(".").glob("results/*/*")):
        time.sleep(0.001)
    pull.send_signal(signal.SIGKILL)
    pull.wait()
    there = {str(m.parent).removeprefix("results/") for m in Path("results").glob("**/manifest.json")}
    assert "report" not in there, "control: it was interrupted"
    again = set(rerun())
    assert "report" in again
    for name in there - again:  # what is believed is whole, in all that something is built on
        from posttrain.ground.files import verify

        verify(Path("results", name, "manifest.json"))
    run("dvc", "pull", "-q")
    assert rerun() == {}


def test_an_interrupted_push_is_finished_by_the_next(project, tmp_path, monkeypatch):
    """What is in the remote is whole: an object appears under its digest when all of it is there."""
    remote(str(tmp_path / "store"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    push = subprocess.Popen(["dvc", "push", "-q"], env=os.environ | {"PATH": path})
    while push.poll() is None and not list((tmp_path / "store").glob("files/md5/*/*")):
        time.sleep(0.001)
    push.send_signal(signal.SIGKILL)
    push.wait()
    sent = len(list((tmp_path / "store").glob("files/md5/*/*")))
    clone(project, tmp_path / "early", monkeypatch)
    run("dvc", "pull", "-q", ok=False)
    there = {str(m.parent).removeprefix("results/") for m in Path("results").glob("**/manifest.json")}
    assert "report" not in there or "report" not in rerun(), "what was pulled is whole"
    monkeypatch.chdir(project)
    run("dvc", "push", "-q")
    assert len(list((tmp_path / "store").glob("files/md5/*/*"))) > sent, "control: it was interrupted"
    clone(project, tmp_path / "clone", monkeypatch)
    run("dvc", "pull", "-q")
    assert rerun() == {}


def test_what_gc_left_is_what_is_pulled(pushed, tmp_path, monkeypatch):
    run("dvc", "gc", "-q", "-f", "-w", "-c")
    run("dvc", "push", "-q")
    clone(pushed, tmp_path / "clone", monkeypatch)
    run("dvc", "pull", "-q")
    assert rerun() == {}


def test_a_switch_of_commits_is_noticed(project):
    """`git checkout` with `dvc checkout` puts other artifacts in the place of those that Snakemake remembers."""
    assert rerun() == {}
    change("dpo.beta", 0.3)
    assert "whole/dpo" in rerun()
    fabricate(campaign.load("config/config.yaml"), text=" of another beta")
    assert rerun() == {}
    run("dvc", "commit", "-q", "-f", "campaign")
    run("git", "commit", "-qam", "another beta")
    run("git", "checkout", "-q", "HEAD~1")
    assert "whole/dpo" in rerun(), "the config is the first's, the artifacts are not"
    run("dvc", "checkout", "-q")
    assert rerun() == {}
    run("git", "checkout", "-q", "-")
    run("dvc", "checkout", "-q")
    assert rerun() == {}


def test_what_came_from_the_hub_is_not_pushed(project, tmp_path, monkeypatch):
    """It may be gated; who pulls has its own access, and needs it only when something is built on it."""
    rows = [{"dataset": "some/rows", "revision": "86f7e437faa5a7fce15d1ddcb9eaeaea377667b8"}]
    values = yaml.safe_load(Path("config/experiments/whole.yaml").read_text())
    values["prepare"]["sft"] = rows
    Path("config/experiments/whole.yaml").write_text(yaml.safe_dump(values))
    plan = campaign.load("config/config.yaml")
    fabricate(plan)
    Path("dvc.yaml").write_text(ledger.ledger(plan))
    outs = [*campaign.load("config/config.yaml").folders()]
    stored = {
        name for out in yaml.safe_load(Path("dvc.yaml").read_text())["stages"]["campaign"]["outs"] for name in out
    }
    assert set(outs) - stored == {"results/whole/prepare", "results/report"}, "the report is stored file by file"
    run("dvc", "commit", "-q", "-f", "campaign")
    run("git", "add", "-A")
    run("git", "commit", "-qm", "hub")
    remote(str(tmp_path / "store"))
    run("dvc", "push", "-q")
    clone(project, tmp_path / "clone", monkeypatch)
    run("dvc", "pull", "-q")
    assert not Path("results/whole/prepare/data").exists() and Path("results/whole/sft/model").exists()
    assert rerun() == {}


def test_the_ledger_is_up_to_date(root, monkeypatch):
    monkeypatch.chdir(root)
    text = ledger.ledger(campaign.load("config/config.yaml"))
    assert Path("dvc.yaml").read_text() == text, "dvc.yaml is out of date: run `posttrain ledger`"


def test_neither_checkpoints_nor_logs_nor_fetched_bytes_are_stored(project):
    own = ("logs/whole/sft.log", "compute/whole/sft/1.json", "fetch/x/manifest.json", ".kept/abc/x")
    for name in ("whole/sft/checkpoints/abc/weights", *own):
        file = Path("results", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    assert "up to date" in run("dvc", "status").lower(), run("dvc", "status")


def test_repro_and_experiments_for_real(repository):
    """A small base, trained and judged: what a user of DVC types, and what it says."""
    Path("config/experiments").mkdir(parents=True)
    settings = yaml.safe_load((HERE / "mini/experiments/mini.yaml").read_text()) | {"sft": None}
    Path("config/experiments/mini.yaml").write_text(yaml.safe_dump(settings))
    Path("config/config.yaml").write_text("experiments: [mini]\n")
    Path("dvc.yaml").write_text(ledger.ledger(campaign.load("config/config.yaml")))
    run("git", "add", "-A")
    run("git", "commit", "-qm", "config")
    run("dvc", "repro")
    run("git", "add", "-A")
    run("git", "commit", "-qm", "done")
    assert "up to date" in run("dvc", "status")
    assert "didn't change, skipping" in run("dvc", "repro")
    assert "mini.base.world.exact_match" in run("dvc", "metrics", "show", "--md")
    base = Path("results/mini/base/provenance.json").read_text()
    run("dvc", "exp", "run", "-n", "more", "-S", "config/experiments/mini.yaml:evaluate.limit=5")
    assert Path("results/mini/base/provenance.json").read_text() == base, "the base was not trained again"
    assert json.loads(Path("results/mini/evaluate/base/metrics.json").read_text())["limit"] == 5
    shown = run("dvc", "exp", "show", "--csv")
    assert "more" in shown and "evaluate.limit" in shown and "exact_match" in shown
    changed = run("dvc", "params", "diff")
    assert "evaluate.limit" in changed and "5" in changed
    run("dvc", "metrics", "diff")
    assert "index.html" in run("dvc", "plots", "show") and "index.html" in run("dvc", "plots", "diff")
    assert rerun() == {}
    run("git", "checkout", "-q", ".")
    run("dvc", "checkout", "-q")
    assert rerun() == {}, "back before the experiment"
