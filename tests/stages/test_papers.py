"""Every recipe in config/papers/: valid, planned from its model's facts, and run through all of its stages in small."""

import gc
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch

from posttrain.__main__ import main
from posttrain.config.sections import Base, HubModel
from posttrain.config.stages import ON_CPU
from posttrain.dag import campaign
from posttrain.dag.given import given
from posttrain.ground import progress
from posttrain.ground.errors import UserError
from posttrain.jobs import artifact as artifact_of
from posttrain.resources import architecture, estimates
from posttrain.resources.hours import hours
from posttrain.tools.toy import toy
from posttrain.training import parallel

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


PUBLISHED = {  # parameters of a model of config/models/
    "mistralai--Mistral-7B-v0.1": 7_241_732_096,
    "meta-llama--Llama-2-7b-hf": 6_738_415_616,
    "openai-community--gpt2-medium": 354_823_168,
    "EleutherAI--pythia-1b-deduped": 1_011_781_632,
}


def test_the_facts_of_a_model_have_its_published_number_of_parameters(recipes):
    counted = {}
    for file in Path("config/models").glob("*.json"):
        organisation, _, name = file.stem.partition("@")[0].partition("--")
        model = HubModel(id=f"{organisation}/{name}", revision=file.stem.partition("@")[2])
        counted[f"{organisation}--{name}"] = architecture.of_given(given(Base(hub=model))).parameters
    assert {name: counted[name] for name in PUBLISHED} == PUBLISHED


@pytest.fixture
def command_line(monkeypatch):
    """Commands of stages in this process, which they neither end nor leave changed for the tests after this one."""
    monkeypatch.setattr(artifact_of, "end_process", lambda: None)
    monkeypatch.setattr(parallel, "fits", None)
    monkeypatch.setattr(parallel, "sharded", False)
    monkeypatch.setattr(progress, "name", "")
    monkeypatch.setenv("HF_DATASETS_CACHE", "")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    threads, collected = torch.get_num_threads(), gc.get_threshold()
    yield
    torch.set_num_threads(threads)
    gc.set_threshold(*collected)
    gc.unfreeze()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_through_all_its_stages_in_small(recipe, recipes, command_line):
    toy(Path(f"config/papers/{recipe}.yaml"), Path("toy"))
    plan = campaign.load("toy/campaign.yaml")
    assert plan.campaign.scale == "toy"
    for artifact in plan.artifacts()[:-1]:  # without the report
        arguments = shlex.split(plan.arguments(*artifact))
        assert main([*arguments, "--output", artifact.manifest]) == 0, artifact


def test_hours_by_arithmetic_include_those_that_a_papers_code_reports(recipes, monkeypatch):
    """Its README: supervised training 1 h 30, and DPO 2 h 45, on four GPUs of 80 GB."""
    monkeypatch.setenv("POSTTRAIN_DEVICE", "gpu")
    plan = campaign.load("config/papers/dpo.yaml")
    for stage, reported in {"sft": 4 * 1.5, "dpo": 4 * 2.75}.items():
        need = estimates.predicted(plan, plan.artifact("dpo-hh", stage))
        fewest, most = hours(need, stage, 80)
        assert fewest < reported < most
        assert hours(need, stage, 141)[1] < most < hours(need, stage, 24)[1], "control: a faster GPU takes less"
    assert hours(need, "compare", 80) is None


def test_a_recipe_without_its_shapes_is_refused(recipes, tmp_path):
    """Control: the rows and the model in small come from the files beside the recipe."""
    shutil.copytree(ROOT / "config/papers", tmp_path / "own")
    (tmp_path / "own/rows/google--boolq.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"own/rows/google--boolq.jsonl: missing; it holds rows of the data set's shape"
    ):
        toy(tmp_path / "own/prompt-tuning.yaml", Path("toy"))
    with pytest.raises(UserError, match="toy is not empty; give a new folder"):
        Path("toy").mkdir(exist_ok=True)
        Path("toy/a").touch()
        toy(Path("config/papers/lora.yaml"), Path("toy"))
