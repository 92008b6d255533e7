"""Every recipe in config/papers/: valid, planned from its model's facts, and run through all of its stages in small."""

import shlex
from pathlib import Path

import pytest
import torch

from posttrain.__main__ import main
from posttrain.config.stages import ON_CPU
from posttrain.dag import campaign
from posttrain.jobs import artifact as artifact_of
from posttrain.resources import estimates
from posttrain.tools.toy import toy

ROOT = Path(__file__).parents[2]
RECIPES = sorted(file.stem for file in (ROOT / "config/papers").glob("*.yaml"))


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A folder with the recipes and their models, and a file of pairs where the data are not published."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/imdb-pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2)
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_planned_from_the_facts_beside_it(recipe, recipes):
    plan = campaign.load(f"config/papers/{recipe}.yaml")
    for name, experiment in plan.experiments.items():
        assert experiment.paper, f"{name} follows no paper"
    planned = [artifact for artifact in plan.artifacts()[:-1] if artifact.stage not in ON_CPU]
    needs = [estimates.predicted(plan, artifact) for artifact in planned]
    assert planned and all(need and need.device for need in needs if need != needs[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_through_all_its_stages_in_small(recipe, recipes, monkeypatch):
    toy(Path(f"config/papers/{recipe}.yaml"), Path("toy"))
    monkeypatch.setattr(artifact_of, "end_process", lambda: None)
    torch.set_num_threads(1)
    plan = campaign.load("toy/campaign.yaml")
    assert plan.campaign.scale == "toy"
    for artifact in plan.artifacts()[:-1]:  # without the report
        arguments = shlex.split(plan.arguments(*artifact))
        assert main([*arguments, "--output", artifact.manifest]) == 0, artifact
