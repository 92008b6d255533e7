"""ppo: the identities of its first step, its update against another implementation, rails, resume, processes."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from tiny import ROOT, make, ppo, sft

from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, read_jsonl
from posttrain.maths import sampling
from posttrain.models import adapters, completions, network, policy, reward_head, tokens
from posttrain.rl import answers, batches, loop, prompts, scorers, states
from posttrain.rl.health import check_rails, check_ratio
from posttrain.stages import ppo as stage
from posttrain.training import checkpoint

WEIGHTS = "model/adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(data, base, tuned_policy, rewarded):
    return {"data": data, "base": base, "sft": tuned_policy, "reward": rewarded}


@pytest.fixture(scope="module")
def trained(inputs):
    return make("ppo", ppo(), Path("results/tiny/ppo/manifest.json"), **inputs)


@pytest.fixture(scope="module")
def history(trained):
    return read_json(trained.parent / "metrics.json")["history"]


@pytest.fixture
def setting(inputs):
    """Models with their scorer and prompts, fresh."""

    def made(section=None, sft_policy=None, **changes):
        section = section or ppo(**changes)
        found = adapters.foundation_of(inputs["base"], inputs["sft"])
        models = stage.load_models(section, found)
        scorer = scorers.by_model(reward_head.load(inputs["reward"], found, models.policy.model))
        return (
            section,
            models,
            scorer,
            prompts.training_prompts(section, inputs["data"], models.tokenizer, models.policy.model),
        )

    return made


def test_the_first_ratio_is_1_and_the_first_kl_0(history):
    """Exactly: before the first update the policy is the reference, and its own old self."""
    assert history[0]["kl"] == 0 and history[0]["kl_k2"] == 0 and history[0]["kl_k3"] == 0
    assert all(entry["first_ratio_error"] == 0 for entry in history), "in every iteration, for its own first minibatch"
    assert history[0]["clip_fraction"] == 0, "in warm-up the policy stands still"
    assert history[-1]["kl"] != 0 and history[-1]["policy_grad_norm"] > 0, "control: it moves afterwards"


def test_every_health_figure_is_there(history):
    watched = {"kl", "entropy", "clip_fraction", "ratio_error", "explained_variance", "eos_rate", "length", "reward"}
    assert all(
        watched | {"gold_reward", "value_loss", "policy_loss", "kl_coefficient"} <= set(entry) for entry in history
    )
    assert all(math.isfinite(value) for entry in history for value in entry.values())
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]


def test_generation_and_the_training_forward_agree(setting):
    """Cached, batched, left-padded generation chooses what the training forward gives log-probabilities to: their
    streams' numbers draw the same tokens from the forward's logits."""
    _, models, _, rows = setting()
    asked, seeds = [row["ids"] for row in rows[:5]], list(range(5))
    with torch.no_grad(), network.adapter(models.policy.model, "policy"):
        said = answers.draw(models.policy.model, models.tokenizer, asked, seeds, 12, 0.7)
        logits = completions.reply_logits(models.policy.model, said, 0.7)
        alone = answers.draw(models.policy.model, models.tokenizer, asked[2:3], seeds[2:3], 12, 0.7)
    numbers = answers.uniform_numbers(seeds, 12)
    for t in range(said.replies.shape[1]):
        drawn = sampling.draw_tokens(logits[:, t], numbers[:, t])
        assert torch.where(said.mask[:, t] == 1, drawn == said.replies[:, t], True).all(), t
    length = int(alone.mask.sum())
    assert torch.equal(said.replies[2, :length], alone.replies[0, :length]), "an answer does not depend on its batch"


def test_answers_drawn_in_parts_are_those_drawn_together(setting, monkeypatch):
    """At most two of five at once; control: another iteration has other streams and other answers."""
    _, models, scorer, rows = setting()
    sizes = []
    monkeypatch.setattr(answers, "sample", lambda *given, by=answers.sample: sizes.append(len(given[2])) or by(*given))

    def drawn(iteration, **size):
        return stage.gather(ppo(batch_size=5, **size), models, scorer, rows[:5], iteration, 0.1).answers.replies

    whole, parts, others = drawn(0), drawn(0, answer_batch_size=2), drawn(1, answer_batch_size=2)
    assert torch.equal(whole, parts) and sizes == [5, 2, 2, 1, 2, 2, 1]
    assert not torch.equal(whole, others)


def test_parts_of_similar_length_say_the_same(setting):
    """Each row once, trimmed to its part's longest: the same log-probabilities but for rounding."""
    _, models, _, rows = setting()
    with torch.no_grad(), network.adapter(models.policy.model, "policy"):
        said = answers.draw(
            models.policy.model, models.tokenizer, [row["ids"] for row in rows[:7]], list(range(7)), 24, 1.5
        )
        whole = completions.log_probs(models.policy.model, said)
        parts = [(part, some, completions.log_probs(models.policy.model, some)) for part, some in said.by_length(3)]
    assert sorted(n for part, _, _ in parts for n in part) == list(range(7))
    lengths = said.mask.sum(dim=1)
    assert len(set(lengths.tolist())) > 1, "else nothing is trimmed"
    for part, some, logp in parts:
        assert some.replies.shape[1] == lengths[part].max()
        assert torch.allclose(logp, whole[part][:, : logp.shape[1]], atol=1e-5)


def test_draws_follow_the_softmax():
    """Second tokens of 4,000 streams: chi-square against the softmax of logits / temperature; control: without it."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampler = answers.Sampler(answers.uniform_numbers(list(range(4000)), 2), 0.5)
    _, drawn = (sampler(None, logits.expand(4000, 4)).argmax(dim=-1) for _ in range(2))
    counts = torch.bincount(drawn, minlength=4)
    right, wrong = (stats.chisquare(counts, 4000 * torch.softmax(logits.double() / t, dim=0)) for t in (0.5, 1.0))
    assert right.pvalue > 0.01 and wrong.pvalue < 1e-6


def test_a_stream_depends_on_its_seed_alone():
    """Not on the other streams, nor on how many numbers are taken; the numbers of other seeds are others."""
    both, longer = answers.uniform_numbers([7, 8], 12), answers.uniform_numbers([8], 48)
    assert torch.equal(both[1], longer[0, :12]) and not torch.equal(both[0], both[1])


def test_the_update_against_another_implementation(setting):
    """One minibatch of policy and value: our gradients against a plain loop over single tokens."""
    section, models, scorer, rows = setting(batch_size=4, epochs=1, value_warmup=0)
    asked = rows[:4]
    made = stage.gather(section, models, scorer, asked, 0, 0.1)
    optimizer, _ = states.optimizers(section, models)
    taken = {}

    def keep(longest, policy):
        taken.update({name: [w.grad.clone() for w in ws] for name, ws in optimizer.weights.items()})
        return {}

    optimizer.step = keep
    loop.step(stage.METHOD, section, models, optimizer, made, [0, 1, 2, 3], warming=False)
    loss = {"policy": 0.0, "value": 0.0}
    count = made.answers.mask.sum().item()
    for i in range(4):
        one, length = made.answers.rows([i]), int(made.answers.mask[i].sum())
        prompt = one.prompts[0][one.prompt_mask[0] == 1]
        ids = torch.cat([prompt, one.replies[0, :length]])[None]
        with network.adapter(models.policy.model, "policy"):
            logp = torch.log_softmax(models.policy.model(input_ids=ids).logits[0], dim=-1)
        with network.adapter(models.policy.model, "value"):
            hidden = models.policy.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        for t in range(length):
            at = len(prompt) + t - 1
            ratio = torch.exp(logp[at, ids[0, at + 1]] - made.logp[i, t])
            gain = made.advantages[i, t]
            loss["policy"] -= torch.min(ratio * gain, torch.clip(ratio, 0.8, 1.2) * gain) / count
            value, old = models.value_head(hidden[at])[0], made.values[i, t]
            near = old + torch.clip(value - old, -0.2, 0.2)
            error = torch.max((value - made.returns[i, t]) ** 2, (near - made.returns[i, t]) ** 2)
            loss["value"] += 0.5 * error / count
    for name in loss:
        with network.adapter(models.policy.model, name):
            expected = torch.autograd.grad(loss[name], optimizer.weights[name], allow_unused=True)
        largest = max(grad.abs().max() for grad in expected if grad is not None)
        assert largest > 0
        for mine, other in zip(taken[name], expected, strict=True):
            assert torch.allclose(mine, other, atol=1e-4 * largest.item()), name


def test_rewards_and_kl_from_the_raw_answers(setting, inputs, base, tuned_policy):
    """What an iteration records, recomputed with the merged policy, one answer at a time."""
    section, models, scorer, rows = setting(batch_size=3)
    made = stage.gather(section, models, scorer, rows[:3], 0, 0.5)
    merged, _ = policy.load_policy(tuned_policy, base)
    for i in range(3):
        one, length = made.answers.rows([i]), int(made.answers.mask[i].sum())
        prompt = one.prompts[0][one.prompt_mask[0] == 1]
        ids = torch.cat([prompt, one.replies[0, :length]])[None]
        with torch.no_grad():
            logp = torch.log_softmax(merged(ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[
                len(prompt) - 1 :, 0
            ]
        assert torch.allclose(made.reference[i, :length], logp, atol=1e-4)
        paid = made.scores[i] - section.missing_eos_penalty * (not made.answers.ended[i])
        assert made.returns[i, length - 1].item() == pytest.approx(paid.item(), abs=1e-5), (
            "nothing follows the last token"
        )


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_micro_batch_changes_nothing_that_is_learned(setting, inputs, micro):
    """Gradients of one global batch, whole and in micro-batches."""
    grads = []
    for size in (4, micro):
        section, models, scorer, rows = setting(batch_size=4, micro_batch_size=size, sft_coefficient=0.5)
        made = stage.gather(section, models, scorer, rows[:4], 0, 0.1)
        taught = prompts.demonstrations(inputs["data"], models.tokenizer)
        optimizer, _ = states.optimizers(section, models)
        optimizer.step = lambda *rest, **more: {}
        loop.step(stage.METHOD, section, models, optimizer, made, [0, 1, 2, 3], warming=False, demonstrated=taught)
        grads.append(torch.cat([w.grad.flatten() for ws in optimizer.weights.values() for w in ws]))
    assert grads[0].norm() > 0
    assert (grads[0] - grads[1]).abs().max() <= 1e-5 * max(1.0, grads[0].abs().max().item())


def test_the_sft_loss_beside_ppo(setting, inputs):
    """What `sft_coefficient` adds to the policy's gradient: that of TRL's loss on the same rows, times its weight."""
    grads = {}
    for weight in (0.0, 0.5):
        section, models, scorer, rows = setting(batch_size=4, sft_coefficient=weight)
        made = stage.gather(section, models, scorer, rows[:4], 0, 0.1)
        taught = prompts.demonstrations(inputs["data"], models.tokenizer) if weight else []
        optimizer, _ = states.optimizers(section, models)
        optimizer.step = lambda *rest, **more: {}
        health = loop.step(stage.METHOD, section, models, optimizer, made, [0, 1, 2, 3], False, taught)
        grads[weight] = {name: [w.grad.clone() for w in ws] for name, ws in optimizer.weights.items()}
    lines = read_jsonl(inputs["data"].parent / "data" / "sft" / "train.jsonl")
    asked = [lines[n] for n in batches.rows_of_iteration(len(lines), 4, section.seed, 0, "taught")]
    encoded = [tokens.encode(models.tokenizer, row) for row in asked]
    total = sum(label != tokens.MASKED for row in encoded for label in row["labels"])
    loss = 0.0
    with network.adapter(models.policy.model, "policy"):
        for row in encoded:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            logits = models.policy.model(input_ids=ids).logits[0, :-1]
            loss = loss + torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / total
        expected = torch.autograd.grad(0.5 * loss, optimizer.weights["policy"])
    assert health["sft_loss"] == pytest.approx(loss.item(), abs=1e-5)
    largest = max(grad.abs().max().item() for grad in expected)
    assert largest > 0
    for plain, both, added in zip(grads[0.0]["policy"], grads[0.5]["policy"], expected, strict=True):
        assert torch.allclose(both - plain, added, atol=1e-4 * largest)
    assert all(torch.equal(a, b) for a, b in zip(grads[0.0]["value"], grads[0.5]["value"], strict=True))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(inputs, trained):
    again = make("ppo", ppo(), Path("results/again/ppo/manifest.json"), **inputs)
    other = make("ppo", ppo(seed=1), Path("results/other/ppo/manifest.json"), **inputs)
    assert read_json(again)["files"] == read_json(trained)["files"]
    assert read_json(other)["files"][WEIGHTS] != read_json(trained)["files"][WEIGHTS]


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_a_killed_run_resumes_to_the_same_bytes(inputs, trained, iteration, monkeypatch):
    """NF4, with snapshots and adaptive state; killed in the middle of an iteration."""
    output, original = Path(f"results/killed-{iteration}/ppo/manifest.json"), loop.update
    calls = []

    def dying(*rest, **more):
        calls.append(1)
        if len(calls) == iteration + 1:
            raise KeyboardInterrupt
        return original(*rest, **more)

    monkeypatch.setattr(loop, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        make("ppo", ppo(), output, **inputs)
    monkeypatch.undo()
    make("ppo", ppo(), output, **inputs)
    assert read_json(output)["files"] == read_json(trained)["files"]


def test_without_the_optimiser_a_resumed_run_is_another(inputs, trained, monkeypatch):
    """Control: drop one piece of the state."""
    output, original = Path("results/forgetful/ppo/manifest.json"), loop.update
    calls = []

    def dying(*rest, **more):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*rest, **more)

    monkeypatch.setattr(loop, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        make("ppo", ppo(), output, **inputs)
    monkeypatch.undo()
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    make("ppo", ppo(), output, **inputs)
    assert read_json(output)["files"][WEIGHTS] != read_json(trained)["files"][WEIGHTS]


def test_a_half_written_checkpoint_is_never_taken_up(tmp_path):
    checkpoint.write(tmp_path / "checkpoint-000001", {"a": torch.ones(1)}, {"iteration": 1})
    (tmp_path / "checkpoint-000002").mkdir()
    assert checkpoint.read(tmp_path)[1]["iteration"] == 1


def test_a_rail_stops_the_run_with_its_reason(inputs, home):
    """An absurd learning rate."""
    from posttrain.config.sections import Rails

    section = ppo(learning_rate=0.5, value_warmup=0, kl_coefficient=0.0, rails=Rails(max_kl=1.0, min_eos_rate=0.0))
    output = Path("results/rail/ppo/manifest.json")
    with pytest.raises(UserError, match=r"ppo: stopped at iteration \d+: KL exploded") as error:
        make("ppo", section.model_copy(update={"steps": 8}), output, **inputs)
    step = int(re.search(r"iteration (\d+)", str(error.value)).group(1))
    good = re.search(r"last good checkpoint is \S+checkpoint-(\d+)", str(error.value))
    assert (int(good.group(1)) if good else 0) == max(0, step - 2), "the newest weights are those that exploded"
    assert not output.exists(), "a run that left the rails is never a result"
    assert list(output.parent.glob("checkpoints/*/checkpoint-*")), "what was good is kept"


def rail(health: dict, tmp_path, first: float = 10.0) -> str:
    from posttrain.config.sections import Rails

    section = ppo(rails=Rails(), max_new_tokens=12 if first < 10 else 40)
    good = {"reward": 1.0, "kl": 1.0, "eos_rate": 1.0, "length": first, "step": 5}
    check_rails(section, good, [good], tmp_path)  # control: nothing is wrong with it
    with pytest.raises(UserError) as error:
        check_rails(section, good | health, [good], tmp_path)
    return str(error.value)


def test_every_rail(tmp_path):
    assert "answers no longer end: EOS rate 0.05" in rail({"eos_rate": 0.05}, tmp_path)
    assert "answers run away: 31 tokens, 10 at first" in rail({"length": 31.0}, tmp_path)
    assert "answers run away: 12 tokens, 3 at first" in rail({"length": 12.0}, tmp_path, first=3.0)
    with pytest.raises(UserError, match=r"at iteration 7, before its first update: the first ratio is off 1 by 0\.5"):
        check_ratio(ppo(), 6, 0.5)
    check_ratio(ppo(), 6, 0.0)
    assert "is no number" in rail({"reward": math.nan}, tmp_path)
    assert "KL exploded: 51.0 nats" in rail({"kl": 51.0}, tmp_path)


def test_the_last_update_is_watched_too(inputs, home):
    """One update, after which there is no iteration that would notice."""
    from posttrain.config.sections import Rails

    section = ppo(steps=1, learning_rate=0.5, value_warmup=0, kl_coefficient=0.0, snapshot_steps=1)
    output = Path("results/last/ppo/manifest.json")
    with pytest.raises(UserError, match="KL exploded"):
        make("ppo", section.model_copy(update={"rails": Rails(max_kl=1.0, min_eos_rate=0.0)}), output, **inputs)
    assert not output.exists()


def test_a_models_own_generation_settings_do_not_count(setting):
    """A published model may forbid or punish tokens; log-probabilities know nothing of it."""
    _, models, _, rows = setting()
    asked = [row["ids"] for row in rows[:4]]
    with torch.no_grad(), network.adapter(models.policy.model, "policy"):
        known = answers.draw(models.policy.model, models.tokenizer, asked, [1, 2, 3, 4], 12, 1.0)
        completions.causal(models.policy.model).generation_config.repetition_penalty = 5.0
        again = answers.draw(models.policy.model, models.tokenizer, asked, [1, 2, 3, 4], 12, 1.0)
    assert torch.equal(known.replies, again.replies)


def test_a_seed_written_as_a_date(setting):
    section, models, scorer, rows = setting(seed=20250101, batch_size=4)
    made = stage.gather(section, models, scorer, rows[:4], 0, 0.1)
    assert loop.update(stage.METHOD, section, models, states.optimizers(section, models)[0], made, warming=False)


def test_answers_longer_than_the_context_are_refused(setting):
    with pytest.raises(UserError, match=r"max_new_tokens 4000 and the longest prompt \(\d+ tokens\) are over .* 128"):
        setting(max_new_tokens=4000)


def test_a_loss_that_is_no_number_and_another_policys_answers_never_reach_the_weights(setting):
    section, models, scorer, rows = setting(batch_size=4)
    made = stage.gather(section, models, scorer, rows[:4], 2, 0.1)
    optimizer, _ = states.optimizers(section, models)
    before = [w.detach().clone() for w in optimizer.weights["policy"]]
    no_number = made._replace(advantages=made.advantages * math.nan)
    of_another = made._replace(logp=made.logp - 0.5)
    off = r"stopped at iteration 3, .* the first ratio is off 1 by 0\.6"
    for bad, message in ((no_number, "a loss is no number"), (of_another, off)):
        with pytest.raises(UserError, match=message):
            loop.update(stage.METHOD, section, models, optimizer, bad, warming=False)
    assert all(torch.equal(one, two) for one, two in zip(before, optimizer.weights["policy"], strict=True))


def test_a_hand_written_reward(inputs, home):
    """A function in a file: it is called with prompt, reply and answer, and its fingerprint is held to."""
    from posttrain.ground.syntax import fingerprint

    file = Path("brevity.py")
    file.write_text(
        "def brevity(prompt, reply, answer):\n    # the shorter the better\n    return -float(len(reply))\n"
    )
    section = ppo(reward_function="brevity.py:brevity", reward_code=fingerprint(file), steps=3)
    parts = {key: inputs[key] for key in ("data", "base", "sft")}
    made = make("ppo", section, Path("results/brief/ppo/manifest.json"), **parts)
    assert read_json(made.parent / "metrics.json")["history"][0]["reward"] < 0
    file.write_text(file.read_text().replace("shorter the", "briefer the"))
    assert fingerprint(file) == section.reward_code, "a comment never counts"
    file.write_text("def brevity(prompt, reply, answer):\n    return float('nan')\n")
    with pytest.raises(UserError, match="was edited after this run was planned"):
        make("ppo", section, Path("results/edited/ppo/manifest.json"), **parts)
    section = section.model_copy(update={"reward_code": fingerprint(file)})
    with pytest.raises(UserError, match="returned nan"):
        make("ppo", section, Path("results/nan-reward/ppo/manifest.json"), **parts)


def test_a_gold_function_is_watched_and_trains_nothing(inputs, home):
    Path("watch.py").write_text("def watch(prompt, reply, answer):\n    return 1000.0 + len(answer)\n")
    histories = {}
    for gold in ("watch.py:watch", None):
        output = Path(f"results/gold-{bool(gold)}/ppo/manifest.json")
        made = make("ppo", ppo(steps=2, gold_function=gold), output, **inputs)
        histories[gold] = read_json(made.parent / "metrics.json")["history"]
    assert all(entry["gold_reward"] > 1000 for entry in histories["watch.py:watch"])
    assert histories[None] == [
        {key: value for key, value in entry.items() if key != "gold_reward"} for entry in histories["watch.py:watch"]
    ], "control: without it the same training, and no gold"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_on_plain_weights_and_after_full_fine_tuning(data, base, method, home):
    from posttrain.config.sections import Reward

    policy_ = make("sft", sft(method=method), Path(f"results/plain-{method}/sft/manifest.json"), data=data, base=base)
    under = policy_ if method == "full" else base
    inputs = {"data": data, "base": under, "sft": policy_}
    rewarding = Reward(steps=2, batch_size=4, seed=0, max_length=128)
    reward = make("reward", rewarding, Path(f"results/plain-{method}/reward/manifest.json"), **inputs)
    made = make("ppo", ppo(), Path(f"results/plain-{method}/ppo/manifest.json"), **inputs, reward=reward)
    history = read_json(made.parent / "metrics.json")["history"]
    assert history[0]["kl"] == 0 and history[0]["first_ratio_error"] == 0
    model, _ = policy.load_policy(made, under)
    assert model(torch.arange(20, 40)[None]).logits.isfinite().all()


def test_frozen_weights_stay_as_they_are(setting, base):
    """An update changes the policy's and the value function's adapters and nothing else, to the bit."""
    section, models, scorer, rows = setting(batch_size=4)
    before = {name: weight.detach().clone() for name, weight in models.policy.model.state_dict().items()}
    made = stage.gather(section, models, scorer, rows[:4], 0, 0.1)
    optimizer, _ = states.optimizers(section, models)
    loop.update(stage.METHOD, section, models, optimizer, made, warming=False)
    changed = {
        name for name, weight in models.policy.model.state_dict().items() if not torch.equal(weight, before[name])
    }
    assert changed and all(".policy." in name or ".value." in name for name in changed)


def test_snapshots_are_adapters_at_fixed_iterations(trained, base):
    folders = sorted((trained.parent / "snapshots").iterdir())
    assert [folder.name for folder in folders] == ["000002"]
    assert {"adapter_config.json", "adapter_model.safetensors", "policy.json"} <= {f.name for f in folders[0].iterdir()}
    assert "snapshots/000002/adapter_model.safetensors" in read_json(trained)["files"]


def test_prompts_go_round_in_a_fresh_order_each_time():
    rounds = [batches.rows_of_iteration(10, 4, seed=0, iteration=n) for n in range(5)]
    assert sorted(n for numbers in rounds for n in numbers) == sorted([*range(10)] * 2)
    assert (
        batches.rows_of_iteration(10, 4, seed=0, iteration=2)
        == rounds[2]
        != batches.rows_of_iteration(10, 4, seed=1, iteration=2)
    )


PROCESS = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from tiny import ppo
from posttrain.models import adapters, reward_head
from posttrain.rl import loop, prompts, scorers, states
from posttrain.training import parallel
from posttrain.stages import ppo as stage
torch.set_num_threads(1)
data, base, sft, reward = map(Path, sys.argv[2:6])
section = ppo(batch_size=8, epochs=2, minibatches=2, value_warmup=0, sft_coefficient=0.5)
foundation = adapters.foundation_of(base, sft)
models = stage.load_models(section, foundation)
scorer = scorers.by_model(reward_head.load(reward, foundation, models.policy.model))
rows = prompts.training_prompts(section, data, models.tokenizer, models.policy.model)
optimizer, _ = states.optimizers(section, models)
made = stage.gather(section, models, scorer, rows[:8], 0, 0.1)
taught = prompts.demonstrations(data, models.tokenizer)
health = loop.update(stage.METHOD, section, models, optimizer, made, warming=False, demonstrated=taught)
if parallel.main():
    weights = [w.detach() for ws in optimizer.weights.values() for w in ws]
    torch.save({{"weights": weights, "replies": made.answers.replies, "kl": health["approx_kl"]}}, sys.argv[1])
"""


@pytest.mark.slow
def test_1_2_and_4_processes_make_the_same_update(inputs, tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(tests=str(ROOT / "tests")))
    paths = [str(inputs[role].resolve()) for role in ("data", "base", "sft", "reward")]
    made = {}
    for count in (1, 2, 4):
        out = tmp_path / f"{count}.pt"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "workflow")}
        done = subprocess.run(
            [*torchrun, str(script), str(out), *paths], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        made[count] = torch.load(out, weights_only=True)
    for count in (2, 4):
        assert torch.equal(made[count]["replies"], made[1]["replies"]), "the same answers"
        worst = max((a - b).abs().max() for a, b in zip(made[1]["weights"], made[count]["weights"], strict=True))
        assert worst < 1e-5
        assert made[count]["kl"] == pytest.approx(made[1]["kl"], abs=1e-6)


@pytest.mark.slow
def test_the_command_in_two_processes_publishes_the_same_policy(inputs, home):
    """As torchrun starts it, three answers for two processes, in micro-batches: within rounding."""
    from safetensors.torch import load_file

    section = ppo(batch_size=3, micro_batch_size=1, steps=3, snapshot_steps=1)
    alone = make("ppo", section, Path("results/alone/ppo/manifest.json"), **inputs)
    output = Path("results/together/ppo/manifest.json")
    output.parent.mkdir(parents=True)
    (output.parent / "config.yaml").write_text(section.model_dump_json(exclude_none=True))
    flags = [part for role, path in inputs.items() for part in (f"--{role}", str(path))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "posttrain"]
    command = [*torchrun, "ppo", "--config", str(output.parent / "config.yaml"), "--output", str(output), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "workflow")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(manifest.parent / WEIGHTS) for manifest in (alone, output))
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-5
    assert sorted(read_json(alone)["files"]) == sorted(read_json(output)["files"])
