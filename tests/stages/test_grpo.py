"""grpo: its first step, its rewards, groups drawn again, processes of its own, resume."""

import math
from pathlib import Path

import pytest
import torch
from test_processes import together
from tiny import grpo, make

from posttrain.config.sections import RewardPart
from posttrain.ground.errors import Interrupted
from posttrain.ground.files import read_json
from posttrain.models import adapters
from posttrain.rl import loop, prompts, scorers, states
from posttrain.rl.networks import load_models
from posttrain.stages import grpo as stage
from posttrain.training import interruption
from posttrain.training.interruption import GO_ON, SAVE, TERMINATED

EVERYTHING = dict(
    kl="reward", advantage="leave_one_out", average="tokens", ratio="sequence", clip_high=0.3, redraws=1,
    unended="masked", micro_batch_size=3, minibatches=2, sft_coefficient=0.1,
    rewards=[RewardPart(kind="model"), RewardPart(kind="length", words=4, weight=0.5)],
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(data, base, tuned_policy, rewarded):
    return {"data": data, "base": base, "sft": tuned_policy, "reward": rewarded}


@pytest.fixture(scope="module")
def trained(inputs):
    return make("grpo", grpo(**EVERYTHING), Path("results/tiny/grpo/manifest.json"), **inputs)


def setting(inputs, **changes):
    """A section with its models and prompts, fresh."""
    section = grpo(**changes)
    foundation = adapters.foundation_of(inputs["base"], inputs["sft"])
    models = load_models(section, foundation)
    return section, foundation, models, prompts.training_prompts(section, inputs["data"], models.tokenizer,
                                                                 models.policy.model)  # fmt: skip


def test_it_starts_from_the_sft_policy_and_moves(trained):
    history = read_json(trained.parent / "metrics.json")["history"]
    assert history[0]["kl"] == 0 and all(point["first_ratio_error"] == 0 for point in history)
    assert history[-1]["kl"] != 0 and history[-1]["policy_grad_norm"] > 0
    assert all(math.isfinite(value) for point in history for value in point.values())
    assert {"equal_groups", "redrawn_groups", "kl_loss", "sft_loss", "gold_reward"} <= history[0].keys()
    assert [folder.name for folder in sorted((trained.parent / "snapshots").iterdir())] == ["000002"]


def test_a_group_has_one_prompt_and_answers_of_their_own(inputs):
    section, foundation, models, rows = setting(inputs)
    with scorers.of_parts(section, models, foundation, inputs["reward"]) as scorer:
        made = stage.gather(section, models, scorer, rows[:2], 0, 0.1)
    assert [row["id"] for row in made.rows] == [rows[0]["id"]] * 4 + [rows[1]["id"]] * 4
    assert len({tuple(reply) for reply in made.answers.replies[:4].tolist()}) > 1
    assert made.advantages.view(2, 4).sum(dim=1).abs().max() < 1e-4 < made.advantages.abs().max()


def test_equal_rewards_have_no_gradient(inputs):
    """But for KL, which is 0 at first. Control: rewards that differ."""
    section, _, models, rows = setting(inputs, rewards=[RewardPart(kind="length", words=1000)],
                                                missing_eos_penalty=0.0)  # fmt: skip
    optimizer, _ = states.optimizers(section, models)
    optimizer.step = lambda longest, policy: {}
    largest = []
    for scale in (0.0, 1.0):

        def score(batch, asked, by=scale):
            return 1 + by * batch.replies.sum(dim=1) % 7

        made = stage.gather(section, models, score, rows[:2], 0, 0.1)
        loop.step(stage.METHOD, section, models, optimizer, made, list(range(8)), warming=False)
        largest.append(max(w.grad.abs().max().item() for w in optimizer.weights["policy"] if w.grad is not None))
    assert largest[0] < 1e-6 < largest[1]


def test_groups_of_equal_rewards_are_drawn_again(inputs):
    """From other prompts, at most `redraws` times; the answers of the others stay. Control: without redraws they stay
    too."""
    section, _, models, rows = setting(inputs, redraws=2, missing_eos_penalty=0.0)
    first, others = rows[:2], rows[10:14]

    def spare(count: int, name: str) -> list[dict]:
        return others[:count] if name == "redraw 0" else others[2 : 2 + count]

    def score(batch, asked):  # equal in the group of the first prompt
        known = torch.tensor([row["id"] == first[0]["id"] for row in asked])
        return torch.where(known, 1.0, torch.rand(len(asked), generator=torch.Generator().manual_seed(1)))

    made = stage.gather(section, models, score, first, 0, 0.0, spare)
    assert [row["id"] for row in made.rows] == [others[0]["id"]] * 4 + [first[1]["id"]] * 4
    assert made.figures == {"equal_groups": 0.0, "redrawn_groups": 1}
    kept = stage.gather(section, models, score, first, 0, 0.0)
    assert answered(made) == answered(kept)
    assert kept.figures["equal_groups"] == 0.5, "control"


def answered(made) -> list[list[int]]:
    """The tokens of the last group's answers."""
    return [
        reply[mask == 1].tolist() for reply, mask in zip(made.answers.replies[4:], made.answers.mask[4:], strict=True)
    ]


@pytest.mark.parametrize("kl", ["loss", "reward"])
def test_kl_counts_where_it_should(inputs, kl):
    """In the reward it changes advantages, in the loss it does not."""
    section, foundation, models, rows = setting(inputs, kl=kl, missing_eos_penalty=0.0)
    with torch.no_grad():  # away from the reference
        for _, weight in models.policy.trained():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with scorers.of_parts(section, models, foundation, inputs["reward"]) as scorer:
        free, held = (stage.gather(section, models, scorer, rows[:2], 0, beta) for beta in (0.0, 5.0))
    assert torch.allclose(free.advantages, held.advantages) == (kl == "loss")
    same = [stage.gather(section, models, lambda batch, asked: torch.ones(8), rows[:2], 0, beta) for beta in (0.0, 5.0)]
    assert [made.figures["equal_groups"] for made in same] == [1.0, 1.0], "told of the reward alone"


def test_stopped_and_continued_gives_the_same_bytes(inputs, trained, monkeypatch):
    planned = iter((GO_ON, SAVE, TERMINATED))
    monkeypatch.setattr(interruption, "due", lambda step, saving: next(planned, GO_ON))
    output = Path("results/stopped/grpo/manifest.json")
    with pytest.raises(Interrupted):
        make("grpo", grpo(**EVERYTHING), output, **inputs)
    make("grpo", grpo(**EVERYTHING), output, **inputs)
    assert read_json(output)["files"] == read_json(trained)["files"]


def test_a_function_of_the_users_and_exact_answers(inputs, home):
    Path("short.py").write_text("def short(prompt, reply, answer):\n    return -len(reply)\n")
    parts = {role: manifest for role, manifest in inputs.items() if role != "reward"}
    terms = [RewardPart(kind="function", weight=0.01), RewardPart(kind="exact", answer="text")]
    section = grpo(steps=1, reward_function="short.py:short", rewards=terms)
    made = make("grpo", section, Path("results/own/grpo/manifest.json"), **parts)
    assert read_json(made.parent / "metrics.json")["history"][0]["reward"] < 0


@pytest.mark.slow
def test_two_processes_learn_the_same(inputs, trained):
    """Within rounding: groups are shared out, and so are those that are drawn again. Control: a process that sees the
    rewards of its own answers only."""
    from safetensors.torch import load_file

    run = ("grpo", grpo(**EVERYTHING), inputs)
    folder = together({"right": (*run, ""), "wrong": (*run, "own rewards")}, 2, Path("results/grpo-together"))
    one = load_file(trained.parent / "model" / "adapter_model.safetensors")
    worst = {}
    for name in ("right", "wrong"):
        two = load_file(folder / name / "model" / "adapter_model.safetensors")
        worst[name] = max((one[key] - two[key]).abs().max().item() for key in one)
    assert worst["right"] < 1e-5 < worst["wrong"]
    histories = [read_json(made / "metrics.json")["history"] for made in (trained.parent, folder / "right")]
    for alone, shared in zip(*histories, strict=True):
        assert shared == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert read_json(folder / "right" / "provenance.json")["shape"]["processes"] == 2
    assert sorted(read_json(trained)["files"]) == sorted(read_json(folder / "right" / "manifest.json")["files"])
