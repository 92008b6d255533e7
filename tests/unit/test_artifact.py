"""Artifacts: what they are, that one is never made twice, and that a damaged one is never built on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.config.sections import Reference, Sft
from posttrain.ground import accepted, code
from posttrain.ground.errors import Interrupted, UserError
from posttrain.ground.files import read_json, write_json
from posttrain.jobs import artifact, compute, damage, kept, provenance
from posttrain.training import parallel, trainers


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(text: str = "made", section=None, experiment: str = "one", **options) -> tuple[Path, list]:
    """Make an artifact that holds a text; returns its manifest, and a list that is empty where nothing ran."""
    calls = []

    def run(section, work, checkpoints, **inputs):
        calls.append(inputs)
        (work / "data").mkdir()
        (work / "data/text").write_text(text)
        return {}

    output = Path(f"results/{experiment}/reference/manifest.json")
    inputs = options.pop("inputs", {})
    artifact.make("reference", run, section or Reference(), inputs, output, **{"keep_gb": 1.0} | options)
    return output, calls


def test_the_same_again_is_taken_from_what_was_kept(folder, capsys):
    compute.noted.clear()
    first, _ = make()
    assert compute.noted.keys() == {"identity"}, "what its account says of it"
    made = first.read_text()
    first.unlink()
    again, calls = make("would be other bytes")
    assert compute.noted == {"identity": read_json(again.with_name("provenance.json"))["identity"], "reused": True}
    assert calls == [] and again.read_text() == made and "reusing an earlier artifact" in capsys.readouterr().err
    assert (again.parent / "data/text").read_text() == "made"
    elsewhere, calls = make(experiment="two")
    assert calls == [] and elsewhere.read_text() == made, "an equal stage of another experiment"
    _, calls = make(section=Reference(batch_size=2))
    assert calls, "control: other settings"
    _, calls = make()
    assert calls == [], "and back again"


def test_what_is_taken_names_its_own_inputs(folder):
    """Else Snakemake would find that it was made from other files."""
    one, two = make(experiment="one-policy")[0], make(experiment="two-policy")[0]
    first, _ = make(experiment="first", inputs={"policy": one})
    second, calls = make(experiment="second", inputs={"policy": two})
    assert calls == []
    records = [read_json(manifest.parent / "provenance.json") for manifest in (first, second)]
    assert [list(record["inputs"]["policy"]) for record in records] == [[str(one)], [str(two)]]
    assert records[0]["identity"] == records[1]["identity"] and records[0]["started"] == records[1]["started"]


def test_several_processes_take_it_or_leave_it_together(folder, monkeypatch):
    """As the first of them says: each looking for itself might find another thing, and wait for ever."""
    from posttrain.training import parallel

    make()
    monkeypatch.setenv("RANK", "1")
    for said in (0.0, 1.0):
        monkeypatch.setattr(parallel, "largest", lambda own, device, said=said: said)
        for section in (Reference(), Reference(batch_size=3)):  # kept, and not
            _, calls = make(section=section)
            assert bool(calls) == bool(said)


def test_nothing_is_kept_or_taken_without_room(folder):
    make(keep_gb=0.0)
    assert not list(folder.glob("results/.kept/*/"))
    make()
    _, calls = make(keep_gb=0.0)
    assert calls, "everything is made anew"


def test_what_was_kept_is_forgotten_over_the_limit(folder):
    for number in range(4):
        make("x" * 1000, Reference(batch_size=number + 1))
    folders = [path for path in kept.KEPT.glob("*") if path.is_dir()]
    assert len(folders) == 4 and len(kept.sizes()) == 3, "the last is in use and takes nothing"
    kept.forget(1500e-9, since=0)
    left = [path for path in kept.KEPT.glob("*") if path.is_dir()]
    assert 1 <= len(left) < 4 and (Path("results/one/reference/data/text")).is_file()


KEEPING = """
import shutil, sys
from pathlib import Path
from posttrain.jobs import kept
forget = kept.forget
kept.forget = lambda limit: forget(limit, since=0)
for number in range(400):
    home = Path(f"home-{sys.argv[1]}-{number}")
    (home / "data").mkdir(parents=True)
    (home / "data/text").write_text("made")
    kept.keep(str(number % 3), home, ["data"], 0.0)
    shutil.rmtree(home)
"""


def test_jobs_keep_and_forget_at_the_same_time(folder):
    """None fails for what another has just replaced or deleted: its artifact is published, and would be lost."""
    script = [sys.executable, "-c", KEEPING]
    jobs = [subprocess.Popen([*script, str(number)], stderr=subprocess.PIPE, text=True) for number in range(3)]
    assert [(job.communicate()[1], job.returncode) for job in jobs] == [("", 0)] * 3
    assert not list(kept.KEPT.glob(".making-*"))


def test_what_is_forgotten_while_it_is_taken_is_made_anew(folder, monkeypatch):
    make()
    link = kept.link

    def forgotten(source, target, parts):
        if source.parent == kept.KEPT:
            (source / "data/text").unlink()
        link(source, target, parts)

    monkeypatch.setattr(kept, "link", forgotten)
    manifest, calls = make(experiment="two")
    assert calls and (manifest.parent / "data/text").read_text() == "made"


def test_a_damaged_kept_artifact_is_not_taken(folder):
    manifest, _ = make()
    (manifest.parent / "data/text").write_text("edited in place: the kept one is the same file")
    _, calls = make()
    assert calls and (manifest.parent / "data/text").read_text() == "made"


def test_other_bytes_of_one_identity_are_reported(folder, capsys):
    make("one")
    manifest, _ = make("other", keep_gb=0.0)
    assert "not reproducible" in read_json(manifest.parent / "provenance.json")["warning"]
    assert "not reproducible" in capsys.readouterr().err
    manifest, _ = make("other", keep_gb=0.0)
    assert "warning" not in read_json(manifest.parent / "provenance.json"), "control: the same bytes"


def test_other_versions_are_named_and_not_taken(folder, monkeypatch):
    make("one")
    monkeypatch.setattr(provenance, "versions", lambda: {"torch": "9.9"})
    manifest, calls = make("other")
    said = read_json(manifest.parent / "provenance.json")["warning"]
    assert calls and said == "the bytes differ from those of an earlier run with other versions"


def test_code_that_was_edited_since_the_run_was_planned_is_refused(folder):
    make(planned=code.fingerprint_of("reference"))
    with pytest.raises(UserError, match="its code was edited after this run was planned; run snakemake again"):
        make(planned="0" * 16)


def test_with_strict_the_lock_counts(folder):
    make(planned=f"{code.fingerprint_of('reference')}+11111111")
    _, calls = make(planned=f"{code.fingerprint_of('reference')}+22222222")
    assert calls


def test_a_damaged_input_is_named_and_loses_its_manifest(folder):
    policy, _ = make(experiment="policy")
    make(inputs={"policy": policy})
    data = policy.parent / "data/text"
    flipped = bytearray(data.read_bytes())
    flipped[0] ^= 1
    data.write_bytes(flipped)
    with pytest.raises(UserError, match=r"data/text: its bytes differ.*\n.*run snakemake again, which remakes it"):
        make(inputs={"policy": policy})
    assert not policy.exists() and (policy.parent / "damaged-manifest.json").exists()


def test_a_reader_learns_which_file_is_damaged(folder, monkeypatch):
    manifest, _ = make()
    (manifest.parent / "data/text").write_text("mAde")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(UserError) as told:
        patch.setattr(Path, "replace", denied)
        damage.verify_artifact(manifest)
    assert "data/text: its bytes differ" in told.value.problems[0]
    assert "its manifest cannot be renamed: Permission denied; who may write there runs" in told.value.problems[1]
    assert manifest.is_file()


def test_files_that_no_manifest_lists_are_compared_with_their_record(folder):
    """The settings, and lm-eval's own record, which the report reads. A kept artifact shares its files."""
    runs = []

    def run(section, work, checkpoints):
        runs.append(work)
        (work / "data").mkdir()
        (work / "data/text").touch()
        (work / "lm_eval.json").write_text("{}")
        return {}

    manifest = Path("results/one/reference/manifest.json")
    for number, name in enumerate(("lm_eval.json", "config.yaml", "metrics.json")):
        artifact.make("reference", run, Reference(), {}, manifest, keep_gb=1.0)
        assert len(runs) == number + 1, "what is kept was damaged with it, and is not taken"
        damage.verify_artifact(manifest)  # control
        manifest.with_name(name).write_text("[]")
        with pytest.raises(
            UserError, match=rf"(?s){name}: .*its manifest says|{name}: its bytes differ from its record"
        ):
            damage.verify_artifact(manifest)
        assert not manifest.exists(), "it is made anew"


def pulled(manifest: Path, folder: Path) -> None:
    """An artifact as it was pulled into another folder, which becomes the working directory."""
    shutil.copytree(manifest.parent, folder / manifest.parent)
    os.chdir(folder)


def test_a_pulled_artifact_that_a_run_replaces_is_taken_again(folder):
    manifest, _ = make()
    pulled(manifest, folder / "clone")
    kept.keep_pulled([str(manifest.parent), "results/none/sft"], 1.0)
    manifest.unlink()
    _, calls = make("other", section=Reference(batch_size=2))
    assert calls, "control: other settings"
    manifest.unlink()
    again, calls = make("would be other bytes")
    assert calls == [] and (again.parent / "data/text").read_text() == "made"


@pytest.mark.parametrize("how", ["file", "provenance", "identity"])
def test_what_was_pulled_in_part_is_not_kept(folder, how):
    manifest, _ = make()
    pulled(manifest, folder / "clone")
    if how == "file":
        (manifest.parent / "data/text").unlink()
    elif how == "provenance":
        (manifest.parent / "provenance.json").unlink()
    else:
        record = read_json(manifest.parent / "provenance.json")
        write_json(manifest.parent / "provenance.json", record | {"identity": "../../elsewhere"})
    kept.keep_pulled([str(manifest.parent)], 1.0)
    assert not Path("results/.kept").exists()


def test_links_into_dvcs_cache_stay_what_they_are(folder):
    """With DVC's `cache.type symlink`: what is kept and taken again is the link, and the cache stays protected."""
    manifest, _ = make()
    cached = folder / "cached"
    (manifest.parent / "data/text").replace(cached)
    cached.chmod(0o444)
    (manifest.parent / "data/text").symlink_to(cached)
    pulled(manifest, folder / "clone")
    text = manifest.parent / "data/text"
    text.unlink()
    text.symlink_to(cached)
    kept.keep_pulled([str(manifest.parent)], 1e-9)
    assert kept.sizes() == {}, "a link takes no room"
    shutil.rmtree(manifest.parent)
    _, calls = make("would be other bytes")
    assert calls == [] and text.is_symlink() and text.read_text() == "made"
    assert cached.stat().st_mode & 0o777 == 0o444


def test_identity_is_what_goes_in_and_not_where_it_lies(folder):
    def name(**changes) -> str:
        given = {"stage": "sft", "section": {"a": 1, "b": 2}, "code": "c", "read": {"data": {"x/manifest.json": "d1"}}}
        return artifact.identity(**given | changes)

    assert name() == name(read={"data": {"y/manifest.json": "d1"}})
    for change in (
        {"stage": "dpo"},
        {"section": {"a": 2, "b": 1}},
        {"code": "other"},
        {"read": {"data": {"x/manifest.json": "d2"}}},
        {"read": {"base": {"x/manifest.json": "d1"}}},
    ):
        assert name() != name(**change), change


def test_the_record_counts_the_time_of_every_attempt(folder):
    def stopped(section, work, checkpoints, **inputs):
        begun = trainers.Heartbeat(checkpoints, 10)
        begun.begun -= 7200
        begun.beat(3, "loss 1")
        again = trainers.Heartbeat(checkpoints, 10, 3)
        again.begun -= 3600
        again.beat(5, "loss 1")
        raise Interrupted("saved")

    output = Path("results/one/reference/manifest.json")
    with pytest.raises(Interrupted):
        artifact.make("reference", stopped, Reference(), {}, output, keep_gb=1.0)
    make()
    assert read_json(output.with_name("provenance.json"))["seconds"] == pytest.approx(10800, abs=60)
    make("control", section=Reference(batch_size=2))
    assert read_json(output.with_name("provenance.json"))["seconds"] < 60


def test_the_shape_is_that_of_the_micro_batches_that_fitted(monkeypatch):
    section = Sft(batch_size=8)
    assert provenance.parts_of(section) == {"micro_batch": 8, "accumulation": 1}
    monkeypatch.setattr(parallel, "fits", 2)  # after a GPU had not the memory for more
    assert provenance.parts_of(section) == {"micro_batch": 2, "accumulation": 4}


def test_the_record_says_what_it_was_made_from(folder):
    policy, _ = make(experiment="policy")
    manifest, _ = make("more", inputs={"policy": policy})
    record = read_json(manifest.parent / "provenance.json")
    assert list(record["inputs"]["policy"]) == [str(policy)] and record["params"][0].startswith('{"batch_size":64')
    assert record["code"] == code.definitions("reference") and record["shape"]["versions"]["torch"]
    assert (manifest.parent / "config.yaml").read_text().strip() == record["params"][0]
    assert "config.yaml" not in read_json(manifest)["files"], "what it was made from is no part of its bytes"


def test_a_file_system_without_hard_links_keeps_nothing(folder, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
    _, calls = make()
    again, calls = make()
    assert calls and again.exists()


def test_a_key_that_a_stage_never_reads_is_in_its_record(folder):
    def reads(section, work, checkpoints):
        (work / "data").mkdir()
        (work / "data/text").write_text(str(section.batch_size))
        return {}

    output = Path("results/one/reference/manifest.json")
    artifact.make("reference", reads, Reference(), {}, output)
    assert read_json(output.parent / "provenance.json")["unread"] == ["precision"]


def test_sections_within_sections_are_watched():
    from posttrain.config.sections import Evaluate, Ppo, Task, Watched, slice_of, unread

    read: set[str] = set()
    ppo = Watched(Ppo(), read)
    assert ppo.rails.max_kl == 50.0 and isinstance(ppo, Ppo) and ppo.steps == 40
    assert {"rails", "rails.max_kl", "steps"} == read
    assert "rails.max_growth" in unread(slice_of(Ppo()), read) and "rails.max_kl" not in unread(slice_of(Ppo()), read)
    read = set()
    section = Evaluate(tasks=[Task(task="a"), Task(task="b", shots=1)])
    assert [task.task for task in Watched(section, read).tasks] == ["a", "b"]
    assert unread(slice_of(section), read) == ["batch_size", "seed", "tasks.allow_floating", "tasks.shots"]


def test_accepted_code_makes_the_artifact_of_the_code_that_it_counts_as(folder, monkeypatch):
    """Of the same identity: it is taken from what was kept, and checkpoints are found."""
    own = code.fingerprint_of("reference")
    record = {
        "stage": "reference",
        "from": "0" * 16,
        "to": own,
        "because": "x",
        "date": "y",
        "by": "z",
        "shown": "word",
    }
    monkeypatch.setattr(accepted, "file", lambda: folder / "accepted.json")
    write_json(accepted.file(), [record])
    manifest, calls = make(planned="0" * 16)
    made = read_json(manifest.parent / "provenance.json")
    assert calls and made["params"][1] == "0" * 16 and made["accepted"] == [record]
    with pytest.raises(UserError, match="its code was edited after this run was planned"):
        make(planned=own)
    accepted.file().unlink()
    with pytest.raises(UserError, match="its code was edited after this run was planned"):
        make(planned="0" * 16)
