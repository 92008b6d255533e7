"""Every mistake in a config is refused before any job, all at once, with place, key, finding and what is allowed."""

import json
import time

import pytest

from posttrain.config import sections
from posttrain.config.sections import slice_of
from posttrain.dag import campaign
from posttrain.dag.frozen import families
from posttrain.ground.errors import UserError

GOOD = "prepare: {world: {}}\nbase: {scratch: {}}\nsft: {method: qlora}\n"


def load(folder, campaign_text="experiments: [one]\n", **experiments):
    (folder / "experiments").mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(campaign_text)
    for name, text in experiments.items():
        (folder / "experiments" / f"{name}.yaml").write_text(text)
    return campaign.load(folder / "config.yaml")


def problems(folder, *args, **experiments) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, *args, **experiments)
    return str(caught.value)


ALIGNED = GOOD + "reward: {}\nppo: {}\ndpo: {}\n"
WHOLE = ALIGNED.replace("qlora", "full")


def test_alignment_shares_what_is_equal(tmp_path):
    plan = load(
        tmp_path,
        "experiments: [one, two, three]\n",
        one=ALIGNED,
        two="extends: one\ndpo: {beta: 0.5}\n",
        three="extends: one\nreward: {rank: 32}\n",
    )
    assert plan.policies("two") == ["base", "sft", "ppo", "dpo"]
    assert plan.folder("two", "reference") == "results/one/reference", "no beta in it"
    assert [plan.owner("two", stage) for stage in ("reward", "ppo", "dpo")] == ["one", "one", "two"]
    assert [plan.owner("three", stage) for stage in ("reward", "ppo", "dpo")] == ["three", "three", "one"]
    assert plan.folder("two", "compare", "ppo") == "results/one/compare/ppo"
    assert plan.folder("three", "compare", "dpo") == "results/three/compare/dpo", "judged by another reward model"
    assert plan.folder("three", "evaluate", "dpo") == "results/one/evaluate/dpo"


LONG = "prepare: {world: {long: {}}}\nbase: {scratch: {context: 64}}\nlongctx: {}\nlengths: {tokens: [64, 256]}\n"


def test_longer_contexts_share_what_is_equal(tmp_path):
    plan = load(
        tmp_path,
        "experiments: [one, two, three]\n",
        one=LONG,
        two="extends: one\nlongctx: {method: yarn}\n",
        three="extends: one\nsft: {}\nlongctx: {policy: sft}\n",
    )
    assert plan.policies("one") == ["base", "longctx"] and plan.policies("three") == ["base", "sft", "longctx"]
    assert plan.upstream("one", "longctx") == ["prepare", "base"]
    assert plan.upstream("three", "longctx") == ["prepare", "base", "sft"]
    assert [plan.owner("two", stage) for stage in ("base", "longctx")] == ["one", "two"]
    assert plan.folder("two", "lengths", "base") == "results/one/lengths/base"
    assert plan.folder("two", "lengths", "longctx") == "results/two/lengths/longctx"
    assert ("lengths", "sft") in plan.judgements("three")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            LONG.replace("longctx: {}", "longctx: {policy: dpo}"),
            "longctx.policy: this experiment has no 'dpo': set dpo",
        ),
        (LONG.replace("{long: {}}", "{}"), "longctx: needs long documents to train on and held-out ones"),
        (LONG.replace("{long: {}}", "{}"), "lengths: has no held-out long documents"),
        (LONG.replace("context: 64", "context: 64, positions: alibi"), "longctx.method: cannot be combined with base"),
        (LONG.replace("context: 64", "context: 128"), "prepare.world.long: makes documents of 64 x 4"),
        (LONG.replace("longctx: {}", "longctx: {factor: 8.0}"), "base.scratch.context x longctx.factor is 64 x 8"),
        (LONG.replace("longctx: {}", "longctx: {rank: 8}"), "longctx.rank: has no effect with tuning: full"),
        (LONG.replace("longctx: {}", "longctx: {factor: 1.0}"), "longctx.factor: found 1.0"),
        (
            LONG.replace("longctx: {}", "sft: {method: prefix}\nlongctx: {policy: sft}"),
            "longctx.policy: cannot follow sft.method: prefix",
        ),
        (LONG + "evaluate: {tasks: [{task: passkey_512}]}\n", "'passkey_512' is not made by prepare here"),
    ],
)
def test_contradictions_of_longer_contexts(tmp_path, text, said):
    assert said in problems(tmp_path, one=text)


def test_a_child_may_do_without_the_stage_of_an_inherited_section(tmp_path):
    """Refused is only a section that the experiment's own file sets for nothing."""
    parent = ALIGNED + "reference: {batch_size: 8}\ncompare: {prompts: 8}\n"
    without = "extends: one\nreward: null\nppo: null\ndpo: null\n"
    assert load(tmp_path, "experiments: [two]\n", one=parent, two=without).policies("two") == ["base", "sft"]
    assert "two.yaml:5: compare: has no effect" in problems(
        tmp_path, "experiments: [two]\n", one=parent, two=without + "compare: {prompts: 4}\n"
    )


def test_what_alignment_rests_on(tmp_path):
    plan = load(tmp_path, one=ALIGNED)
    assert plan.foundation("one", "ppo") == "base" and plan.foundation("one", "sft") == "base"
    plan = load(tmp_path, one=ALIGNED.replace("qlora", "full"))
    assert plan.foundation("one", "ppo") == "sft" and plan.foundation("one", "sft") == "base"


def test_what_is_trained_on_a_whole_sft_policy_is_measured_on_it(tmp_path):
    """The default, an adapter on NF4, is in no section. Control: after another method nothing is written."""
    whole = load(tmp_path, one=WHOLE.replace("dpo: {}", "dpo: {method: full}"))
    assert {json.loads(whole.section("one", stage)).get("method") for stage in ("reference", "compare")} == {"full"}
    only_ppo = load(tmp_path, one=WHOLE.replace("ppo: {}", "ppo: {method: lora}"))
    assert json.loads(only_ppo.section("one", "compare"))["method"] == "full"
    assert "method" not in json.loads(only_ppo.section("one", "reference"))
    for text in (WHOLE, WHOLE.replace("dpo: {}", "dpo: {method: qlora}"), ALIGNED):
        plan = load(tmp_path, one=text)
        assert all("method" not in json.loads(plan.section("one", stage)) for stage in ("reference", "compare"))


def test_a_hand_written_reward_takes_the_place_of_the_model(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(prompt, reply, answer):\n    return 1.0\n")
    text = GOOD + f"ppo: {{reward_function: '{file}:mine'}}\n"
    plan = load(tmp_path, one=text)
    assert plan.upstream("one", "ppo") == ["prepare", "base", "sft"]
    before = plan.section("one", "ppo")
    file.write_text("def mine(prompt, reply, answer):\n    # a comment\n    return 1.0\n")
    assert load(tmp_path, one=text).section("one", "ppo") == before
    file.write_text("def mine(prompt, reply, answer):\n    return 2.0\n")
    assert load(tmp_path, one=text).section("one", "ppo") != before


def test_gold_is_the_worlds_or_a_function_of_ones_own_and_reruns_what_it_judges(tmp_path):
    """Watched by PPO and compared: each by its own key. Without the built-in world there is none by itself."""
    file = tmp_path / "mine.py"
    file.write_text("def mine(prompt, reply, answer):\n    return 1.0\n")
    plain = load(tmp_path, one=ALIGNED)
    for section in (plain.experiments["one"].ppo, plain.experiments["one"].compare):
        assert section.gold_function == "posttrain.world.gold:gold_reward" and section.gold_code
    text = ALIGNED + f"compare: {{gold_function: '{file}:mine'}}\n"
    plan = load(tmp_path, one=text)
    assert plan.section("one", "ppo") == plain.section("one", "ppo")
    before = plan.section("one", "compare")
    assert before != plain.section("one", "compare")
    file.write_text("def mine(prompt, reply, answer):\n    # a comment\n    return 1.0\n")
    assert load(tmp_path, one=text).section("one", "compare") == before
    file.write_text("def mine(prompt, reply, answer):\n    return 2.0\n")
    assert load(tmp_path, one=text).section("one", "compare") != before
    rows = {name: tmp_path / f"{name}.jsonl" for name in ("text", "sft", "preference")}
    for path in rows.values():
        path.write_text("{}\n")
    sources = ", ".join(f"{name}: [{{path: '{path}'}}]" for name, path in rows.items())
    own = ALIGNED.replace("{world: {}}", f"{{{sources}}}")
    assert own != ALIGNED, "the world is taken out"
    assert "gold_function" not in load(tmp_path, one=own).section("one", "compare"), "control"


@pytest.mark.parametrize(
    "text, said",
    [
        (
            GOOD.replace("sft: {method: qlora}\n", "reward: {}\n"),
            "one.yaml:1: sft: is not set, and reward can only start from the SFT policy",
        ),
        (ALIGNED.replace("qlora", "prefix"), "dpo: cannot follow sft.method: prefix"),
        (GOOD + "ppo: {}\n", "ppo: has no reward"),
        (ALIGNED.replace("dpo: {}", "dpo: {rank: 4}"), "dpo.rank: 4 is under sft.rank (16)"),
        (ALIGNED.replace("ppo: {}", "ppo: {kl_horizon: 5}"), "ppo.kl_horizon: has no effect without ppo.kl_target"),
        (ALIGNED.replace("ppo: {}", "ppo: {kl_target: 6.0, kl_horizon: 5}"), "beta could turn negative"),
        (ALIGNED.replace("ppo: {}", "ppo: {kl_target: 6.0, kl_coefficient: 0.0}"), "0 cannot adapt"),
        (ALIGNED.replace("ppo: {}", "ppo: {value_warmup: 40}"), "ppo.value_warmup: 40 leaves none of the 40"),
        (ALIGNED.replace("ppo: {}", "ppo: {reward_function: nosuch:f}"), "there is no module 'nosuch'"),
        (
            ALIGNED.replace("ppo: {}", "ppo: {reward_function: 'posttrain.world.gold:nosuch'}"),
            "defines no function 'nosuch'",
        ),
        (
            ALIGNED.replace("ppo: {}", "ppo: {gold_function: nosuch:f}"),
            "ppo.gold_function: there is no module 'nosuch'",
        ),
        (ALIGNED + "compare: {gold_function: nosuch}\n", "compare.gold_function: found 'nosuch', allowed: file.py:"),
        (ALIGNED + "compare: {gold_code: abc}\n", "compare.gold_code: is written by the workflow"),
        (ALIGNED.replace("ppo: {}", "ppo: {reward_function: nosuch}"), "allowed: file.py:function or package"),
        (ALIGNED.replace("ppo: {}", "ppo: {reward_code: abc}"), "ppo.reward_code: is written by the workflow"),
        (ALIGNED + "compare: {reward_function: 'a.py:f'}\n", "compare.reward_function: is written by the workflow"),
        (ALIGNED.replace("dpo: {}", "dpo: {loss: [ppo]}"), "dpo.loss[0]: found 'ppo', it should be"),
        (ALIGNED.replace("dpo: {}", "dpo: {loss_weights: [1.0, 2.0]}"), "dpo.loss_weights: has 2 weights for 1 losses"),
        (ALIGNED.replace("dpo: {}", "dpo: {label_smoothing: 0.1}"), "dpo.label_smoothing: has no effect with loss"),
        (ALIGNED.replace("dpo: {}", "dpo: {loss: [sft], micro_batch_size: 8}"), "dpo.micro_batch_size: would change"),
        (ALIGNED.replace("reward: {}", "reward: {max_length: 16}"), "reward.max_length: 16 would cut rows"),
        (GOOD + "kto: {}\n", "kto: has no kto rows to train on: set prepare.kto"),
        (GOOD + "reference: {batch_size: 8}\n", "reference: has no effect without dpo or kto"),
        (GOOD + "compare: {prompts: 8}\n", "compare: has no effect without reward, ppo, grpo, dpo or kto"),
        (ALIGNED.replace("reward: {}", "reward: {lables: swapped}"), "did you mean 'labels'?"),
        (ALIGNED.replace("dpo: {}", "dpo: {method: full}"), "dpo.method: full cannot follow sft.method: qlora, whose"),
        (WHOLE.replace("dpo: {}", "dpo: {method: full, rank: 8}"), "dpo.rank: has no effect with method: full (only"),
        (WHOLE.replace("dpo: {}", "dpo: {method: full}\nkto: {rows: preference}"), "kto.method: must be on the same"),
        (GOOD + "grpo: {}\n", "grpo: has no reward: set section reward, or grpo.reward_function"),
        (ALIGNED + "grpo: {group: 7}\n", "grpo.group: 7 does not divide batch_size 64"),
        (ALIGNED + "grpo: {clip_high: 0.1}\n", "grpo.clip_high: 0.1 is under clip (0.2)"),
        (GOOD + "grpo: {rewards: [{kind: pattern}]}\n", "grpo.rewards[0].pattern: is missing: kind pattern needs it"),
        (GOOD + "grpo: {rewards: [{kind: pattern, pattern: '('}]}\n", "pattern: is no regular expression: missing )"),
        (GOOD + "grpo: {rewards: [{kind: exact, pattern: 'a'}]}\n", "grpo.rewards[0].pattern: has no group"),
        (
            GOOD + "grpo: {rewards: [{kind: length, words: 3}], reward_seconds: 5}\n",
            "grpo.reward_seconds: has no effect",
        ),
        (GOOD + "grpo: {rewards: [{kind: function}]}\n", "rewards[0].kind: function needs grpo.reward_function"),
        (
            GOOD + "grpo: {rewards: [{kind: exact, words: 3}]}\n",
            "grpo.rewards[0].words: has no effect with kind: exact",
        ),
        (WHOLE + "reference: {method: full}\n", "reference.method: is written by the workflow; leave it out"),
        (
            WHOLE.replace("ppo: {}", "ppo: {method: full, value_from: reward}"),
            "ppo.value_from: needs a reward model of",
        ),
        (
            WHOLE.replace("ppo: {}", "ppo: {value_from: reward, reward_function: 'posttrain.world.gold:gold_reward'}"),
            "ppo.value_from: needs a reward model: set section reward",
        ),
    ],
)
def test_contradictions_of_alignment(tmp_path, text, said):
    assert said in problems(tmp_path, one=text)


def test_a_good_campaign_loads(tmp_path):
    plan = load(tmp_path, one=GOOD)
    assert plan.policies("one") == ["base", "sft"]
    assert (
        json.loads(plan.section("one", "sft"))["max_length"]
        == json.loads(plan.section("one", "base"))["scratch"]["context"]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD.replace("{scratch: {}}", "{scratch: {stesp: 3}}"), ["one.yaml:2", "base.scratch.stesp", "mean 'steps'"]),
        ("prepare: {world: {}}\nbase: {scratch: {}}\nsfft: {}\n", ["one.yaml:3", "sfft", "did you mean 'sft'"]),
        (GOOD + "seed: three\n", ["one.yaml:4", "seed", "'three'", "a whole number"]),
        (GOOD + "seed: '3'\n", ["one.yaml:4", "seed", "'3'", "a whole number"]),
        (GOOD + "seed: 1.0\n", ["seed", "1.0"]),
        (GOOD + "seed: -1\n", ["seed", "greater than or equal to 0"]),
        (GOOD + "seed: true\n", ["seed: found true"]),
        (GOOD.replace("qlora", "qlora, packing: on"), ["sft.packing: found 'on', it should be true or false"]),
        (GOOD.replace("{method: qlora}", "yes"), ["sft: found 'yes', it should be a section of `key: value` lines"]),
        (GOOD.replace("qlora", "qlroa"), ["one.yaml:3", "sft.method", "'qlroa'", "'qlora'", "did you mean"]),
        (GOOD.replace("{method: qlora}", "{method: qlora, steps: 0}"), ["sft.steps", "greater than or equal to 1"]),
        (GOOD.replace("{method: qlora}", "{learning_rate: .nan}"), ["sft.learning_rate"]),
        (GOOD.replace("{method: qlora}", "{method: prefix, rank: 4}"), ["sft.rank", "no effect with method: prefix"]),
        (GOOD.replace("{method: qlora}", "{method: prompt, packing: true}"), ["sft.packing", "no effect"]),
        (GOOD.replace("{method: qlora}", "{method: prompt, virtual_tokens: 300}"), ["virtual_tokens", "no room"]),
        (GOOD.replace("world: {}", "world: {}, max_prompt_tokens: 128"), ["max_prompt_tokens", "128 has no effect"]),
        (
            GOOD.replace("world: {}", "world: {}, max_prompt_tokens: 100, max_answer_tokens: 29"),
            ["prepare.max_answer_tokens", "100 and 29 are more than prepare.max_tokens (128)"],
        ),
        (
            "prepare: {text: [{path: x}], max_answer_tokens: 20}\nbase: {scratch: {}}\n",
            ["prepare.max_answer_tokens", "without rows of sft, preference, kto"],
        ),
        (GOOD.replace("{method: qlora}", "{max_length: 16}"), ["sft.max_length", "16", "prepare.max_tokens (128)"]),
        (GOOD.replace("{method: qlora}", "{batch_size: 6, micro_batch_size: 4}"), ["sft.micro_batch_size", "divide"]),
        (GOOD.replace("{method: qlora}", "{method: prefix, gradient_checkpointing: true}"), ["gradient_checkpointing"]),
        (GOOD.replace("{scratch: {}}", "{scratch: {heads: 3}}"), ["base.scratch.heads", "does not divide"]),
        (GOOD.replace("{scratch: {}}", "{scratch: {positions: alibi, rope_theta: 1e4}}"), ["base.scratch.rope_theta"]),
        (GOOD.replace("{scratch: {}}", "{scratch: {}, path: x}"), ["base", "exactly one of", "path and scratch"]),
        (GOOD.replace("{scratch: {}}", "{}"), ["base", "found none"]),
        (GOOD.replace("{scratch: {}}", "{hub: {id: a/b, revision: main}}"), ["base.hub.revision", "'main' can move"]),
        (GOOD.replace("{world: {}}", "{}"), ["prepare", "has no data"]),
        (GOOD.replace("{world: {}}", "{sft: [{path: a, dataset: b/c}]}"), ["prepare.sft[0]", "exactly one of"]),
        (GOOD.replace("{world: {}}", "{sft: [{dataset: b/c}]}"), ["prepare.sft[0].revision", "is missing"]),
        (GOOD.replace("{world: {}}", "{sft: [{path: a, revision: x}]}"), ["prepare.sft[0].revision", "no effect"]),
        (GOOD + "learning-rate: 1\n", ["one.yaml:4", "learning-rate: unknown key"]),
        (GOOD.replace("{method: qlora}", "{learning-rate: 1e-3}"), ["sft.learning-rate", "mean 'learning_rate'"]),
        (GOOD.replace("{world: {}}", "{world: {}, choices: [{}]}"), ["prepare.choices[0]", "exactly one of"]),
        (GOOD.replace("{world: {}}", "{sft: [{path: a.jsonl, rows: test}]}"), ["prepare.sft[0].rows", "no effect"]),
        (GOOD.replace("{world: {}}", "{sft: [{path: gone.jsonl}]}"), ["one.yaml:1", "there is no gone.jsonl"]),
        (GOOD.replace("{world: {}}", "{sft: [{path: a.jsonl}]}"), ["base.scratch", "no text to train on"]),
        (GOOD.replace("{world: {}}", "{world: {}, chat_template: tokenizer}"), ["prepare.chat_template"]),
        (GOOD.replace("{world: {}}", "{world: {}, tokenizer: {vocab_size: 400}}").replace("scratch: {}", "path: x"),
         ["prepare.tokenizer.vocab_size", "its own tokenizer"]),
        (GOOD.replace("{scratch: {}}", "{hub: {id: a/b, revision: '../../x', allow_floating: true}}"), ["revision"]),
        (GOOD.replace("{scratch: {}}", "{hub: {id: a/b, revision: 'x; touch y', allow_floating: true}}"), ["revision"]),
        (GOOD.replace("{method: qlora}", "{packing: true}").replace("{scratch: {}}", "{scratch: {positions: alibi}}"),
         ["sft.packing", "alibi"]),
        (GOOD + "evaluate: {tasks: [{task: gsm8k}]}\n", ["evaluate.tasks[0].task", "not made by prepare", "revision"]),
        (GOOD + "evaluate: {tasks: [{task: wrld}]}\n", ["evaluate.tasks[0].task", "world"]),
        (GOOD + "evaluate: {tasks: [{task: world_wrong}]}\n", ["tasks[0].task: 'world_wrong'", "world_capital"]),
        (GOOD + "evaluate: {tasks: [{task: world}, {task: world, shots: 1}]}\n", ["tasks[1].task", "named twice"]),
        (GOOD.replace("{world: {}}", "{world: {}, sft: [{path: a, format: kto}]}"),
         ["prepare.sft[0].format", "kto does not hold rows for sft", "messages"]),
        (GOOD.replace("{world: {}}", "{world: {}, kto: [{path: a, format: messages}]}"),
         ["prepare.kto[0].format", "messages does not hold rows for kto", "kto"]),
        (GOOD.replace("{world: {}}", "{kto: [{path: gone.jsonl}]}"), ["prepare.kto[0].path: there is no gone.jsonl"]),
        (GOOD.replace("{world: {}}", "{world: {}, choices: [{path: a, format: text}]}"), ["prepare.choices[0].format"]),
        (GOOD.replace("{world: {}}", "{text: [{path: a, separator: x}]}"), ["prepare.text[0].separator", "no effect"]),
        (GOOD.replace("{world: {}}", "{text: [{path: a}], sft: [{path: a, use: test}]}"), ["sft: has no rows"]),
        (GOOD.replace("{world: {}}", "{text: [{path: a, use: test}]}"), ["base.scratch: has no text to train on"]),
        (GOOD.replace("{world: {}}", "{text: [{path: a}], preference: [{path: a, use: test}]}") + "dpo: {}\n",
         ["dpo: has no preference pairs to train on", "a source without `use: test` in prepare.preference"]),
        (GOOD.replace("{world: {}}", "{text: [{path: a}], sft: [{path: a, use: train}]}")
         + "evaluate: {tasks: [{task: heldout_sft}]}\n", ["tasks[0].task: 'heldout_sft' has no row: prepare.sft has"]),
        (GOOD.replace("{world: {}}", "{text: [{path: a}], sft: [{path: a}], test_fraction: 0}")
         + "evaluate: {tasks: [{task: heldout_sft}]}\n", ["'heldout_sft' has no row: prepare.test_fraction is 0"]),
        (GOOD.replace("{world: {}}", "{sft: [{path: a, use: train}]}").replace("{scratch: {}}", "{path: a}"),
         ["evaluate.tasks: prepare makes no benchmark task here", "prepare.answers"]),
        (GOOD.replace("{world: {}}", "{sft: [{path: a, use: train}], kto: [{path: a, use: train}]}") + "kto: {}\n",
         ["compare: has no held-out prompts"]),
        (GOOD.replace("{world: {}}", "{text: [{path: a, use: train}]}"), ["prepare.text: `use: train` alone"]),
        (GOOD.replace("{world: {}}", "{world: {}, group_key: x}"), ["prepare.group_key: has no effect on the"]),
        (GOOD.replace("{world: {}}", "{text: [{path: a}], test_fraction: 0}"), ["prepare.test_fraction: 0 leaves no"]),
        (GOOD + "seed: " + "9" * 5000 + "\n", ["seed", "5000 digits"]),
        (GOOD + "question: " + "[" * 3000 + "\n", ["nested more than"]),
        (GOOD + "question: !!null x\n", ["question", "tag", "not supported"]),
        ("!!set {prepare}\n", ["not supported"]),
        (GOOD + "sft: {}\n", ["one.yaml:4", "sft", "given twice", "one.yaml:3"]),
        ("a: [1\n", ["one.yaml:2", "not valid YAML"]),
        ("- a\n", ["one.yaml:1", "sequence"]),
        ("a: &x 1\nb: *x\n", ["one.yaml", "anchors"]),
        ("? [a]\n: 1\n", ["one.yaml:1", "a key must be a word"]),
        ("seed: !!python/name:os.system 1\n", ["not supported"]),
        ("extends: one\n", ["one.yaml:1", "extends", "a cycle", "one -> one"]),
        ("extends: two\n", ["one.yaml:1", "'two'", "there is no"]),
        ("extends: ../../etc\n", ["'../../etc'", "lower-case letters"]),
        ("extends: [a]\n", ["extends"]),
        ("", ["prepare: missing", "base: missing"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(tmp_path, text, expected):
    said = problems(tmp_path, one=text)
    for words in expected:
        assert words in said, said


@pytest.mark.parametrize("name", ["../x", "a/b", "A", "", ".", "a b", "-a", "é", "a" * 64, "report", "fetch", "a\n"])
def test_a_name_cannot_leave_results(tmp_path, name):
    assert "experiment" in problems(tmp_path, f"experiments: [{json.dumps(name)}]\n", one=GOOD)


def test_all_mistakes_come_at_once(tmp_path):
    bad = GOOD.replace("qlora", "qlroa") + "sedd: 1\n"
    said = problems(
        tmp_path, "experiments: [one, two, three]\ntitel: x\n", one=bad, two="base: {scratch: {steps: no}}\n"
    )
    for words in ("titel", "sft.method", "sedd", "base.scratch.steps", "prepare: missing", "'three'"):
        assert words in said, said
    assert "Traceback" not in said


def test_a_list_that_a_child_replaces_is_placed_in_the_child(tmp_path):
    parent = (
        f"prepare:\n  world: {{}}\n  sft:\n    - dataset: a/b\n      revision: {'a' * 40}\nbase: {{scratch: {{}}}}\n"
    )
    child = "extends: one\nprepare: {sft: [{dataset: a/c}]}\n"
    said = problems(tmp_path, "experiments: [two]\n", one=parent, two=child)
    assert "two.yaml:2: prepare.sft[0].revision: is missing" in said and "one.yaml" not in said


@pytest.mark.parametrize("key", ["sft", "text"])
def test_a_path_that_no_file_system_has_is_named(tmp_path, key):
    name = "a" * 5000
    text = f"prepare: {{world: {{}}, {key}: [{{path: {name}}}]}}\nbase: {{path: {name}}}\n"
    said = problems(tmp_path, one=text)
    assert f"prepare.{key}[0].path: there is no {name}" in said and f"base.path: there is no {name}" in said


@pytest.mark.parametrize("name", ["{x}.txt", "<x>.txt"])
def test_a_path_that_snakemake_would_fill_in_is_named(tmp_path, name):
    (tmp_path / name).write_text("a\n")
    said = problems(tmp_path, one=GOOD.replace("{world: {}}", f"{{text: [{{path: '{tmp_path / name}'}}]}}"))
    assert "one.yaml:1: prepare.text[0].path" in said and "rename it" in said


def test_overrides_replace_keys_of_the_campaign(tmp_path):
    """A section's keys one by one; control: what is not overridden stays the file's."""
    load(tmp_path, "title: on\nexperiments: [one]\nwandb: {project: mine}\n", one=GOOD, two=GOOD)
    path = tmp_path / "config.yaml"
    plan = campaign.load(path, {"experiments": ["two"], "wandb": {"mode": "offline"}})
    assert list(plan.experiments) == ["two"] and plan.campaign.title == "on"
    assert (plan.campaign.wandb.mode, plan.campaign.wandb.project) == ("offline", "mine")
    with pytest.raises(UserError, match=r"--config: experiments\[0\]"):
        campaign.load(path, {"experiments": ["../two"]})


@pytest.mark.parametrize(
    ("wrong", "silent"),
    [
        ("evaluate: {tasks: [{tsk: gsm8k}]}\n", "evaluate.tasks: is empty"),
        ("base: {hub: {id: 'a b', revision: main}}\n", "base: exactly one of"),
    ],
)
def test_a_bad_item_or_a_missing_key_hides_no_contradiction(tmp_path, wrong, silent):
    """Told at once; and nothing is told of what was left out to find it."""
    text = "prepare: {world: {}}\nsft: {method: full, rank: 4, steps: 10, warmup_steps: 50}\n"
    text += wrong if "base:" in wrong else wrong + "base: {scratch: {}}\n"
    said = problems(tmp_path, one=text)
    assert "sft.rank: has no effect with method: full" in said and "sft.warmup_steps: 50 is more than steps" in said
    assert ("tsk" in said or "base.hub.id" in said) and silent not in said


def test_a_wrong_type_does_not_hide_a_contradiction(tmp_path):
    said = problems(tmp_path, one=GOOD.replace("{method: qlora}", "{method: prefix, rank: 3, steps: x}"))
    assert "sft.steps" in said and "sft.rank: has no effect with method: prefix" in said


@pytest.mark.parametrize("use", ["split", "test"])
def test_data_with_held_out_rows_is_accepted(tmp_path, use):
    """Control of the refusals of held-out sets that have no row."""
    (file := tmp_path / "a.jsonl").touch()
    sources = f"[{{path: {file}, use: train}}, {{path: {file}, use: {use}}}]"
    text = f"prepare: {{text: [{{path: {file}}}], sft: {sources}, preference: {sources}}}\n"
    text += "base: {scratch: {}}\nsft: {}\ndpo: {}\nevaluate: {tasks: [{task: heldout_sft}, {task: heldout_text}]}\n"
    assert load(tmp_path, one=text).experiments["one"].dpo


def test_held_out_text_may_come_from_a_file_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    sources = f"{{path: {tmp_path / 'a.txt'}}}, {{path: {tmp_path / 'a.txt'}, use: test}}"
    load(tmp_path, one=f"prepare: {{text: [{sources}], test_fraction: 0}}\nbase: {{scratch: {{}}}}\n")


def test_numbers_and_words_are_what_they_look_like(tmp_path):
    sft = "{learning_rate: 1e-5, packing: True, double_quantization: FALSE, micro_batch_size: Null}"
    text = GOOD.replace("{method: qlora}", sft).replace("{scratch", '{"scratch"') + "question: on\n"
    plan = load(tmp_path, one=text)
    assert plan.experiments["one"].sft.packing is True
    assert plan.experiments["one"].sft.double_quantization is False
    assert plan.experiments["one"].sft.learning_rate == 1e-5
    assert plan.experiments["one"].question == "on"


def test_a_child_forgets_what_its_own_choice_makes_useless(tmp_path):
    parent = GOOD.replace("{method: qlora}", "{method: qlora, rank: 4, steps: 7}")
    plan = load(tmp_path, "experiments: [two]\n", one=parent, two="extends: one\nsft: {method: prefix}\n")
    assert json.loads(plan.section("two", "sft"))["steps"] == 7
    assert '"rank"' not in plan.section("two", "sft")
    assert '"virtual_tokens"' in plan.section("two", "sft")


def test_a_child_can_take_another_base_by_doing_what_it_is_told(tmp_path):
    """What is too much stands in the parent, where the child cannot leave it out."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "model" / name).touch()
    parent = GOOD.replace("{world: {}}", "{world: {}, tokenizer: {vocab_size: 400}}")
    child = f"extends: one\nbase: {{path: {tmp_path / 'model'}}}\n"
    said = problems(tmp_path, "experiments: [two]\n", one=parent, two=child)
    assert "two.yaml:2: base: exactly one of" in said and "set an inherited one to null" in said
    child = child.replace("{path", "{scratch: null, path")
    said = problems(tmp_path, "experiments: [two]\n", one=parent, two=child)
    assert "prepare.tokenizer.vocab_size: a given base needs its own tokenizer" in said and "or null" in said
    load(tmp_path, "experiments: [two]\n", one=parent, two=child + "prepare: {tokenizer: null}\n")


def test_equal_stages_share_their_artifact(tmp_path):
    plan = load(
        tmp_path,
        "experiments: [two, three, four]\n",
        one=GOOD,
        two="extends: one\nsft: {method: lora}\n",
        three="extends: two\nevaluate: {limit: 3}\n",
        four="extends: one\nseed: 1\n",
    )
    assert plan.folder("two", "base") == "results/one/base"
    assert plan.folder("two", "sft") == "results/two/sft"
    assert plan.folder("three", "sft") == "results/two/sft"
    assert plan.folder("two", "evaluate", "base") == "results/one/evaluate/base"
    assert plan.folder("three", "evaluate", "base") == "results/three/evaluate/base"
    assert plan.folder("four", "prepare") == "results/one/prepare", "prepare has a seed of its own"
    assert plan.folder("four", "base") == "results/four/base", "the top-level seed is the training stages' default"
    assert plan.folder("four", "sft") == "results/four/sft"


def test_a_stage_can_be_left_out(tmp_path):
    plan = load(tmp_path, "experiments: [one, two]\n", one=GOOD, two="extends: one\nsft: null\n")
    assert plan.policies("two") == ["base"]


def test_what_lies_on_the_hub_is_fetched_once(tmp_path):
    commit = "a" * 40
    text = f"prepare: {{sft: [{{dataset: o/d, revision: {commit}}}]}}\nbase: {{hub: {{id: o/m, revision: {commit}}}}}\n"
    text += f"evaluate: {{tasks: [{{task: gsm8k, revision: {commit}}}, {{task: heldout_sft}}]}}\n"
    plan = load(tmp_path, one=text)
    assert plan.fetched("one", "base") == [f"results/fetch/models--o--m@{commit}/manifest.json"]
    assert len(plan.fetched("one", "prepare")) == 2, "the data set, and the model's tokenizer"
    assert plan.fetched("one", "evaluate") == [f"results/fetch/tasks--gsm8k@{commit}/manifest.json"]
    entry = {"id": "o/m", "revision": commit, "allow_floating": False}
    assert plan.fetch_section(f"models--o--m@{commit}") == {"models": [entry]}
    assert load(tmp_path, one=GOOD).fetched("one", "base") == []


def test_of_a_model_for_its_tokenizer_alone_no_weights_are_fetched(tmp_path):
    """Control: of a model that is also a base, in whatever experiment, all is fetched."""
    commit = "a" * 40
    hub = f"{{id: o/m, revision: {commit}}}"
    text = f"prepare: {{sft: [{{dataset: o/d, revision: {commit}}}], tokenizer: {{hub: {hub}}}}}\n"
    text += f"base: {{hub: {{id: o/base, revision: {commit}}}}}\n"
    item = f"models--o--m@{commit}"
    plan = load(tmp_path, one=text)
    assert f"results/fetch/{item}/manifest.json" in plan.fetched("one", "prepare")
    (entry,) = plan.fetch_section(item)["models"]
    assert "tokenizer*" in entry["allow_patterns"] and not any(
        "safetensors" in name for name in entry["allow_patterns"]
    )
    plan = load(tmp_path, "experiments: [one, two]\n", one=text, two=text.replace("o/base", "o/m"))
    assert "allow_patterns" not in plan.fetch_section(item)["models"][0]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("date: 2024-02-30", "prepare.date: there is no day 2024-02-30"),
        ("end_of_turn: <end>", "prepare.end_of_turn: has no effect on a tokenizer trained on the text"),
        ("tokenizer: {path: MODEL}", "MODEL has a tokenizer.model and no tokenizer.json"),
    ],
)
def test_what_a_tokenizer_cannot_do_is_said_before_any_job(tmp_path, keys, words):
    """Controls: a day that exists, and the folder with a tokenizer.json."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.model").touch()
    text = GOOD.replace("{world: {}}", f"{{world: {{}}, {keys}}}").replace("MODEL", str(model))
    assert words.replace("MODEL", str(model)) in problems(tmp_path, one=text)
    (model / "tokenizer.json").touch()
    assert words.startswith("prepare.end") or load(tmp_path, one=text.replace("02-30", "02-29"))


def test_every_file_of_a_tokenizer_is_read_by_prepare(tmp_path):
    """A corrected template or special token remakes what follows from it."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        (model / name).touch()
    plan = load(tmp_path, one=GOOD.replace("{world: {}}", f"{{world: {{}}, tokenizer: {{path: {model}}}}}"))
    names = {file.rpartition("/")[2] for file in plan.local_files("one", "prepare")}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_a_thousand_experiments_are_read_in_seconds(tmp_path):
    names = [f"e{number}" for number in range(1000)]
    children = {name: f"extends: one\nseed: {number}\n" for number, name in enumerate(names)}
    (tmp_path / "experiments").mkdir()
    started = time.process_time()
    plan = load(tmp_path, f"experiments: {json.dumps(names)}\n", one=GOOD, **children)
    assert len([artifact for artifact in plan.artifacts() if artifact.policy]) == 2000
    assert time.process_time() - started < 5


def test_settings_without_effect_are_no_part_of_a_slice():
    values = slice_of(sections.Sft(method="full"))
    assert "rank" not in values and "virtual_tokens" not in values and values["packing"] is False


def test_experiments_that_differ_in_the_seed_only_are_one_family(tmp_path):
    plan = load(
        tmp_path,
        "experiments: [one, two, three, four]\n",
        one=GOOD,
        two="extends: one\nseed: 1\n",
        three="extends: two\nsft: {method: lora}\n",
        four="extends: one\nprepare: {seed: 1}\n",
    )
    assert families(plan) == {"one": "one", "two": "one", "three": "three", "four": "four"}
