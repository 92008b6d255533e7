"""`posttrain why`, `verify` and `clean`: what they say, on artifacts as stages leave them."""

import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from fabricated import fabricate, forget

from posttrain.__main__ import main
from posttrain.dag import campaign
from posttrain.dag.frozen import freeze
from posttrain.ground import code
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, write_json
from posttrain.ground.identity import write_named
from posttrain.tools import clean, status, why

HERE = Path(__file__).parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The campaign of every stage, done."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(HERE / "whole", tmp_path / "config")
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs/requirements.txt").write_text("torch==1\n")
    fabricate(load())
    return tmp_path


def load():
    return campaign.load("config/config.yaml")


def edit(**sections) -> None:
    """Set sections of `whole`."""
    file = Path("config/experiments/whole.yaml")
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | sections))


def block(said: str, folder: str) -> str:
    """The lines about one artifact."""
    return said.split(f"{folder}\n")[1].split("\nresults/")[0]


def test_nothing_stale_is_said_in_one_line(project):
    assert why.why(load()) == why.NOTHING
    assert why.why(load(), "whole/dpo") == "Nothing of whole/dpo is stale."


def test_what_other_settings_made_is_left_out_of_a_partial_report(project):
    assert why.stale(load()) == {}, "control"
    edit(dpo={"beta": 0.3})
    Path("results/whole/ppo/manifest.json").unlink()
    stale = why.stale(load())
    assert {"results/whole/dpo", "results/whole/evaluate/dpo", "results/whole/compare/dpo"} <= stale.keys()
    assert stale["results/whole/dpo"].endswith("posttrain why whole/dpo")
    assert not {"results/whole/sft", "results/whole/evaluate/sft", "results/whole/ppo"} & stale.keys()


def test_the_summary_is_that_of_the_plan_or_is_refused(project, capsys):
    assert main(["summary"]) == 0
    assert capsys.readouterr().out.endswith("report: results/report/index.html\n"), "control"
    edit(dpo={"beta": 0.3})
    assert main(["summary"]) == 2
    told = capsys.readouterr()
    assert not told.out and "results/report: is another campaign's, or the settings" in told.err


def test_a_key_is_named_with_both_values_what_follows_and_what_it_costs(project):
    edit(dpo={"beta": 0.3})
    said = why.why(load())
    assert "  dpo.beta: 0.1 -> 0.3" in block(said, "results/whole/dpo")
    assert "overwrites the artifact of" in block(said, "results/whole/dpo")
    assert "follows results/whole/dpo" in block(said, "results/whole/evaluate/dpo")
    assert "takes about 1 min" in block(said, "results/whole/dpo")
    assert said.splitlines()[-1].startswith("6 to be made: about 6 min"), said
    assert "results/whole/sft" not in said.replace("results/whole/sft/", "").split("follows")[0]


def test_status_calls_it_stale(project):
    lines = dict(line.split(maxsplit=1) for line in status.table(load()).splitlines())
    assert lines["whole/dpo"] == "done" and lines["report"] == "done"
    edit(dpo={"beta": 0.3})
    lines = dict(line.split(maxsplit=1) for line in status.table(load()).splitlines())
    assert lines["whole/dpo"] == "stale (posttrain why whole/dpo)" and lines["whole/sft"] == "done"
    assert lines["whole/evaluate/dpo"].startswith("stale")


def test_one_artifact_alone(project):
    edit(sft={"method": "lora"})
    said = why.why(load(), "whole/sft")
    assert 'sft.method: "qlora" -> "lora"' in said and "results/whole/dpo" not in said
    assert "sft.double_quantization: true -> null" in said, "keys that lost their effect"
    assert "results/whole/sft" in why.why(load(), "other"), "an experiment is told of what it shares"
    for name in ("nosuch", "whole/nosuch", "results/whole/dpo"):
        with pytest.raises(UserError, match=f"{name}: nothing of this campaign; known: whole, other"):
            why.why(load(), name)


def test_an_input_is_named_with_its_digests(project):
    manifest = Path("results/whole/sft/manifest.json")
    manifest.write_text(manifest.read_text() + " ")
    said = block(why.why(load()), "results/whole/reward")
    assert "sft: results/whole/sft/manifest.json: " in said and " -> " in said


def test_a_function_is_named(project, root, tmp_path_factory, monkeypatch):
    package = tmp_path_factory.mktemp("code") / "posttrain"
    shutil.copytree(root / "workflow/posttrain", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", package)
    functions = "\n".join(f"def {name}(x):\n    return x\n" for name in ("one", "two", "three"))
    (package / "maths/more.py").write_text(functions)
    stage = package / "stages/dpo.py"
    stage.write_text(f"{stage.read_text()}\nfrom posttrain.maths import more\nmore.one(more.two)\n")
    forget()
    fabricate(load())
    assert why.why(load()) == why.NOTHING
    (package / "maths/more.py").write_text(functions.replace("return x", "return 2 * x"))
    forget()
    said = block(why.why(load()), "results/whole/dpo")
    assert "  code: maths.more: one, two\n" in said, "what it does not use changed too"
    record = Path("results/whole/dpo/provenance.json")
    write_json(record, read_json(record) | {"code": {"maths.more": "0123456789abcdef"}})
    assert "code: its record does not list its functions" in block(why.why(load()), "results/whole/dpo")
    stage.write_text(stage.read_text().partition("from posttrain.maths import more")[0])
    fabricate(load(), ["results/whole/dpo"])
    forget()
    write_json(record, read_json(record) | {"code": read_json(record)["code"] | {"maths.more:one": "0"}})
    assert "code: maths.more is no longer reached" in block(why.why(load()), "results/whole/dpo")
    monkeypatch.undo()
    forget()


def test_missing_artifacts_are_told_with_what_others_of_their_stage_took(project):
    shutil.rmtree("results/whole/dpo")
    assert why.why(load()) == why.NOTHING, "nothing needs it"
    Path("results/report/manifest.json").unlink()
    shutil.rmtree("results/whole/evaluate/dpo")
    said = why.why(load())
    assert "not made yet" in block(said, "results/whole/evaluate/dpo") and "takes about 1 min" in said


def test_mixed_versions_are_warned_of(project):
    for stage, version in (("sft", "2.13.0"), ("dpo", "2.14.0")):
        record = Path(f"results/whole/{stage}/provenance.json")
        write_json(record, read_json(record) | {"shape": {"versions": {"torch": version}}})
    edit(dpo={"beta": 0.3})
    assert "warning: these artifacts were made with different versions: torch 2.13.0 and 2.14.0" in why.why(load())


def test_strict_makes_the_lock_count(project):
    Path("config/config.yaml").write_text("title: Every stage\nexperiments: [whole, other]\nstrict: true\n")
    assert "versions: envs/requirements.txt changed (strict)" in why.why(load())
    fabricate(load())
    assert why.why(load()) == why.NOTHING
    Path("envs/requirements.txt").write_text("torch==2\n")
    assert "versions: envs/requirements.txt changed (strict)" in block(why.why(load()), "results/whole/prepare")


def test_two_experiments_side_by_side(project):
    said = why.compare(load(), "whole", "other")
    shared = "prepare, base, sft, reward, reference, ppo, grpo, dpo, kto, longctx, algebra"
    assert said == f"whole -> other\nevaluate.limit: null -> 4\nshared: {shared}"
    with pytest.raises(UserError, match="nosuch"):
        why.compare(load(), "whole", "nosuch")


def test_verify_finds_a_flipped_bit(project, capsys):
    assert main(["verify"]) == 0
    assert "artifacts match their manifests; 0 do not exist yet" in capsys.readouterr().out
    file = Path("results/whole/evaluate/dpo/data/bytes")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main(["verify"]) == 2
    assert "results/whole/evaluate/dpo/data/bytes: its bytes differ from its manifest" in capsys.readouterr().err


def test_clean_lists_what_no_campaign_needs_and_deletes_only_when_told(project):
    assert clean.clean([load()]) == "Nothing to clean."
    old = time.time() - 7200
    Path("results/whole/sft/checkpoints/abc").mkdir(parents=True)
    Path("results/whole/sft/checkpoints/abc/weights").write_text("x" * 1000)
    for file in ("results/whole/sft/checkpoints/abc/weights", "results/whole/sft/checkpoints/abc"):
        os.utime(file, (old, old))
    (Path("config/experiments/other.yaml")).write_text("extends: whole\n")
    said = clean.clean([load()])
    assert "results/other/evaluate/dpo  (no campaign uses it)" in said
    assert "results/whole/sft/checkpoints/abc  (checkpoints of other settings" in said and "nothing was deleted" in said
    assert Path("results/other/evaluate/dpo").exists()
    clean.clean([load()], delete=True)
    assert not Path("results/other/evaluate/dpo").exists() and not Path("results/whole/sft/checkpoints/abc").exists()
    assert Path("results/whole/sft/manifest.json").exists()
    assert clean.clean([load()]) == "Nothing to clean."


def test_clean_spares_what_a_campaign_needs_that_ran_here_from_elsewhere(project):
    Path("elsewhere/experiments").mkdir(parents=True)
    shutil.move("config/experiments/other.yaml", "elsewhere/experiments/other.yaml")
    shutil.copy("config/experiments/whole.yaml", "elsewhere/experiments/whole.yaml")
    Path("elsewhere/own.yaml").write_text("experiments: [other]\n")
    Path("config/config.yaml").write_text("experiments: [whole]\n")
    unneeded = "results/other/evaluate/dpo  (no campaign uses it)"
    assert unneeded in clean.clean_campaigns([], delete=False), "control: nothing tells of it yet"
    write_named(freeze(campaign.load("elsewhere/own.yaml")))
    told = clean.clean_campaigns([], delete=False)
    assert unneeded not in told and "kept: the artifacts of config/config.yaml, elsewhere/own.yaml" in told


def test_clean_refuses_where_it_knows_no_campaign(project, capsys):
    Path("config").rename("campaigns")
    assert main(["clean", "--delete"]) == 2
    assert "there is no campaign in config/" in capsys.readouterr().err
    assert Path("results/whole/sft/manifest.json").exists()


def test_a_run_that_may_still_be_writing_is_left_alone(project):
    Path("results/whole/sft/checkpoints/abc").mkdir(parents=True)
    assert clean.clean([load()]) == "Nothing to clean."
