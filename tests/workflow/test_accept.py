"""`posttrain accept`: an edit of code that changes no result reruns nothing, a later one does, and both are told."""

import json
import shutil
from pathlib import Path

import pytest
from fabricated import RERUN, fabricate, forget, rerun

from posttrain.__main__ import main
from posttrain.dag import campaign
from posttrain.ground import accepted, code
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, write_json
from posttrain.tools import why
from posttrain.tools.accept import accept

WHY = "a loop became a comprehension"


def load():
    return campaign.load("config/config.yaml")


def change(package, module: str, number: int = 1) -> None:
    """Edit a stage's code."""
    file = (package / module).with_suffix(".py")
    file.write_text(f"{file.read_text()}\nedit({number})\n")
    forget()


def test_an_accepted_edit_reruns_nothing_and_a_later_one_does(package, capsys):
    before = code.fingerprint_of("dpo")
    change(package, "stages/dpo")
    edited = code.fingerprint_of("dpo")
    assert "whole/dpo" in rerun(), "control"
    assert main(["accept", "dpo", "--because", WHY]) == 0
    assert f"dpo: {before} -> {edited} accepted" in (said := capsys.readouterr().out) and f"(word): {WHY}" in said
    assert rerun() == {}
    assert why.why(load()).startswith(why.NOTHING) and WHY in why.why(load())
    change(package, "stages/dpo", 2)
    assert {name for name in rerun() if name.startswith("whole")} == {
        f"whole/{name}" for name in RERUN["dpo"] - {"report"}
    }
    assert "code: stages.dpo: (module)" in why.why(load())
    accept(load(), ["dpo"], "and another")
    assert rerun() == {} and accepted.standing("dpo") == before, "a chain counts as its first"
    assert [record["to"] for record in accepted.chain("dpo", code.fingerprint_of("dpo"))][-1] != edited


def test_the_old_code_and_the_accepted_one_are_equal(package):
    """Going back and forth between commits, or branches of which one has no record."""
    text = (package / "stages/dpo.py").read_text()
    change(package, "stages/dpo")
    accept(load(), [], WHY)
    (package / "stages/dpo.py").write_text(text)
    forget()
    assert rerun() == {}, "the code as it was"
    change(package, "stages/dpo")
    assert rerun() == {}
    accepted.file().unlink()
    assert "whole/dpo" in rerun(), "control: a clone without the record"


def test_several_stages_and_what_is_built_on_them(package, tmp_path, monkeypatch):
    change(package, "ground/files")
    assert "whole/prepare" in rerun()
    accept(load(), [], WHY)
    assert rerun() == {}
    stages = {record["stage"] for record in accepted.records()}
    assert {"prepare", "sft", "report"} <= stages and len(stages) == len(accepted.records())
    shutil.copytree(".", tmp_path / "copy", symlinks=True, ignore=shutil.ignore_patterns(".snakemake"))
    monkeypatch.chdir(tmp_path / "copy")
    assert rerun() == {}, "pulled into another clone, without Snakemake's records"


def test_one_of_several_stages_alone(package):
    change(package, "ground/files")
    accept(load(), ["reward"], WHY)
    again = rerun()
    assert "whole/sft" in again and accepted.standing("reward") == load().code["reward"]
    with pytest.raises(UserError, match="reward: its code has not changed"):
        accept(load(), ["reward"], WHY)
    with pytest.raises(UserError, match="nosuch: no such stage; known: prepare"):
        accept(load(), ["nosuch"], WHY)
    with pytest.raises(UserError, match="--because: say in one line why"):
        accept(load(), ["sft"], " ")


def test_without_an_edit_there_is_nothing_to_accept(package, capsys):
    assert main(["accept", "--because", WHY]) == 2
    assert "no stage's code has changed" in capsys.readouterr().err and not accepted.file().exists()
    assert main(["accept", "dpo", "--because", WHY]) == 2
    assert "dpo: its code has not changed since its artifacts were made" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is nothing to accept"):
        accept(load(), ["dpo"], WHY, former=code.fingerprint_of("dpo"))


def test_artifacts_of_several_codes_ask_which_is_meant(package):
    first = code.fingerprint_of("dpo")
    change(package, "stages/dpo")
    fabricate(load(), ["results/whole/dpo"])
    second = code.fingerprint_of("dpo")
    record = read_json(Path("results/whole/dpo/provenance.json"))
    shutil.copytree("results/whole/dpo", "results/other/dpo")
    record["params"][1] = first
    write_json(Path("results/other/dpo/provenance.json"), record)
    change(package, "stages/dpo", 2)
    plan = load()
    both = [*plan.artifacts(), plan.artifact("whole", "dpo")._replace(experiment="other")]
    plan.artifacts = lambda: both
    with pytest.raises(UserError, match=f"2 other codes; name one: .*--from {second}"):
        accept(plan, ["dpo"], WHY)
    accept(plan, ["dpo"], WHY, former=second)
    assert accepted.standing("dpo") == second
    with pytest.raises(UserError, match=f"is accepted as {second} and cannot count as {first} too"):
        accept(plan, ["dpo"], WHY, former=first)
    shutil.rmtree("results/other/dpo")


def test_without_artifacts_the_code_is_named(package):
    shutil.rmtree("results/whole/dpo")
    before = code.fingerprint_of("dpo")
    change(package, "stages/dpo")
    with pytest.raises(UserError, match="dpo: no artifact here records its former code; name it: --from"):
        accept(load(), ["dpo"], WHY)
    accept(load(), ["dpo"], WHY, former=before)
    assert load().code["dpo"] == before


def test_the_same_bytes_are_a_proof(package, tmp_path):
    before = code.fingerprint_of("dpo")
    old, new = Path("results/whole/dpo"), tmp_path / "again/dpo"
    change(package, "stages/dpo")
    shutil.copytree(old, new)
    with pytest.raises(UserError, match="must be made by the former code"):
        accept(load(), ["dpo"], WHY, same=[old, new])
    record = read_json(new / "provenance.json") | {"code": code.definitions("dpo")}
    write_json(new / "provenance.json", record)
    with pytest.raises(UserError, match="apply to one stage: name it"):
        accept(load(), [], WHY, same=[old, new])
    with pytest.raises(UserError, match="must both be artifacts of sft"):
        accept(load(), ["sft"], WHY, same=[old, new])
    write_json(new / "provenance.json", record | {"params": ["{}", *record["params"][1:]]})
    with pytest.raises(UserError, match="differ in their settings or inputs"):
        accept(load(), ["dpo"], WHY, same=[old, new])
    write_json(new / "provenance.json", record)
    manifest = (new / "manifest.json").read_text()
    (new / "manifest.json").write_text(f"{manifest} ")
    with pytest.raises(UserError, match="differ in their bytes"):
        accept(load(), ["dpo"], WHY, same=[old, new])
    (new / "manifest.json").write_text(manifest)
    (new / "model/bytes").write_text("x")
    with pytest.raises(UserError, match="its manifest says"):
        accept(load(), ["dpo"], WHY, same=[old, new])
    shutil.copy(old / "model/bytes", new / "model/bytes")
    assert "(same bytes)" in accept(load(), ["dpo"], WHY, same=[old, new])
    assert accepted.standing("dpo") == before and rerun() == {}


def test_strict_counts_the_versions_as_ever(package):
    file = Path("config/config.yaml")
    text = file.read_text()
    file.write_text(f"{text}strict: true\n")
    fabricate(load())
    change(package, "stages/dpo")
    accept(load(), ["dpo"], WHY)
    assert rerun() == {} and "+" in load().code["dpo"]
    file.write_text(text)


def test_what_is_made_with_accepted_code_says_so(package):
    assert "accepted" not in accepted.of_code("dpo")
    change(package, "stages/dpo")
    accept(load(), ["dpo"], WHY)
    (record,) = accepted.of_code("dpo")["accepted"]
    assert record["because"] == WHY and record["to"] == code.fingerprint_of("dpo")


RECORD = {
    "stage": "dpo",
    "from": "0" * 16,
    "to": "1" * 16,
    "because": "x",
    "date": "2026-01-01",
    "by": "a",
    "shown": "word",
}
NONSENSE = {
    "{": "accepted.json: is not valid JSON",
    "{}": "accepted.json: found dict, it should be a list of records",
    "[1]": "accepted.json: record 1: must have the keys because, by, date",
    json.dumps([RECORD | {"to": 1}]): "record 1: must have the keys",
    json.dumps([RECORD | {"more": "x"}]): "record 1: must have the keys",
    json.dumps([RECORD, RECORD]): "record 2: dpo 1111111111111111 is accepted twice",
    json.dumps([RECORD | {"to": "0" * 16}]): "record 1: dpo 0000000000000000 is accepted twice, or as itself",
}


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_in_the_file_is_named_with_its_place(package, text):
    accepted.file().write_text(text)
    with pytest.raises(UserError, match=NONSENSE[text].replace("[", r"\[")):
        load()


def test_a_circle_is_named(package):
    own = code.fingerprint_of("dpo")
    write_json(accepted.file(), [RECORD | {"to": own}, RECORD | {"from": own, "to": "0" * 16}])
    with pytest.raises(UserError, match=f"the records of dpo form a circle at {own}"):
        load()
    write_json(accepted.file(), [RECORD | {"stage": "sft", "to": own}])
    assert load().code["dpo"] == own, "control: another stage's records say nothing"
