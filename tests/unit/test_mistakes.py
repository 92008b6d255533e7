"""Mistakes in a config in the words of YAML, each told once, at its cause."""

import pytest

from posttrain.cluster import sites
from posttrain.dag import campaign
from posttrain.ground.errors import UserError

GOOD = """
prepare: {world: {long: {}}}
base: {scratch: {context: 64}}
sft: {steps: 100, warmup_steps: 40}
reward: {}
ppo: {}
dpo: {}
"""
LONG = GOOD + "longctx: {}\nlengths: {tokens: [64, 256]}\n"


@pytest.fixture
def told(tmp_path, monkeypatch):
    """The lines about a campaign, without the folder; [] where it is accepted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()

    def told(one: str | bytes = GOOD, listed: str = "one", overrides: dict | None = None, **more) -> list[str]:
        for name, text in {"one": one, **more}.items():
            content = text if isinstance(text, bytes) else text.encode()
            (tmp_path / "experiments" / f"{name}.yaml").write_bytes(content)
        (tmp_path / "config.yaml").write_text(f"experiments: [{listed}]\n")
        try:
            campaign.load("config.yaml", overrides)
        except UserError as error:
            return list(error.problems)
        return []

    return told


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        ("{target_modules: q_proj}", "sft.target_modules: found 'q_proj', it should be a list or 'all-linear'"),
        ("{target_modules: []}", "sft.target_modules: found a list, it should be a list of at least one item or"),
        ("{target_modules: [q_proj, 5]}", "sft.target_modules[1]: found 5, it should be text; put it in quotes"),
        ("{packing: 1}", "sft.packing: found 1, it should be true or false"),
        ("{steps: True}", "sft.steps: found true, it should be a whole number"),
        ("{steps: null}", "sft.steps: found null, it should be a whole number"),
        ("{Rank: 8}", "sft.Rank: unknown key (did you mean 'rank'?)"),
        ("{batch-size: 8}", "sft.batch-size: unknown key (did you mean 'batch_size'?)"),
        ("{steps: 1000000000000000000000000000000}", "sft.steps: found 1000000000000000000000000000000, it"),
        ("{steps: 010}", "sft.steps: found '010', it should be a whole number"),
        ("{alpha: 010}", "sft.alpha: found '010', it should be a number"),
        ("{alpha: 1e999}", "sft.alpha: found inf, it should be a number under 1.8e308"),
        ("[qlora]", "sft: found a list, it should be a section of `key: value` lines"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_line_in_the_words_of_yaml(told, mistake, line):
    """Nothing is said of the stages that follow `sft`, though they cannot be judged without it."""
    (said,) = told(GOOD.replace("{steps: 100, warmup_steps: 40}", mistake))
    assert said.startswith(f"experiments/one.yaml:4: {line}")


@pytest.mark.parametrize(
    ("wrong", "right", "line"),
    [
        ("sft:", "stf:", "experiments/one.yaml:4: stf: unknown key (did you mean 'sft'?)"),
        ("{world: {long: {}}}", "{sft: [{path: gone.txt, format: txet}]}", "found 'txet'"),
        ("{steps: 100,", "{steps: many,", "experiments/one.yaml:4: sft.steps: found 'many'"),
        ("{scratch: {context: 64}}", "{hub: {di: a/b, revision: main, allow_floating: true}}", "base.hub.di: unknown"),
    ],
)
def test_no_rule_is_asked_of_a_key_whose_value_is_wrong(told, wrong, right, line):
    """`warmup_steps: 40` is not compared with steps that are no number, nor is `sft` called missing."""
    assert any(line in said for said in told(GOOD.replace(wrong, right)))
    assert not any("set sft" in said or "is more than steps" in said or "missing" in said
                   for said in told(GOOD.replace(wrong, right)))  # fmt: skip


@pytest.mark.parametrize(
    ("lost", "found"),
    [
        ("sft: {steps: 100, warmup_steps: 40}", "tuning: {steps: 100, warmup_steps: 40}"),
        ("{world: {long: {}}}", "{source: {long: {}}}"),
        ("{world: {long: {}}}\n", "{}\nworld: {long: {}}\n"),
        ("{scratch: {context: 64}}", "{hub: {name: a/b, revision: main, allow_floating: true}}"),
    ],
)
def test_a_key_under_another_name_or_in_another_place_is_not_called_missing_too(told, lost, found):
    (said,) = told(GOOD.replace(lost, found), two="extends: one\n", listed="one, two")
    assert ": unknown key" in said


@pytest.mark.parametrize(
    ("removed", "line"),
    [
        ("{world: {long: {}}}", "2: prepare: has no data: set world, or give sources"),
        ("{scratch: {context: 64}}", "3: base: exactly one of path, hub, scratch must be set, found none"),
        ("sft: {steps: 100, warmup_steps: 40}", "1: sft: is not set, and reward, ppo, dpo can only start from the SFT"),
    ],
)
def test_what_others_rest_on_is_told_alone(told, removed, line):
    """Not of each stage, rule or key that follows."""
    (said,) = told(
        LONG.replace(removed, "{}" if removed.startswith("{") else ""), two="extends: one\n", listed="one, two"
    )
    assert said.startswith(f"experiments/one.yaml:{line}")


def test_rules_of_other_keys_are_asked_beside_a_wrong_one(told):
    """Control of the silence."""
    said = told(GOOD.replace("{steps: 100", "{method: prefix, rank: 4, log_steps: no"))
    assert any("sft.log_steps: found 'no'" in line for line in said)
    assert any("sft.rank: has no effect with method: prefix" in line for line in said)
    assert any("dpo: cannot follow sft.method: prefix" in line for line in said)


def test_what_a_child_sets_is_told_in_its_file_and_what_it_inherits_in_its_parents(told):
    child = "extends: one\nsft:\n  packing: false\n  steps: 10\n"
    assert told(listed="two", two=child) == [
        "experiments/two.yaml:4: sft.steps: with this, sft.warmup_steps: 40 is more than steps (10)"
        " (experiments/one.yaml:4)"
    ]
    (said,) = told(GOOD.replace("steps: 100", "steps: 10"), listed="one, two", two="extends: one\nsft: {rank: 4}\n")
    assert said == "experiments/one.yaml:4: sft.warmup_steps: 40 is more than steps (10)"


@pytest.mark.parametrize("extends", ["extends: gone", "extends: [one]", "extends: 5", "Extends: one", "extends: One"])
def test_without_its_parent_nothing_is_missing(told, extends):
    (said,) = told(listed="two", two=f"{extends}\nsft: {{rank: 4}}\n")
    assert said.startswith("experiments/two.yaml:1: ")


def test_a_chain_of_parents_has_an_end(told):
    """Control: thirty generations are accepted."""
    chain = {f"e{n}": f"extends: e{n - 1}\n" if n else GOOD for n in range(70)}
    assert told(listed="e30", **chain) == []
    (said,) = told(listed="e69", **chain)
    assert said == "experiments/e69.yaml:1: extends: 69 generations are above it; at most 50"


@pytest.mark.parametrize(
    ("grid", "line"),
    [
        ("{sft.rnak: [4, 8]}", "7: grid.sft.rnak: unknown key (did you mean 'rank'?)"),
        ("{sft.steps.x: [4]}", "7: grid.sft.steps.x: sft.steps: found a section"),
        ("{sft.rank: [4, many]}", "7: grid.sft.rank[1]: found 'many'"),
        ("{sft.steps: [50, 60]}", "4: sft.steps: is an axis of the grid (experiments/one.yaml:7)"),
        ("{seed: [true, 'true']}", "7: grid.seed: true and 'true' would make the same name, true"),
        ("{base.scratch.heads: [4, 5]}", "7: grid.base.scratch.heads: 5 does not divide hidden_size 128"),
    ],
)
def test_a_mistake_in_a_grid_is_told_at_its_axis(told, grid, line):
    said = told(GOOD.replace("ppo: {}\n", f"grid: {grid}\n").replace("reward: {}", "reward: {}\n"))
    assert any(text.startswith(f"experiments/one.yaml:{line}") for text in said) and len(said) <= 2


def test_a_cell_that_breaks_a_rule_is_told_at_the_axis_that_does(told):
    (said,) = told(LONG + "grid:\n  base.scratch.positions: [rope, alibi]\n  seed: [0, 1]\n")
    assert said.startswith(
        "experiments/one.yaml:11: grid.base.scratch.positions: with this, longctx.method: cannot be combined with base"
    )


def test_a_mistake_in_the_campaigns_grid_is_told_in_its_file(told):
    (said,) = told(listed="one]\ngrid: {zebra: [1]}\ntitle: x # [")
    assert said.startswith("config.yaml:2: grid.zebra: unknown key")
    (said,) = told(overrides={"grid": {"zebra": [1]}})
    assert said.startswith("--config: grid.zebra: unknown key")


def test_too_many_cells_are_refused_before_they_are_made(told):
    some = f"grid: {{ppo.seed: {list(range(30))}, dpo.seed: {list(range(40))}}}\n"
    (said,) = told(GOOD + some, listed="one, two", two=GOOD + some)
    assert "yaml:8: grid: makes 1200 cells, 2400 with the campaign's others; at most 2000 in a campaign" in said
    keys = ("seed", "sft.rank", "dpo.steps", "dpo.rank", "ppo.seed")
    axes = ", ".join(f"{key}: {list(range(1, 41))}" for key in keys)
    (said,) = told(GOOD + f"grid: {{{axes}}}\n")
    assert said == "experiments/one.yaml:8: grid: makes 102400000 cells; at most 2000 in a campaign"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (LONG.replace("longctx: {}", "longctx: {tuning: none, steps: 10}"), "longctx.steps: has no effect with tuning"),
        (LONG.replace("[64, 256]", "[64, 256], stride_tokens: 64"), "lengths.stride_tokens: 64 must be under the shor"),
        (
            LONG.replace("[64, 256]", "[64], stride: 0.5, stride_tokens: 9"),
            "lengths.stride: has no effect with stride_",
        ),
        (LONG.replace("longctx: {}", "longctx: {method: s2_attn}"), "longctx.method: 's2_attn' is refused: LongLoRA's"),
        (LONG.replace("longctx: {}", "longctx: {tuning: none, rank: 10}"), "longctx.rank: has no effect with tuning"),
        (LONG.replace("longctx: {}", "longctx: {factor: 1e308}"), "longctx.factor: found 1e+308, it should be less"),
        (LONG.replace("[64, 256]", "[64, 64]"), "lengths.tokens: names 64 twice"),
        (GOOD.replace("dpo: {}", "dpo: {loss: [sft, sft]}"), "dpo.loss: names sft twice"),
        (GOOD.replace("dpo: {}", "dpo: {loss_weights: [0.0]}"), "dpo.loss_weights: are all 0"),
        (
            GOOD.replace("{world", "{text: [{path: experiments}], world"),
            "text[0].path: experiments is a directory",
        ),
        (GOOD.replace("{world", "{text: [{path: /dev/zero}], world"), "text[0].path: /dev/zero is no file"),
        (GOOD.replace("{world", "{chat_template: /dev/null, world"), "prepare.chat_template: /dev/null is no file"),
    ],
)
def test_what_has_no_effect_or_cannot_work_is_refused(told, text, line):
    (said,) = told(text)
    assert line in said


def test_tuning_as_an_axis_and_an_inherited_training_are_accepted(told):
    """Controls: a child without tuning need not take back its parent's settings, nor a cell its siblings'."""
    text = LONG.replace("longctx: {}", "longctx: {steps: 10}")
    assert told(text, listed="two", two="extends: one\nlongctx: {tuning: none}\n") == []
    assert told(text + "grid: {longctx.tuning: [none, full]}\n") == []


def test_as_many_snapshot_steps_as_steps_are_no_snapshot(told):
    assert told(GOOD.replace("ppo: {}", "ppo: {steps: 8, snapshot_steps: 8}")) == []


def test_a_site_has_requests_of_stages_alone(told, tmp_path):
    (tmp_path / "site.yaml").write_text("stages:\n  fetch: {runtime: 5}\n")
    with pytest.raises(UserError, match=r"site.yaml:2: stages.fetch: no such stage; known: prepare, base, sft"):
        sites.read(tmp_path / "site.yaml")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (GOOD.encode() + b"question: \xe9\n", "8: the byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (GOOD.encode("utf-16"), "1: is in UTF-16; save it as UTF-8"),
        (GOOD.encode() + b"question: \x07\n", "8: has the control character '\\x07'; delete it"),
        (GOOD.encode().replace(b"context", b"revision: 1234, context"), "3: base.scratch.revision: unknown key"),
    ],
)
def test_bytes_that_are_no_text_are_told_with_their_line(told, content, line):
    (said,) = told(content)
    assert said.startswith(f"experiments/one.yaml:{line}")


def test_a_campaign_that_is_no_file_is_refused(told):
    for path, words in (("/dev/zero", "is a device"), (".", "Is a directory"), ("gone", "No such file or directory")):
        with pytest.raises(UserError, match=words):
            campaign.load(path)


def test_a_commit_of_digits_alone_is_told_to_be_quoted(told):
    commit = "1234567890" * 4
    text = GOOD.replace("{scratch: {context: 64}}", f"{{hub: {{id: a/b, revision: {commit}}}}}")
    (said,) = told(text)
    assert f"base.hub.revision: found {commit}, it should be text; put it in quotes where text is meant" in said
    assert told(text.replace(commit, f"'{commit}'")) == []


def test_no_regular_expression_is_shown(told):
    (said,) = told(GOOD.replace("{scratch: {context: 64}}", "{hub: {id: a b, revision: main, allow_floating: true}}"))
    assert said == "experiments/one.yaml:3: base.hub.id: found 'a b', it should be a name on the hub, organisation/name"
