"""`snakemake verify`: it makes what the claims need and nothing else, and fails where a claim does or a bit changed."""

import json
import shutil
from pathlib import Path

import pytest
from fabricated import fabricate
from project import commit_of, copy_of, snakemake

from posttrain.dag import campaign
from posttrain.ground.files import manifest_of, write_json

CLAIM = """
claims:
  sft-learns:
    sentence: <b>Fine-tuning</b> teaches what the base cannot do.
    paper: arXiv 2106.09685
    measured: {of: sft, value: summary.right}
    expected: {at_least: 0.8, date: 2026-11-30}
    tolerance: {basis: algebra}
    control: {of: swapped/sft}
"""


def publish(folder: str, right: float) -> None:
    """Give an artifact another number, as its stage would."""
    write_json(Path(folder) / "metrics.json", {"summary": {"right": right}})
    write_json(Path(folder) / "manifest.json", manifest_of(Path(folder), ["model", "metrics.json"]))


@pytest.fixture(scope="module")
def project(root, tmp_path_factory):
    """A campaign with a claim, whose artifacts look done but for the report."""
    folder = copy_of(root, tmp_path_factory.mktemp("verify"))
    shutil.rmtree(folder / "config")
    shutil.copytree(root / "tests/workflow/whole", folder / "config")
    (folder / "config/config.yaml").write_text("title: Claims\nexperiments: [whole]\n")
    with open(folder / "config/experiments/whole.yaml", "a") as file:
        file.write(CLAIM)
    (folder / "config/experiments/swapped.yaml").write_text("extends: whole\nsft: {method: lora}\n")
    commit_of(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        plan = campaign.load("config/config.yaml")
        fabricate(plan, [name for name in plan.folders() if name != "results/report"])
        for name, right in (("whole", 0.9), ("swapped", 0.1)):
            publish(f"results/{name}/sft", right)
        shutil.rmtree("results/whole/dpo")  # no claim needs it
        yield folder


def test_what_no_claim_needs_is_not_made(project):
    planned = snakemake(project, "-n", "verify").stdout
    assert "rule report:" in planned and "rule verify:" in planned and "rule dpo:" not in planned
    assert "rule dpo:" in snakemake(project, "-n").stdout, "control: without the target it is"


def test_the_verdict_decides_how_the_run_ends(project):
    run = snakemake(project, "--cores", "1", "verify")
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("1 claims: 1 reproduced\n")
    assert "not preregistered: results/whole/sft has no commit on record" in run.stdout
    page = (project / "results/report/index.html").read_text()
    assert "Did it reproduce?" in page and "&lt;b&gt;Fine-tuning&lt;/b&gt;" in page and "<b>Fine-tuning" not in page
    publish("results/swapped/sft", 0.95)
    run = snakemake(project, "--cores", "1", "verify")
    assert run.returncode == 1 and "its control holds too" in run.stdout
    assert json.loads((project / "results/report/verdict.json").read_text())["holds"] is False
    assert (project / "results/report/manifest.json").is_file(), "a claim that fails leaves the report whole"
    publish("results/swapped/sft", 0.1)
    weights = project / "results/whole/sft/model/bytes"
    weights.write_text(weights.read_text() + "x")
    run = snakemake(project, "--cores", "1", "verify")
    assert run.returncode == 1 and "results/whole/sft/model/bytes" in run.stdout + run.stderr
