"""`epochs` in place of `steps`: the rows that are there give the steps, and one of the two keys is set."""

import json
from pathlib import Path

import pytest

from posttrain.config.sections import Dpo, Kto, Longctx, Reward, Sft, Watched, slice_of
from posttrain.dag import campaign
from posttrain.dag.artifacts import Artifact
from posttrain.ground.errors import UserError
from posttrain.resources import estimates
from posttrain.training.epochs import rows, steps_of, with_steps

SPLITS = {"sft": {"train": 100, "test": 9}, "preference": {"train": 40}, "kto": {"train": 30}}


@pytest.fixture
def data(here):
    """The manifest of prepared data with so many rows."""
    pairs = [json.dumps({"source": f"a:{number // 4}"}) + "\n" for number in range(40)]  # 10 lists of 4 pairs
    Path("data/preference").mkdir(parents=True)
    Path("data/preference/train.jsonl").write_text("".join(pairs))
    Path("metrics.json").write_text(json.dumps({"splits": SPLITS}))
    return Path("manifest.json")


@pytest.mark.parametrize(
    "section, steps",
    [
        (Sft(epochs=3, batch_size=32), 10),  # 300 rows of 32
        (Sft(epochs=0.01, batch_size=32), 1),
        (Sft(epochs=3.2, batch_size=10), 32),  # 3.2 * 100 / 10 is 32.000000000000004 in floating point
        (Dpo(epochs=2, batch_size=8), 10),
        (Reward(epochs=2, batch_size=4), 5),  # of 10 prompts
        (Kto(epochs=1, batch_size=10), 3),
        (Kto(epochs=1, batch_size=10, rows="preference"), 8),  # both answers of 40 pairs
    ],
)
def test_the_rows_that_are_there_give_the_steps(data, section, steps):
    assert with_steps(section, data).steps == steps
    assert with_steps(section.replaced(epochs=None), data).steps == section.steps != steps, "control"


def test_other_trainings_keep_their_steps(data):
    longctx = Longctx(seed=0)
    assert with_steps(longctx, data) is longctx


def test_the_keys_that_were_read_are_still_watched(data):
    read: set[str] = set()
    section = with_steps(Watched(Sft(epochs=3, batch_size=32), read), data)
    assert section.steps == 10 and {"epochs", "steps", "batch_size"} <= read and "learning_rate" not in read
    assert section.learning_rate and "learning_rate" in read


def test_the_identity_has_the_key_that_counts():
    assert "steps" not in slice_of(Sft(epochs=2)) and slice_of(Sft(epochs=2))["epochs"] == 2
    assert slice_of(Sft())["steps"] == 200 and "epochs" not in slice_of(Sft())


def test_a_longer_warm_up_is_told_before_training(data):
    with pytest.raises(UserError, match="warmup_steps: 11 is more than the 10 steps of these epochs"):
        with_steps(Sft(epochs=3, batch_size=32, warmup_steps=11), data)


def campaign_of(folder, **experiments):
    Path("config/experiments").mkdir(parents=True, exist_ok=True)
    for name, values in experiments.items():
        Path(f"config/experiments/{name}.yaml").write_text(json.dumps({"question": "Why?"} | values))
    Path("config/config.yaml").write_text(json.dumps({"experiments": list(experiments)}))
    return campaign.load("config/config.yaml")


BASE = {"base": {"scratch": {}}, "prepare": {"world": {}}}


def test_one_of_the_two_is_set(here):
    for sft, said in (
        (
            {"epochs": 2, "steps": 10},
            "sft.steps: has no effect with epochs: 2.0 (leave one of the two out, or set",
        ),
        ({"epochs": 2, "packing": True}, "sft.epochs: counts rows, of which packing makes fewer sequences: set steps"),
        ({"epochs": 0}, "sft.epochs"),
    ):
        with pytest.raises(UserError) as refused:
            campaign_of(here, one=BASE | {"sft": sft})
        assert said in str(refused.value)
    plan = campaign_of(here, one=BASE | {"sft": {"steps": 10}}, two={"extends": "one", "sft": {"epochs": 2}})
    assert json.loads(plan.section("two", "sft")).keys() & {"steps", "epochs"} == {"epochs"}, "a child's replaces it"
    back = {"extends": "two", "sft": {"epochs": None, "steps": 30}}
    plan = campaign_of(
        here, one=BASE | {"sft": {"steps": 10}}, two={"extends": "one", "sft": {"epochs": 2}}, three=back
    )
    assert json.loads(plan.section("three", "sft"))["steps"] == 30


def test_the_plan_counts_the_rows_once_they_are_prepared(here):
    plan = campaign_of(here, one=BASE | {"sft": {"epochs": 3}}, two=BASE | {"sft": {"steps": 50}})
    assert rows(plan.experiments["one"].sft, {}) == 0
    before = estimates.predicted(plan, Artifact("one", "sft"))
    assert before and estimates.seconds(plan, Artifact("one", "sft"), before) is None
    Path("results/one/prepare").mkdir(parents=True)
    Path("results/one/prepare/metrics.json").write_text(json.dumps({"splits": {"sft": {"train": 640}}}))
    after = estimates.predicted(plan, Artifact("one", "sft"))
    assert after and after.settings.sft.steps == steps_of(plan.experiments["one"].sft, 640) == 60
