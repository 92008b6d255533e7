"""reward: it learns preferences, scores what it should and nothing else, and resumes to the same bytes."""

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_base import killed_at
from tiny import first_gradient, make, ppo, reward, sft

from posttrain.config.sections import Prepare, Source, Tokenizer
from posttrain.data import preferences
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, read_jsonl
from posttrain.models import adapters, completions, network, policy, quantization, reward_head, tokens
from posttrain.rl import answers, networks
from posttrain.stages import reward as stage
from posttrain.training import rankings


def scorer(base, tuned_policy, rewarded):
    """A language model with the reward model's adapter on it, as PPO scores with it."""
    foundation = adapters.foundation_of(base, tuned_policy)
    model = adapters.load_as_sft(foundation, name="sft").eval()
    return model, reward_head.load(rewarded, foundation, model).head, policy.load_tokenizer(base)


def scored(scorer, prompts, replies) -> torch.Tensor:
    model, head, tokenizer = scorer
    with torch.no_grad(), network.adapter(model, "reward"):
        return answers.scores(model, head, completions.answers_of(tokenizer, prompts, replies, model.device))


@pytest.fixture(scope="module")
def scoring(base, tuned_policy, rewarded):
    return scorer(base, tuned_policy, rewarded)


@pytest.fixture(scope="module")
def pairs(data, base) -> list[tuple[list[int], list[int]]]:
    """Held-out prompts, each with its chosen answer."""
    rows, tokenizer = read_jsonl(data.parent / "data/preference/test.jsonl"), policy.load_tokenizer(base)
    encoded = [tokens.alone(tokenizer, tokens.answers(tokenizer, row)) for row in rows]
    return [(pair["prompt_ids"], pair["chosen_ids"]) for pair in encoded]


def test_it_learns(rewarded):
    metrics = read_json(rewarded.parent / "metrics.json")
    losses = [point["loss"] for point in metrics["history"] if "loss" in point]
    assert losses[-1] < losses[0] < 1.0
    found = metrics["pairs"]["all"]
    assert set(metrics["pairs"]) == {"all", "correct", "correct/fact", "correct/order", "manner"}
    p, n = found["accuracy"], found["n"]
    assert found["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)), abs=1e-9)


def test_a_reward_model_of_other_weights_scores_nothing(rewarded, tuned_policy):
    with pytest.raises(UserError, match=r"this reward model was trained on other weights than .*sft/manifest.json"):
        reward_head.load(rewarded, adapters.Foundation(tuned_policy, None, None))


def test_the_classifier_and_ppo_score_alike(base, rewarded, tuned_policy, scoring, pairs):
    """Loaded as PEFT's documentation says, on the quantised base, right-padded; and as PPO has it, left-padded."""
    import peft

    found = adapters.foundation_of(base, tuned_policy)
    classifier = policy.load_verified(found.weights, found.quantization, head=True)
    classifier = peft.PeftModel.from_pretrained(classifier, rewarded.parent / "model")
    tokenizer = scoring[2]
    classifier.config.pad_token_id = tokenizer.pad_token_id
    one = reward_head.classify(classifier, tokenizer, [prompt + reply for prompt, reply in pairs])
    other = scored(scoring, *zip(*pairs, strict=True))
    assert torch.tensor(one) == pytest.approx(other, abs=1e-4)
    assert torch.tensor(one).std() > 1e-2, "control: scores that are all alike agree for nothing"


def test_a_tokenizer_that_pads_with_its_end_of_turn(base, rewarded, tuned_policy, scoring, pairs):
    """The head is read at the end of turn all the same; control: with the padding it came with, it is not."""
    import copy

    import peft

    found = adapters.foundation_of(base, tuned_policy)
    classifier = policy.load_verified(found.weights, found.quantization, head=True)
    classifier = peft.PeftModel.from_pretrained(classifier, rewarded.parent / "model")
    tokenizer = copy.deepcopy(scoring[2])
    tokenizer.pad_token = tokenizer.eos_token
    rows, known = [prompt + reply for prompt, reply in pairs], scored(scoring, *zip(*pairs, strict=True))
    apart = reward_head.pad_apart_from_end(tokenizer)
    classifier.config.pad_token_id = apart.pad_token_id
    assert torch.tensor(reward_head.classify(classifier, apart, rows)) == pytest.approx(known, abs=1e-4)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    assert (torch.tensor(reward_head.classify(classifier, tokenizer, rows)) - known).abs().max() > 1e-2


def test_padding_and_what_follows_the_end_of_turn_change_no_score(scoring, pairs):
    tokenizer = scoring[2]
    prompts, replies = zip(*pairs[:4], strict=True)
    alone = torch.cat([scored(scoring, [p], [r]) for p, r in zip(prompts, replies, strict=True)])
    assert scored(scoring, prompts, replies) == pytest.approx(alone, abs=1e-5)
    chatter = tokenizer(" now go away!", add_special_tokens=False).input_ids
    assert scored(scoring, prompts, [reply + chatter for reply in replies]) == pytest.approx(alone, abs=1e-5)
    changed = [reply[:-1] + chatter + reply[-1:] for reply in replies]
    assert (scored(scoring, prompts, changed) - alone).abs().max() > 1e-3, "control: before the end of turn it counts"


def test_it_begins_as_the_sft_policy(base, tuned_policy):
    """A wider adapter on more layers is the same function at first; control: an untouched one is not."""
    found = adapters.foundation_of(base, tuned_policy)
    ids = torch.arange(20, 60).unsqueeze(0)
    with torch.no_grad():
        known = adapters.load_as_sft(found).eval()(ids).logits
        wide = adapters.load_as_sft(found, reward(rank=24, alpha=7.0, target_modules="all-linear")).eval()(ids).logits
        bare = policy.load_verified(found.weights, found.quantization).eval()(ids).logits
    assert (known - wide).abs().max() < 1e-4
    assert (known - bare).abs().max() > 1e-2


def test_an_adapter_with_no_room_for_the_old_one_is_refused(base, tuned_policy):
    found = adapters.foundation_of(base, tuned_policy)
    with pytest.raises(UserError, match=r"rank 8 is under that of the SFT policy's adapter \(16\)"):
        adapters.lora_config(reward(rank=8), found)
    with pytest.raises(UserError, match="target_modules lacks"):
        adapters.lora_config(reward(target_modules=["q_proj"]), found)


def test_virtual_tokens_cannot_be_aligned(data, base):
    prompt = make("sft", sft(method="prompt"), Path("results/virtual/sft/manifest.json"), data=data, base=base)
    with pytest.raises(UserError, match="prompt tuning cannot be aligned"):
        adapters.foundation_of(base, prompt)


def test_calibration():
    """Margins whose confidences are right have no error; the same pairs twice as sure have one."""
    sure = math.log(0.8 / 0.2)
    honest = stage.calibration([sure] * 8 + [-sure] * 2)
    assert honest["ece"] == pytest.approx(0, abs=1e-9) and honest["n"] == 10
    assert stage.calibration([2 * sure] * 8 + [-2 * sure] * 2)["ece"] == pytest.approx(16 / 17 - 0.8, abs=1e-9)


def test_controls_turn_the_labels():
    rows = [{"chosen_ids": [n], "rejected_ids": [-n], "kind": "x"} for n in range(1, 200)]
    assert preferences.relabelled(rows, "chosen", 0) == rows
    assert all(
        row["chosen_ids"] == [-n] and row["kind"] == "x"
        for n, row in enumerate(preferences.relabelled(rows, "swapped", 0), 1)
    )
    shuffled = sum(row["chosen_ids"][0] < 0 for row in preferences.relabelled(rows, "shuffled", 0))
    assert 70 < shuffled < 130


def test_swapped_labels_learn_the_opposite(data, base, tuned_policy, rewarded):
    output = Path("results/swapped/reward/manifest.json")
    made = make("reward", reward(steps=40, labels="swapped"), output, data=data, base=base, sft=tuned_policy)
    metrics = [read_json(manifest.parent / "metrics.json")["pairs"]["all"]["margin"] for manifest in (rewarded, made)]
    assert metrics[0] > 0 > metrics[1]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_micro_batch_changes_no_gradient(data, base, tuned_policy, micro):
    inputs = {"data": data, "base": base, "sft": tuned_policy}
    whole, split = (first_gradient("reward", reward(micro_batch_size=size), **inputs) for size in (8, micro))
    assert (whole - split).abs().max() <= 1e-5 * max(1.0, whole.abs().max().item())
    other = first_gradient("reward", reward(batch_size=4), **inputs)
    assert (whole - other).abs().max() > 1e-4, "control: another batch"


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_resumes_to_the_same_bytes(data, base, tuned_policy, step, monkeypatch):
    """NF4, dropout on, accumulation, evaluation."""
    section = reward(dropout=0.1, micro_batch_size=4, eval_steps=2)
    inputs = {"data": data, "base": base, "sft": tuned_policy}
    whole = make("reward", section, Path("results/whole/reward/manifest.json"), **inputs)
    output = Path(f"results/killed-{step}/reward/manifest.json")
    patch = killed_at(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make("reward", section, output, **inputs)
    patch.undo()
    make("reward", section, output, **inputs)
    assert read_json(output)["files"] == read_json(whole)["files"]


def test_after_full_fine_tuning_that_model_is_quantised_once(data, base, home):
    full = make("sft", sft(method="full"), Path("results/full-sft/sft/manifest.json"), data=data, base=base)
    found = adapters.foundation_of(full, full)
    assert found == (full, quantization.settings("float32"), None)
    output = Path("results/full-sft/reward/manifest.json")
    make("reward", reward(target_modules=None), output, data=data, base=full, sft=full)
    assert read_json(output.parent / "model/policy.json")["quantization"] == quantization.settings("float32")


def test_a_run_killed_after_its_last_step_is_not_trained_on(data, base, tuned_policy, monkeypatch):
    """transformers takes one more step from a checkpoint of the last one; at a constant rate that is another model."""
    inputs, section = dict(data=data, base=base, sft=tuned_policy), reward(schedule="constant", checkpoint_steps=3)
    whole = make("reward", section, Path("results/unkilled-last/reward/manifest.json"), **inputs)

    def killed(*_):
        raise KeyboardInterrupt

    output = Path("results/killed-last/reward/manifest.json")
    with monkeypatch.context() as patch:
        patch.setattr("posttrain.stages.reward.held_out", killed)
        with pytest.raises(KeyboardInterrupt):
            make("reward", section, output, **inputs)
    assert list(output.parent.glob("checkpoints/*/*/trainer_state.json")), "control: there is one to continue from"
    make("reward", section, output, **inputs)
    assert output.read_text() == whole.read_text()


def ranked_lists(folder, base) -> Path:
    """A prepared file of prompts with two to four ranked answers each."""
    lines = [
        {"prompt": [{"role": "user", "content": f"name thing {n}"}], "scores": [4, 3, 2, 1][: 2 + n % 3],
         "completions": [[{"role": "assistant", "content": f"{word} {n}"}] for word in "abcd"[: 2 + n % 3]]}
        for n in range(24)
    ]  # fmt: skip
    (folder / "ranked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source, tokenizer = Source(path=str(folder / "ranked.jsonl")), Tokenizer(path=str(base.parent / "model"))
    section = Prepare(preference=[source], tokenizer=tokenizer, max_tokens=128)
    return make("prepare", section, folder / "ranked/prepare/manifest.json")


def test_all_pairs_of_a_ranked_list_are_one_element_of_a_batch(tmp_path, base, tuned_policy, capsys):
    """A micro-batch of 2 prompts trains as the whole batch of 8 does, though they have different numbers of pairs."""
    data, curves = ranked_lists(tmp_path, base), []
    for micro in (8, 2):
        section = reward(steps=4, micro_batch_size=micro, centering=0.01)
        made = make("reward", section, tmp_path / f"ranked/reward-{micro}/manifest.json", data=data, base=base,
                    sft=tuned_policy)  # fmt: skip
        curves.append(read_json(made.parent / "metrics.json")["history"])
    keys = ("loss", "accuracy", "margin")
    first, second = ([[point[key] for key in keys] for point in curve if "loss" in point] for curve in curves)
    assert len(first) == 2
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert first[-1][0] < first[0][0]
    four = [{"answers": [[1], [2], [3], [4]]}, {"answers": [[1], [2]]}]
    assert [rankings.fitting(reward(micro_batch_size=micro), four).micro_batch_size for micro in (None, 4, 1)] == [
        4,
        2,
        1,
    ]
    assert "batches are of 22 prompts" in capsys.readouterr().err


def test_the_loss_of_ranked_lists_is_that_of_the_paper():
    """-1 / C(K, 2) sum log sigmoid(r_w - r_l), a mean over prompts; control: a mean over pairs is another number."""
    rewards = {(1, 2): 0.5, (3,): -0.3, (4, 5): 0.1, (6,): 1.0, (7,): 0.2}
    pairs = [{"source": "a", "chosen_ids": list(w), "rejected_ids": list(other)}
             for w, other in itertools.combinations([(1, 2), (4, 5), (3,)], 2)]  # fmt: skip
    pairs += [{"source": "b", "chosen_ids": [6], "rejected_ids": [7]}]
    lists = rankings.elements(pairs)
    assert [len(element["answers"]) for element in lists] == [3, 2], "each answer is computed once"
    batch = rankings.Collator(0)(lists)
    assert batch["attention_mask"].sum(dim=1).tolist() == [2, 2, 1, 1, 1]

    def model(input_ids, attention_mask, use_cache):
        rows = [tuple(row[: int(mask.sum())].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True)]
        return SimpleNamespace(logits=torch.tensor([[rewards[row]] for row in rows]))

    def by_hand(pair):
        better, worse = (rewards[tuple(pair[side])] for side in ("chosen_ids", "rejected_ids"))
        return -math.log(stage.sigmoid(better - worse - pair.get("margin", 0))) + 0.01 * (better + worse) ** 2

    trainer = SimpleNamespace(args=SimpleNamespace(center_rewards_coefficient=0.01), figures={True: []},
                              model=SimpleNamespace(training=True),
                              accelerator=SimpleNamespace(reduce=lambda tensor, how: tensor))  # fmt: skip
    loss = float(rankings.RankingTrainer.compute_loss(trainer, model, batch))
    of_pairs = list(map(by_hand, pairs))
    assert loss == pytest.approx((sum(of_pairs[:3]) / 3 + of_pairs[3]) / 2, rel=1e-6)
    assert loss != pytest.approx(sum(of_pairs) / 4, rel=1e-3)
    for pair, margin in zip(pairs, (0.5, 1.0, 0.25, 2.0), strict=True):
        pair["margin"] = margin
    wider = float(rankings.RankingTrainer.compute_loss(trainer, model, rankings.Collator(0)(rankings.elements(pairs))))
    of_pairs = list(map(by_hand, pairs))
    assert wider == pytest.approx((sum(of_pairs[:3]) / 3 + of_pairs[3]) / 2, rel=1e-6) and wider > loss
    assert trainer.figures[True][0][0] == 1.0


def test_a_margin_is_subtracted_as_in_the_paper(tmp_path, data, base, tuned_policy):
    """-log sigmoid(r_w - r_l - m) of a pair (arXiv 2307.09288, eq. 2); the held-out loss is without m. Pairs without
    ratings are refused."""
    pair = [
        {"prompt": f"is {n} a number ?", "chosen": " yes", "rejected": f" no {n}", "margin": 1.5} for n in range(30)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair))
    source, tokenizer = Source(path=str(tmp_path / "pairs.jsonl")), Tokenizer(path=str(base.parent / "model"))
    section = Prepare(preference=[source], tokenizer=tokenizer, max_tokens=128)
    rated = make("prepare", section, tmp_path / "rated/prepare/manifest.json")
    section = reward(margin=2.0, steps=1, batch_size=1, log_steps=1, eval_steps=1, centering=0.0)
    read = {"base": base, "sft": tuned_policy}
    made = make("reward", section, tmp_path / "rated/reward/manifest.json", data=rated, **read)
    point = read_json(made.parent / "metrics.json")["history"][0]
    losses = [-math.log(stage.sigmoid(point["margin"] - margin)) for margin in (3.0, 0.0)]
    assert point["loss"] == pytest.approx(losses[0], rel=1e-4) and abs(losses[0] - losses[1]) > 1, "control"
    assert point["eval_loss"] < 1
    with pytest.raises(UserError, match=r"reward.margin: \d+ of \d+ training pairs have no ratings, the first at"):
        make("reward", section, tmp_path / "bare/reward/manifest.json", data=data, **read)


def calibrated(base, rewarded, tuned_policy, folder: Path, mean: float) -> Path:
    """A copy of a reward model with this mean taken from its scores."""
    shutil.copytree(rewarded.parent, folder / "reward")
    reward_head.write_mean(folder / "reward/model", mean)
    return folder / "reward/manifest.json"


def test_demonstrations_have_a_mean_reward_of_0(tmp_path, cache, base, data, tuned_policy):
    """One number is taken from every score, after a training that is the same as without."""
    inputs = {"data": data, "base": base, "sft": tuned_policy}
    plain = make("reward", reward(steps=2), tmp_path / "plain/manifest.json", **inputs)
    shifted = make("reward", reward(steps=2, normalize="demonstrations"), tmp_path / "shifted/manifest.json", **inputs)
    weights = [(manifest.parent / "model/adapter_model.safetensors").read_bytes() for manifest in (plain, shifted)]
    assert weights[0] == weights[1]
    found = read_json(shifted.parent / "metrics.json")
    tokenizer = policy.load_tokenizer(base)
    texts = stage.demonstrations(tokenizer, data)
    assert found["demonstrations"]["n"] == len(texts)
    assert found["pairs"] == read_json(plain.parent / "metrics.json")["pairs"], "differences of scores stay"
    texts = texts[:: max(1, len(texts) // 300)]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in texts), "the score is that of the end of turn"
    scorers = [scorer(base, tuned_policy, manifest) for manifest in (plain, shifted)]
    before, after = (scored(one, [ids[:-1] for ids in texts], [ids[-1:] for ids in texts]) for one in scorers)
    mean = policy.read_contract(shifted)["mean_reward"]
    assert torch.allclose(before - after, torch.full_like(before, mean), atol=1e-5)
    error = float(before.std()) / math.sqrt(len(texts))
    assert abs(float(after.mean())) <= 4 * error + 1e-5, "of every so many of the rows"
    assert abs(mean) > 1e-6 and "mean_reward" not in policy.read_contract(plain), "control"


def test_a_value_function_that_starts_as_the_reward_model_has_its_shift(tmp_path, base, rewarded, tuned_policy):
    foundation = adapters.foundation_of(base, tuned_policy)
    for manifest, bias in ((rewarded, 0.0), (calibrated(base, rewarded, tuned_policy, tmp_path, 0.75), -0.75)):
        models = networks.load_models(ppo(value_from="reward"), foundation, manifest)
        assert models.value_head.bias.item() == bias


def test_a_mean_over_demonstrations_needs_them(tmp_path, base):
    with pytest.raises(UserError, match=r"reward\.normalize: .* has no training rows of sft"):
        stage.demonstrations(policy.load_tokenizer(base), tmp_path / "manifest.json")
