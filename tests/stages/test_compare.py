"""compare: what it says of a policy's own answers, recomputed from the answers and from the models."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_server import longer, served
from tiny import GOLD, make, ppo

from posttrain.__main__ import main
from posttrain.config.sections import Compare, RewardPart
from posttrain.evaluation import comparison
from posttrain.ground.errors import UserError
from posttrain.ground.files import manifest_of, read_json, read_jsonl, write_json
from posttrain.maths import best_of_n
from posttrain.models import policy
from posttrain.rl import handwritten
from posttrain.training import parallel
from posttrain.world.gold import ANSWER_PATTERN, extract_answer

CHECKS = [
    RewardPart(kind="exact", answer="text", pattern=ANSWER_PATTERN, weight=2.0),
    RewardPart(kind="length", words=4),
    RewardPart(kind="length", words=8, weight=-1.0),
]
SECTION = Compare(prompts=8, max_new_tokens=12, best_of=4, batch_size=3, gold_function=GOLD, checks=CHECKS)


@pytest.fixture(scope="module")
def inputs(data, base, tuned_policy, rewarded):
    return {"data": data, "base": base, "sft": tuned_policy, "reward": rewarded}


@pytest.fixture(scope="module")
def beside(inputs, tuned_policy):
    output = Path("results/tiny/compare/sft/manifest.json")
    return make("compare", SECTION, output, policy=tuned_policy, **inputs)


@pytest.fixture(scope="module")
def optimised(inputs):
    return make("ppo", ppo(steps=6), Path("results/compared/ppo/manifest.json"), **inputs)


@pytest.fixture(scope="module")
def compared(inputs, beside, optimised):
    output = Path("results/tiny/compare/ppo/manifest.json")
    return make("compare", SECTION, output, policy=optimised, beside=beside, **inputs)


def table(manifest) -> dict:
    return {row["metric"]: row for row in read_json(manifest.parent / "metrics.json")["rows"]}


def said(manifest) -> list[dict]:
    return read_jsonl(manifest.parent / "data/answers.jsonl")


def test_the_sft_policy_is_no_nats_from_itself(beside):
    assert table(beside)["kl_to_sft"]["value"] == pytest.approx(0, abs=1e-5)
    assert "win_rate" not in table(beside)


def test_another_policy_is_measured_beside_it(compared, beside):
    rows = table(compared)
    gains = [a["gold_reward"] - b["gold_reward"] for a, b in zip(said(compared), said(beside), strict=True)]
    assert rows["gold_gain"]["value"] == pytest.approx(np.mean(gains))
    assert rows["gold_gain"]["stderr"] == pytest.approx(np.std(gains, ddof=1) / np.sqrt(len(gains)))
    assert rows["win_rate"]["value"] == pytest.approx(np.mean([(g > 0) + 0.5 * (g == 0) for g in gains]))
    assert {"reward", "length", "eos_rate", "distinct_1", "distinct_2", "distinct_answers", "win_rate_p"} <= set(rows)
    assert rows["kl_to_sft"]["value"] != 0


def test_rewards_that_a_program_checks_are_measured_each(compared):
    rows, replies = table(compared), said(compared)
    right = [float(extract_answer(row["reply"]) == row["answer"]) for row in replies]
    assert [row["exact_reward"] for row in replies] == right
    short = [float(len(row["reply"].split()) <= 8) for row in replies]
    assert rows["exact_reward"]["value"] == np.mean(right) and rows["length_reward_2"]["value"] == np.mean(short)
    assert rows["length_reward"]["n"] == 8


def spotcheck(capsys, artifact: str) -> tuple[int, str]:
    code = main(["spotcheck", artifact, "--questions", "8"])
    output = capsys.readouterr()
    return code, output.err + output.out


def test_prompts_are_answered_again(compared, capsys, monkeypatch):
    """In another batch; a reply and a number that were edited are noticed, though the manifest was made anew."""
    monkeypatch.setattr(parallel, "fits", None)  # set by a spot-check for its process
    code, text = spotcheck(capsys, "tiny/compare/ppo")
    assert code == 0 and "answered again: 8 of 8 prompts" in text and text.rstrip().endswith("agrees"), text
    copy = Path(shutil.copytree(compared.parent, "results/edited-answers/compare/ppo"))

    def edit(file: str, key: str, more: str) -> None:
        (copy / file).write_text((copy / file).read_text().replace(key, key + more, 1))
        write_json(copy / "manifest.json", manifest_of(copy, ["data", "metrics.json"]))

    edit("data/answers.jsonl", '"reply": "', "!")
    edit("metrics.json", '"value": ', '7.5, "was": ')
    code, text = spotcheck(capsys, "edited-answers/compare/ppo")
    assert code == 1 and re.search("differs: prompt .*: reply [\"']!", text), text
    assert re.search(r"differs: \w+: 7.5 is reported, the answers make ", text), text
    edit("data/answers.jsonl", '"id": "', "no-")
    code, text = spotcheck(capsys, "edited-answers/compare/ppo")
    assert code == 1 and "differs: 8 prompts were to be answered, 7 of them have answers" in text, text


def test_kl_and_reward_from_the_raw_answers(compared, inputs, optimised, base, tuned_policy, rewarded):
    """With whole merged models and transformers alone: log-probability ratios of the replies' tokens."""
    models = [policy.load_policy(manifest, base)[0] for manifest in (optimised, tuned_policy)]
    tokenizer = policy.load_tokenizer(base)
    for row in said(compared)[:3]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(prompt, add_special_tokens=False).input_ids
        reply = tokenizer(row["reply"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * row["ended"]
        if len(reply) != row["length"]:
            continue  # the text does not say which tokens it was made of
        ids = torch.tensor([prompt + reply])
        logp = []
        for model in models:
            with torch.no_grad():
                found = torch.log_softmax(model(ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])
            logp.append(found[len(prompt) - 1 :].sum().item())
        assert logp[0] - logp[1] == pytest.approx(row["kl"], abs=1e-3)


def test_the_same_prompts_and_streams_for_every_policy(inputs, beside, tuned_policy):
    again = make("compare", SECTION, Path("results/again/compare/sft/manifest.json"), policy=tuned_policy, **inputs)
    assert said(again) == said(beside)
    other = SECTION.model_copy(update={"seed": 1})
    made = make("compare", other, Path("results/seed/compare/sft/manifest.json"), policy=tuned_policy, **inputs)
    assert [row["reply"] for row in said(made)] != [row["reply"] for row in said(beside)]


def test_best_of_n_stands_on_the_frontier(beside):
    points = [
        point for point in read_json(beside.parent / "metrics.json")["frontier"] if point["series"] == "best of n"
    ]
    assert [point["label"] for point in points] == ["best of 1", "best of 2", "best of 4"]
    assert [point["kl"] for point in points] == [best_of_n.kl(n) for n in (1, 2, 4)]
    rewards = [point["reward"] for point in points]
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1], "by its own reward, more is better"


def test_a_judge_prefers_the_longer_answer(inputs, beside, optimised, compared, capsys, monkeypatch):
    """Its verdicts are those that the recorded answers' lengths make; the table's numbers follow from the verdicts."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(parallel, "fits", None)
    with served(longer) as (judge, got):
        section = SECTION.replaced(judge=judge)
        made = make(
            "compare",
            section,
            Path("results/judged/compare/ppo/manifest.json"),
            policy=optimised,
            beside=beside,
            **inputs,
        )
        code, text = spotcheck(capsys, "judged/compare/ppo")
    assert said(made) == said(compared) and len(got) == 16
    gains = [len(a["reply"]) - len(b["reply"]) for a, b in zip(said(made), said(beside), strict=True)]
    assert table(made)["judge_win_rate"]["value"] == pytest.approx(np.mean([(np.sign(gain) + 1) / 2 for gain in gains]))
    assert table(made)["judge_failed"]["value"] == 0 and table(compared).keys() < table(made).keys()
    assert code == 0 and text.rstrip().endswith("agrees"), text


def test_snapshots_stand_on_the_frontier(compared):
    points = read_json(compared.parent / "metrics.json")["frontier"]
    assert [point["label"] for point in points] == ["ppo", "step 2", "step 4"]
    assert all(point["kl_stderr"] is not None and point["n"] == 8 for point in points)


def test_the_base_is_compared_as_it_is_evaluated(inputs, beside, base):
    made = make(
        "compare", SECTION, Path("results/tiny/compare/base/manifest.json"), policy=base, beside=beside, **inputs
    )
    assert table(made)["kl_to_sft"]["value"] > 1


def test_a_hand_written_reward_is_shown_where_there_is_no_model(inputs, tuned_policy, home):
    """After GRPO, what it does not score counts as 0, as in training."""
    Path("long.py").write_text("def longer(prompt, reply, answer):\n    return len(reply) / (len(reply) % 2)\n")
    parts = {key: inputs[key] for key in ("data", "base", "sft")}
    section = SECTION.model_copy(update={"reward_function": "long.py:longer", "reward_seconds": 9.0, "best_of": 1})
    made = make("compare", section, Path("results/written/compare/sft/manifest.json"), policy=tuned_policy, **parts)
    lengths = [len(row["reply"]) for row in said(made)]
    assert [row["reward"] for row in said(made)] == [length * (length % 2) for length in lengths]
    assert len({length % 2 for length in lengths}) == 2


def test_a_gold_function_of_ones_own_judges_rows_with_an_answer(inputs, tuned_policy, home):
    Path("own_gold.py").write_text("def longer(prompt, reply, answer):\n    return len(reply) + 100 * len(answer)\n")
    section = SECTION.model_copy(update={"gold_function": "own_gold.py:longer"})
    compared = make(
        "compare", section, Path("results/own-gold/compare/sft/manifest.json"), policy=tuned_policy, **inputs
    )
    golds = [row["gold_reward"] for row in said(compared)]
    assert golds == [len(row["reply"]) + 100 * len(row["answer"]) for row in said(compared)]
    assert table(compared)["gold_reward"]["value"] == pytest.approx(np.mean(golds))
    point = next(p for p in read_json(compared.parent / "metrics.json")["frontier"] if p["label"] == "best of 4")
    assert "gold_reward" in point
    without = section.model_copy(update={"gold_function": None})
    parts = {key: inputs[key] for key in ("data", "base", "sft")}
    bare = make("compare", without, Path("results/no-gold/compare/sft/manifest.json"), policy=tuned_policy, **parts)
    assert "gold_reward" not in table(bare), "control"
    sums = [2 * row["exact_reward"] + row["length_reward"] - row["length_reward_2"] for row in said(bare)]
    assert [row["reward"] for row in said(bare)] == sums, "what a program checks is the reward where there is no other"
    assert [row["gold_reward"] for row in said(bare)] == [None] * len(golds)
    assert [row["reply"] for row in said(bare)] == [row["reply"] for row in said(compared)]


def test_a_row_without_an_answer_has_no_gold(home):
    Path("one.py").write_text("def one(prompt, reply, answer):\n    return float(answer)\n")
    judge = handwritten.load_judge(SECTION.model_copy(update={"gold_function": "one.py:one"}), "gold")
    rows = [{"prompt": "a", "answer": "2"}, {"prompt": "b", "answer": None}]
    assert judge.scores_of_answered(rows, ["x", "y"]) == [2.0, None]
    with pytest.raises(UserError, match=r"^gold_function one.py:one: ValueError"):
        judge.scores_of_answered([{"prompt": "a", "answer": "no number"}], ["x"])


def test_other_prompts_are_refused(compared, beside):
    with pytest.raises(UserError, match="answered other prompts"):
        comparison.gains(said(compared), said(beside)[1:])


def test_distinct_grams():
    assert comparison.distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert comparison.distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert comparison.distinct([""], 2) == 0


def test_a_sure_win_and_a_draw():
    before = [{"id": str(n), "gold_reward": 0.0, "reward": None} for n in range(20)]
    after = [row | {"gold_reward": 1.0} for row in before]
    rows = {row["metric"]: row["value"] for row in comparison.gains(after, before)}
    assert rows["win_rate"] == 1 and rows["win_rate_p"] == pytest.approx(2 * 0.5**20)
    rows = {row["metric"]: row["value"] for row in comparison.gains(before, before)}
    assert rows["win_rate"] == 0.5 and rows["win_rate_p"] == 1.0 and json.dumps(rows)
