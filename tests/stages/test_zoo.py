"""Models that we did not make: tiny random models of many architectures, each through every stage.

What docs/architectures.md says of a model is what happens. `python docs/architectures.py` writes that page.
"""

import math
from pathlib import Path

import pytest
from tiny import ROOT
from zoo import TRIED, ZOO, outcomes, table

from posttrain.ground.files import read_json

PAGE = ROOT / "docs/architectures.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache) -> Path:
    """Where models, rows and configs are written."""
    return tmp_path_factory.mktemp("zoo")


def documented(name: str) -> dict[str, str]:
    """What the page says of a model: column -> outcome."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = next(line for line in lines if line.startswith(f"| {name} |")).strip("| ").split(" | ")[1:]
    reasons = dict(line.split(". ", 1) for line in lines if line.partition(".")[0].isdecimal())
    texts = ["works" if cell == "yes" else reasons[cell.strip("no []")] for cell in cells]
    return dict(zip(TRIED, texts, strict=True))


def summary(plan, column: str, stage: str) -> dict:
    """The summary of an artifact's metrics."""
    return read_json(Path(plan.folder(column, stage)) / "metrics.json")


@pytest.mark.parametrize("name", ZOO)
def test_every_stage_works_or_is_refused_before_any_job(name, folder, home):
    result, plan = outcomes(name, folder / name)
    assert not [reason for reason in result.values() if reason.startswith("fails")]
    assert result == documented(name), "after a change that is meant: python docs/architectures.py"
    if result["dpo"] == "works":
        assert summary(plan, "dpo", "dpo")["summary"]["loss before"] == pytest.approx(math.log(2), abs=1e-5)
    if result["lora"] == result["micro-batch"] == "works":
        one, other = (summary(plan, column, "sft") for column in ("lora", "micro-batch"))
        assert one["summary"]["eval_loss"] == pytest.approx(other["summary"]["eval_loss"], rel=1e-5)
        one, other = ([point["loss"] for point in metrics["history"]] for metrics in (one, other))
        assert one == pytest.approx(other, rel=1e-5)


def test_a_failure_is_not_taken_for_an_outcome_that_works(folder, home, monkeypatch):
    """Control: a stage that ends in an error is a failure of its column and of what builds on it, not of others."""
    from posttrain.stages import sft

    monkeypatch.setattr(sft, "sft", lambda *_, **__: {}["lost"])
    result, _ = outcomes("llama-2", folder / "control")
    assert result["base"] == result["none"] == "works"
    assert result["lora"].startswith("fails: sft: KeyError") and result["dpo"] == result["qlora"]
    assert "no [1]" in table({"llama-2": result})
