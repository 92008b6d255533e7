"""dvc.yaml lists what its campaign makes: a run writes it, and where it may not, says what it lacks."""

import shutil
from pathlib import Path

import pytest
import yaml

from posttrain.dag import campaign
from posttrain.ground.errors import UserError
from posttrain.tools import check, ledger

WHOLE = Path(__file__).parents[1] / "workflow/whole"
LACKS = "dvc.yaml lacks results/new/sft, results/new/reward, results/new/reference and "


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """The plan of a campaign, whose ledger is here, after an experiment was added to it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WHOLE, "config")
    ledger.write(campaign.load("config/config.yaml"))
    before = campaign.load("config/config.yaml")
    assert ledger.lacking(before) == ledger.keep_up(before, overridden=False) == "", "control"
    Path("config/experiments/new.yaml").write_text("question: Another?\nextends: whole\nsft: {rank: 2}\n")
    Path("config/config.yaml").write_text("experiments: [whole, other, new]\n")
    return campaign.load("config/config.yaml")


def test_a_new_experiment_is_told_and_the_next_run_enters_it(plan):
    assert LACKS in check.check(plan)
    assert ledger.keep_up(plan, overridden=False) == ledger.lacking(plan) == ""
    assert Path("dvc.yaml").read_text() == ledger.ledger(plan) and "results/new/sft" in ledger.outs()
    Path("config/config.yaml").write_text("experiments: [whole, other]\n")
    ledger.keep_up(campaign.load("config/config.yaml"), overridden=False)
    assert "results/new/sft" not in ledger.outs(), "one that was taken out again"
    Path("config/experiments/same.yaml").write_text("question: Why?\nextends: whole\n")
    Path("config/config.yaml").write_text("experiments: [whole, other, same]\n")
    ledger.keep_up(campaign.load("config/config.yaml"), overridden=False)
    assert "config/experiments/same.yaml" in Path("dvc.yaml").read_text(), "it makes nothing, but DVC watches its file"


def test_what_is_not_this_campaigns_alone_is_left_as_it_is_and_told(plan, capsys):
    text = Path("dvc.yaml").read_text()
    other = text.replace("--cores all", "--cores all --configfile other.yaml")
    added = text.replace("stages:\n", "stages:\n  mine: {cmd: make}\n")
    for content, overridden in ((text, True), (other, False), (added, False), ("stages: [", False)):
        Path("dvc.yaml").write_text(content)
        told = ledger.keep_up(plan, overridden)
        assert Path("dvc.yaml").read_text() == content and "which dvc commit and dvc push leave out" in told
        assert told in capsys.readouterr().err
    Path("dvc.yaml").unlink()
    assert ledger.keep_up(plan, overridden=False) == "", "a project without DVC"
    assert not Path("dvc.yaml").exists()


def test_dvc_is_not_let_run_what_it_would_leave_out(plan, monkeypatch):
    text = Path("dvc.yaml").read_text()
    monkeypatch.setenv("DVC_STAGE", "campaign")
    with pytest.raises(UserError, match=LACKS + r".*: posttrain ledger; then run dvc again"):
        ledger.keep_up(plan, overridden=False)
    Path("config/config.yaml").write_text("experiments: [whole]\n")
    assert ledger.keep_up(campaign.load("config/config.yaml"), overridden=False) == "", "control: nothing is left out"
    assert Path("dvc.yaml").read_text() == text, "DVC has read it already"


def test_long_names_and_one_out_for_all_are_listed_as_dvc_lists_them(plan):
    name = "new@" + "@".join(f"{axis}=0.0001" for axis in ("learning_rate", "weight_decay", "max_grad_norm", "beta2"))
    out = f"results/{name}/evaluate/{'x' * 60}"
    Path("dvc.yaml").write_text(yaml.safe_dump({"outs": [{out: {"persist": True}}, "results/other"]}, width=120))
    assert "? results/" in Path("dvc.yaml").read_text(), "control: YAML's form for a long key"
    assert ledger.outs() == {out, "results/other"}
    assert ledger.within("results/other/sft", ledger.outs()) and not ledger.within("results/otherwise", ledger.outs())
