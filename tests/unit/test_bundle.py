"""A bundle holds a campaign, is checked with Python alone, and holds neither names nor secrets."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fabricated import fabricate

from posttrain.bundle import blind, contents, verify_bundle
from posttrain.dag import campaign
from posttrain.dag.frozen import summary
from posttrain.ground import credentials
from posttrain.ground.errors import UserError
from posttrain.ground.files import manifest_of, write_json
from posttrain.tools.bundle import bundle

WHOLE = Path(__file__).parents[1] / "workflow/whole"
SFT = Path("results/whole/sft")
ZIP = Path("out.zip")
MOST = (
    "tests/",
    "docs/",
    "benchmarks/",
    "workflow/posttrain/data/",
    "workflow/posttrain/models/",
)  # of the code: left out for speed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished campaign of every stage, and its file for the report."""
    folder = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(WHOLE, "config")
        for name in ("a.jsonl", "b.jsonl", "a.jinja"):
            Path(name).write_text(name)
        Path("reward.py").write_text(
            "def short(prompt, reply, answer): ...\n\n\ndef long(prompt, reply, answer): ...\n"
        )
        for name in ("model", "model-b"):
            Path(name).mkdir()
            for part in ("config.json", "tokenizer.json", "model.safetensors"):
                Path(name, part).write_text("{}")
        plan = campaign.load("config/config.yaml")
        fabricate(plan)
        write_json(Path("campaign.json"), summary(plan))
        for manifest in Path("results").glob("*/prepare/manifest.json"):
            seal(
                manifest.parent,
                {"metrics.json": '{"sources": [{"name": "a", "task": "sft", "total": 2, "kept": 1, "dropped": {}}]}'},
            )
    return folder


@pytest.fixture
def done(made, tmp_path, monkeypatch):
    """A copy of it that may be changed."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr("posttrain.bundle.blind.people", lambda: ["Ada Lovelace", "ada@engine.example"])
    monkeypatch.setattr(contents, "KEPT_OUT", (*contents.KEPT_OUT, *MOST))
    return tmp_path / "copy"


def seal(folder, files):
    """Write files of an artifact, and its manifest anew; what was made from it then has other inputs on record."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    write_json(
        folder / "manifest.json",
        manifest_of(folder, ["data", "metrics.json"] if (folder / "data").is_dir() else ["model", "metrics.json"]),
    )
    after = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    for record in Path("results").glob("**/provenance.json"):
        record.write_text(record.read_text().replace(before, after))


def pack(**options):
    return bundle("campaign.json", ZIP, options.pop("largest_mb", 5.0), **options)


def unpacked(folder=Path("unpacked")):
    shutil.rmtree(folder, ignore_errors=True)
    zipfile.ZipFile(ZIP).extractall(folder)
    return folder


def summed(folder):
    """Write the checksums anew, so that a test sees what else is wrong."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "sha256sums.txt")
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder)}\n" for file in files]
    (folder / "sha256sums.txt").write_text("".join(lines))


def refusal(capsys, folder):
    capsys.readouterr()
    assert verify_bundle.verify_bundle(folder) == 1
    return capsys.readouterr().out


def test_it_is_checked_where_the_project_is_not_installed(done):
    told = pack()
    assert "out.zip: " in told and "missing" not in told
    folder = unpacked()
    alone = [sys.executable, "-I", "-S", str(folder.absolute() / "verify_bundle.py")]
    assert subprocess.run(alone, cwd="/", env={}, capture_output=True, text=True).stdout.startswith("valid: ")
    check = ["sha256sum", "--quiet", "--check", "sha256sums.txt"]
    assert subprocess.run(check, cwd=folder).returncode == 0
    assert "workflow/Snakefile" in (folder / "sha256sums.txt").read_text()
    (folder / "results/whole/sft/model/bytes").write_text("other")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1, "control"
    ended = subprocess.run(alone, cwd="/", env={}, capture_output=True, text=True)
    assert ended.returncode == 1 and "results/whole/sft/model/bytes: its bytes are not those" in ended.stdout
    first = ZIP.read_bytes()
    pack()
    assert ZIP.read_bytes() == first, "equal files give equal bytes"


@pytest.mark.parametrize("field", [*verify_bundle.ROOT])
def test_a_missing_field_of_the_crate_is_named(done, capsys, field, crate):
    graph = json.loads((crate / verify_bundle.METADATA).read_text())
    next(entity for entity in graph["@graph"] if entity["@id"] == "./").pop(field)
    (crate / verify_bundle.METADATA).write_text(json.dumps(graph))
    summed(crate)
    assert f"the root dataset: the field {field} is missing" in refusal(capsys, crate)


@pytest.fixture(scope="module")
def whole_crate(made, tmp_path_factory):
    """The bundle of it, unpacked."""
    folder = tmp_path_factory.mktemp("crate") / "crate"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setattr("posttrain.bundle.blind.people", list)
        patch.setattr(contents, "KEPT_OUT", (*contents.KEPT_OUT, *MOST))
        bundle("campaign.json", ZIP, 5.0)
        zipfile.ZipFile(ZIP).extractall(folder)
        ZIP.unlink()
    return folder


@pytest.fixture
def crate(whole_crate, tmp_path, capsys):
    """A copy of it that may be changed."""
    shutil.copytree(whole_crate, tmp_path / "crate")
    assert verify_bundle.verify_bundle(tmp_path / "crate") == 0, "control"
    return tmp_path / "crate"


def test_other_faults_of_a_bundle_are_named(crate, capsys):
    def broken(file, change):
        path = crate / file
        before = path.read_text()
        change(path, before)
        summed(crate)
        told = refusal(capsys, crate)
        path.write_text(before)
        return told

    def without(*keys):
        def change(path, text):
            value = json.loads(text)
            for key in keys:
                value.pop(key)
            path.write_text(json.dumps(value))

        return change

    provenance = "results/whole/sft/provenance.json"
    for field in verify_bundle.PROVENANCE:
        assert f"{provenance}: the field {field} is missing" in broken(provenance, without(field))
    for field in verify_bundle.INDEXED:
        assert f"bundle.json: the field {field} is missing" in broken("bundle.json", without(field))
    other = broken("results/whole/base/manifest.json", lambda path, text: path.write_text(text + " "))
    assert "results/whole/sft: was made from another results/whole/base/manifest.json" in other
    lost = broken("results/whole/base/model/bytes", lambda path, _: path.unlink())
    assert "results/whole/base/model/bytes: of the artifact's manifest, and neither in the bundle" in lost
    changed = broken("results/whole/base/model/bytes", lambda path, _: path.write_text("x"))
    assert "its bytes are not those of the artifact's manifest" in changed
    (crate / "more").write_text("")
    assert "more: stands in no checksum" in refusal(capsys, crate)
    (crate / "bundle.json").write_text("{")
    assert "cannot be read as a bundle" in refusal(capsys, crate)
    with zipfile.ZipFile(crate.parent / "slip.zip", "w") as packed:
        packed.writestr("../slip", "")
    assert "leads out of the bundle" in refusal(capsys, crate.parent / "slip.zip")


def test_names_and_folders_are_replaced_or_refused(done):
    log = Path("results/logs/whole/sft.log")
    log.parent.mkdir(parents=True)
    log.write_text(f"process 7 on node17 by Ada Lovelace: {done}/data/rows.jsonl, /lustre/lab/rows.jsonl, a/b/c\n")
    Path("config/experiments/whole.yaml").write_text("question: Why?\n# ada@engine.example, /lustre/lab/model\n")
    pack()
    folder = unpacked()
    text = (folder / log).read_text()
    assert text == "process 7 on machine-1 by anonymous: ./data/rows.jsonl, PATH/rows.jsonl, a/b/c\n"
    assert json.loads((folder / SFT / "provenance.json").read_text())["host"].startswith("machine-")
    for file in (file for file in folder.rglob("*") if file.is_file()):
        held = [
            name
            for name in (b"node17", b"Ada Lovelace", b"ada@engine", str(done).encode())
            if name in file.read_bytes()
        ]
        assert not held, file
    seal(SFT, {"model/README.md": f"trained by Ada Lovelace in {done}/x"})
    with pytest.raises(UserError) as refused:
        pack()
    assert "results/whole/sft/model/README.md: holds the folder" in str(refused.value)
    assert "--named" in str(refused.value) and not list(Path("results").glob("tmp*"))
    pack(named=True)
    folder = unpacked()
    assert b"Ada Lovelace" in (folder / SFT / "model/README.md").read_bytes()
    assert "node17" in (folder / SFT / "provenance.json").read_text()


CANARIES = ["hf_" + "a" * 34, "sk-" + "b" * 24, "AKIA" + "C" * 16, "ghp_" + "d" * 36, "https://me:" + "pass@host/x"]


def test_a_secret_in_any_file_is_refused_and_not_repeated(done):
    files = [Path("results/logs/whole/sft.log"), SFT / "config.yaml", Path("config/config.yaml")]
    for number, secret in enumerate(CANARIES):
        file = files[number % len(files)]
        file.parent.mkdir(parents=True, exist_ok=True)
        before = file.read_text() if file.exists() else ""
        file.write_text(f"{before}\n# key: {secret}\n")
        with pytest.raises(UserError) as refused:
            pack(named=True)
        assert f"{file}: holds a" in str(refused.value) and secret not in str(refused.value)
        file.write_text(before)
    assert not ZIP.exists()
    pack()


def test_the_projects_own_files_can_be_bundled():
    parts = list(contents.code())
    assert len(parts) > 300 and any(part.name.startswith("tests/") for part in parts)
    told = [fault for part in parts if (fault := blind.faults(part, part.file.read_bytes(), None, []))]
    assert not told


@pytest.mark.parametrize("hidden", [False, True])
def test_a_secret_of_the_environment_is_refused(done, monkeypatch, hidden):
    """Also in a job of Snakemake, from whose environment tokens are taken away."""
    monkeypatch.setenv(credentials.PLACE, "")
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    if hidden:
        credentials.hide()
        assert "WANDB_API_KEY" not in os.environ
    pack()
    seal(SFT, {"model/notes": "correct-horse-battery"})
    with pytest.raises(UserError, match="results/whole/sft/model/notes: holds a secret of the environment"):
        pack()


@pytest.mark.parametrize(
    "text, left",
    [
        ("at /lustre/lab/rows.jsonl:7", "at PATH/rows.jsonl:7"),
        (r'{"reason": "gone:\n/lustre/lab/rows.jsonl"}', r'{"reason": "gone:\nPATH/rows.jsonl"}'),
        ("file:///lustre/lab/rows.jsonl", "file://PATH/rows.jsonl"),
        ("node:/export/lab/rows.jsonl /a/b:/c/d", "node:PATH/rows.jsonl PATH/b:PATH/d"),
        ("https://example.org/a/b ./a/b a/b/c </div> /usr/bin/env 10 s", None),
    ],
)
def test_absolute_paths_are_found_wherever_they_stand(here, monkeypatch, text, left):
    monkeypatch.setattr(blind, "people", list)
    assert blind.Names(["10.0.0.5"]).replaced(text) == (left or text)


def test_what_is_missing_is_an_error_or_named_with_why(done):
    failed = Path("results/whole/dpo/checkpoints/x/failed.json")
    failed.parent.mkdir(parents=True)
    write_json(failed, {"reason": "the loss is nan", "when": "2026-11-30T11:00:00+00:00", "host": "node17"})
    Path("results/whole/dpo/manifest.json").unlink()
    Path("results/whole/evaluate/dpo/manifest.json").unlink()
    with pytest.raises(UserError) as refused:
        pack()
    assert "results/whole/dpo: the loss is nan" in str(refused.value) and "--partial" in str(refused.value)
    assert "2 artifacts are missing, and named so" in pack(partial=True)
    folder = unpacked()
    graph = {entity["@id"]: entity for entity in json.loads((folder / verify_bundle.METADATA).read_text())["@graph"]}
    run = graph["#run-whole/dpo"]
    assert run["actionStatus"].endswith("FailedActionStatus") and run["error"] == "the loss is nan"
    assert graph["#run"]["actionStatus"].endswith("FailedActionStatus") and "#run-whole/evaluate/dpo" not in graph
    assert graph["#run-whole/sft"]["actionStatus"].endswith("CompletedActionStatus"), "control"
    assert "| `results/whole/evaluate/dpo` | not made |" in (folder / "README-bundle.md").read_text()
    (SFT / "model/bytes").write_text("damaged")
    assert "3 artifacts are missing" in pack(partial=True)


def test_large_weights_are_named_by_digest_and_address(done, capsys):
    small = {"model/small.safetensors": "w" * 1000, "model/text": "t" * 2000}  # at the limit, and no weights
    seal(SFT, small | {"model/adapter_model.safetensors": "w" * 2000})
    Path("dvc.lock").write_text("stages: {campaign: {outs: [{path: results/whole/sft, md5: abc.dir}]}}")
    assert "\n1 files (0.0 MB) are named by digest alone" in pack(largest_mb=0.001)
    folder = unpacked()
    assert not (folder / SFT / "model/adapter_model.safetensors").exists()
    assert all((folder / SFT / name).read_text() == text for name, text in small.items()), "control"
    (absent,) = json.loads((folder / "bundle.json").read_text())["absent"]
    assert absent["size"] == 2000 and absent["place"] == "DVC: dvc pull results/whole/sft (md5 abc.dir)"
    assert absent["sha256"] == hashlib.sha256(b"w" * 2000).hexdigest()
    assert "dvc pull results/whole/sft" in (folder / "README-bundle.md").read_text()
    index = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(index | {"absent": []}))
    summed(folder)
    assert "neither in the bundle nor named as absent" in refusal(capsys, folder)


def test_what_came_from_the_hub_is_left_there(done):
    prepare = Path("results/whole/prepare")
    record = json.loads((prepare / "provenance.json").read_text())
    record["inputs"]["fetched"] = {"results/fetch/x.json": "0" * 64}
    write_json(prepare / "provenance.json", record)
    pack()
    folder = unpacked()
    (absent,) = json.loads((folder / "bundle.json").read_text())["absent"]
    assert absent["name"] == "results/whole/prepare/data/bytes" and absent["place"].startswith(
        "the hub: posttrain fetch"
    )
    assert not (folder / prepare / "data").exists() and (folder / prepare / "metrics.json").exists()
    assert (folder / SFT / "model/bytes").exists(), "control"


def test_the_checklists_link_to_files_that_are_there(whole_crate):
    for name in ("checklists/neurips.md", "checklists/acm.md", "README-bundle.md"):
        text = (whole_crate / name).read_text()
        assert "{{" not in text and "None" not in text
        for target in (part.partition(")")[0] for part in text.split("](")[1:]):
            assert target.startswith("http") or ((whole_crate / name).parent / target).exists(), (name, target)
    assert (
        "| a | sft | 2 | 1 | none | unknown | unknown | unknown |"
        in (whole_crate / "cards/whole-prepare.md").read_text()
    )
    assert [f"{n}. **" in (whole_crate / "checklists/neurips.md").read_text() for n in range(1, 17)] == [True] * 16
