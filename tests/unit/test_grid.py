"""Grids: names of cells, who owns what, and what another cell costs."""

import time

import pytest

from posttrain.config import grid
from posttrain.dag import campaign
from posttrain.dag.frozen import families, freeze, summary, thaw
from posttrain.ground.errors import UserError

PARENT = """
question: Which?
prepare: {world: {documents: 300}}
base: {scratch: {seed: 0}}
sft: {rank: 8}
reward: {}
dpo: {beta: 0.2}
"""


@pytest.fixture
def load(tmp_path):
    """Write experiments and load the campaign that lists them all."""

    def loaded(listed=None, **texts):
        (tmp_path / "experiments").mkdir(exist_ok=True)
        for name, text in texts.items():
            (tmp_path / "experiments" / f"{name}.yaml").write_text(text)
        (tmp_path / "config.yaml").write_text(f"experiments: [{', '.join(listed or texts)}]\n")
        return campaign.load(tmp_path / "config.yaml")

    return loaded


def grown(axes: str) -> str:
    return f"extends: parent\ngrid: {{{axes}}}\n"


def folders(plan, stage: str) -> list[str]:
    """Folders of a stage's artifacts, each once."""
    return sorted({plan.folder(name, stage).split("/")[1] for name in plan.names})


def test_three_seeds_by_three_betas_train_three_sfts_and_nine_dpos(load):
    plan = load(["child"], parent=PARENT, child=grown("dpo.beta: [0.05, 0.1, 0.5], seed: [0, 1, 2]"))
    assert len(plan.names) == 9 and "child@beta=0.05@seed=0" in plan.names
    assert folders(plan, "dpo") == sorted(plan.names)
    assert folders(plan, "sft") == ["child@seed=1", "child@seed=2", "parent"], "seed 0 is the parent's own"
    assert folders(plan, "reward") == folders(plan, "sft") == folders(plan, "reference")
    assert folders(plan, "base") == folders(plan, "prepare") == ["parent"], "their seed is their own"
    judged = {plan.folder(name, "evaluate", "sft").split("/")[1] for name in plan.names}
    assert judged == set(folders(plan, "sft"))
    judged = {plan.folder(name, "compare", "dpo").split("/")[1] for name in plan.names}
    assert judged == set(plan.names)


def test_betas_of_kto_share_all_but_their_own(load):
    text = PARENT.replace("dpo: {beta: 0.2}", "kto: {rows: preference, beta: 0.1}")
    plan = load(["child"], parent=text, child=grown("kto.beta: [0.1, 0.3]"))
    assert folders(plan, "kto") == ["child@beta=0.3", "parent"]
    assert folders(plan, "reference") == folders(plan, "sft") == ["parent"]
    assert {plan.folder(name, "compare", "kto").split("/")[1] for name in plan.names} == {"child@beta=0.3", "parent"}


def test_a_seed_more_makes_only_its_own(load):
    child = "dpo.beta: [0.05, 0.1], seed: [{}]"
    one = load(["child"], parent=PARENT, child=grown(child.format("1")))
    two = load(["child"], parent=PARENT, child=grown(child.format("1, 2")))
    assert set(one.folders()) < set(two.folders())
    assert {f for f in set(two.folders()) - set(one.folders()) if "seed=2" not in f} == set()


def test_the_seed_is_an_axis_of_the_stages_alone_that_take_it(load):
    text = PARENT.replace("{scratch: {seed: 0}}", "{scratch: {}}")
    plan = load(["child"], parent=text, child=grown("seed: [0, 1, 2]"))
    assert folders(plan, "base") == ["child@seed=1", "child@seed=2", "parent"] and folders(plan, "prepare") == [
        "parent"
    ]
    plan = load(["child"], parent=PARENT, child=grown("seed: [0, 1, 2]"))
    assert folders(plan, "base") == ["parent"], "control: it has a seed of its own"


def test_every_cell_uses_what_its_own_settings_make(load):
    """An artifact that is shared was made from the very sections that each cell has."""
    axes = "sft.rank: [4, 8], base.scratch.context: [128, 256], dpo.beta: [0.1, 0.3], seed: [0, 3]"
    plan = load(["child"], parent=PARENT, child=grown(axes))
    for name in plan.names:
        for stage in plan.stages(name):
            owner = plan.owner(name, stage)
            for part in [*plan.upstream(name, stage), stage]:
                assert plan.section(owner, part) == plan.section(name, part), (name, stage, part)
    assert len(folders(plan, "prepare")) == 2, "the longest row follows from the base's context"
    assert len(folders(plan, "sft")) == 8 and len(folders(plan, "dpo")) == 16


def test_a_child_of_a_grid_has_its_cells_and_shares_what_is_equal(load):
    plan = load(parent=PARENT + "grid: {seed: [0, 1]}\n", child="extends: parent\ndpo: {beta: 0.7}\n")
    assert plan.names == ["parent@seed=0", "parent@seed=1", "child@seed=0", "child@seed=1"]
    assert plan.folder("child@seed=1", "sft") == "results/parent@seed=1/sft"
    assert plan.folder("child@seed=1", "dpo") == "results/child@seed=1/dpo"
    plan = load(parent=PARENT + "grid: {seed: [0, 1]}\n", child="extends: parent\ngrid: null\n")
    assert plan.names == ["parent@seed=0", "parent@seed=1", "child"]


def test_seeds_are_one_family(load):
    plan = load(["child"], parent=PARENT, child=grown("dpo.beta: [0.1, 0.5], seed: [0, 1, 2]"))
    assert set(families(plan).values()) == {"child@beta=0.1", "child@beta=0.5"}
    assert summary(plan)["owners"] == {"child@seed=0": "child", "child@seed=1": "child", "child@seed=2": "child"}


def test_a_job_thaws_the_same_plan(load):
    plan = load(["child"], parent=PARENT, child=grown("dpo.beta: [0.1, 0.5], seed: [0, 1]"))
    thawed = thaw(freeze(plan))
    assert thawed.names == plan.names and thawed.folders() == plan.folders() and thawed.code == plan.code
    assert all(thawed.section(n, "dpo") == plan.section(n, "dpo") for n in plan.names)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ("dpo.betta: [1.0]", "child.yaml:2: grid.dpo.betta: unknown key (did you mean 'beta'?)"),
        ("dpo.beta: [0.1, many]", "child.yaml:2: grid.dpo.beta[1]: found 'many', it should be a number"),
        ("dpo.beta: []", "child.yaml:2: grid.dpo.beta"),
        ("dpo.beta: 0.1", "child.yaml:2: grid.dpo.beta: found 0.1"),
        ("dpo.beta: [0.1, 1e-1]", "would make the same name, 0.1"),
        ("dpo: [{beta: 0.1}]", "a value is a section"),
        ("question: [a, b]", "cannot be an axis"),
        ("dpo.target_modules: [[" + ", ".join(f"layer{n}" for n in range(40)) + "]]", "at most 120"),
        ("sft.virtual_tokens: [4, 8]", "sft.virtual_tokens: has no effect with method: qlora"),
    ],
)
def test_a_wrong_axis_is_told_with_its_line(load, axes, said):
    with pytest.raises(UserError) as error:
        load(["child"], parent=PARENT, child=grown(axes))
    assert said in str(error.value)


def test_a_key_that_is_an_inherited_axis_cannot_be_set_beside_it(load):
    with pytest.raises(UserError, match=r"child.yaml:2: seed: is an axis of the grid \(.*parent.yaml:8\)"):
        load(parent=PARENT + "grid: {seed: [0, 1]}\n", child="extends: parent\nseed: 5\n")


def test_names_are_short_canonical_and_safe():
    short = grid.labels(["dpo.beta", "ppo.beta", "seed"])
    assert short == {"dpo.beta": "dpo.beta", "ppo.beta": "ppo.beta", "seed": "seed"}
    assert grid.cell_name("a", {"x": 1e-5, "y": 2.0}, {"x": "x", "y": "y"}) == "a@x=1e-05@y=2"
    assert grid.cell_name("a", {"y": True, "x": "b/c d"}, {"x": "x", "y": "y"}) == "a@x=b-c-d@y=true"


def test_a_thousand_cells_are_planned_in_a_moment(load):
    axes = f"dpo.beta: {[n / 10 for n in range(1, 11)]}, dpo.rank: {list(range(8, 18))}, seed: {list(range(10))}"
    start = time.process_time()
    plan = load(["child"], parent=PARENT, child=grown(axes))
    plan.folders()
    assert len(plan.names) == 1000 and len(folders(plan, "sft")) == 10
    assert time.process_time() - start < 20, "a guard against a blow-up, not a benchmark"
