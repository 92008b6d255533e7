"""Proximal policy optimisation of a language model against a reward: answer, score, update.

python -m posttrain ppo --config results/NAME/ppo/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reward results/NAME/reward/manifest.json --output results/NAME/ppo/manifest.json

One set of frozen weights is in memory, NF4 where the SFT policy's are; policy, value function and reward model are
adapters on it, and so is the reference, the SFT policy itself. Nothing has dropout. The mathematics is in
`maths/ppo.py`. Several processes (torchrun) share the answers and make the same update as one.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.config.sections import Ppo
from posttrain.data import texts
from posttrain.ground.errors import Diverged, UserError
from posttrain.ground.files import read_json, read_jsonl, write_json
from posttrain.maths import likelihood
from posttrain.maths import ppo as maths
from posttrain.models import adapters, completions, policy, tokens
from posttrain.models.completions import Answers
from posttrain.rl import answers, handwritten, ppo_health, ppo_state
from posttrain.rl.answers import adapter
from posttrain.training import interruption, parallel, tracking, trainers


class Models(NamedTuple):
    """One PEFT model with the adapters `policy`, `value` and, where they are, `reference` and `reward`."""

    peft: object
    tokenizer: object
    value_head: torch.nn.Module
    reference: str | None  # None: the frozen weights with every adapter off


class Experience(NamedTuple):
    """What one iteration learned by answering: B answers of at most T tokens, and numbers for each token, B x T."""

    answers: Answers
    logp: Tensor
    reference: Tensor
    values: Tensor
    scores: Tensor  # B
    advantages: Tensor
    returns: Tensor


def ppo(
    section: Ppo, data: Path, base: Path, sft: Path, work: Path, checkpoints: Path, reward: Path | None = None
) -> dict:
    """Write `work/model`, the policy's adapter, and `work/snapshots`, and return the metrics. reward: its manifest."""
    found = adapters.foundation_of(base, sft)
    models = load(section, found)
    scorer = model_scorer(models, reward) if reward else function_scorer(section, models)
    gold = handwritten.load_judge(section, "gold")
    rows = prompts(section, data, models)
    taught = demonstrations(data, models) if section.sft_coefficient else []
    optimizer, schedule = ppo_state.optimizers(section, models)
    state = ppo_state.resume(checkpoints, models, optimizer, schedule) or {
        "iteration": 0, "kl_coefficient": section.kl_coefficient, "history": []
    }  # fmt: skip
    parallel.barrier()  # the first process may publish, and remove the checkpoints, before another has read them
    progress = trainers.Heartbeat(checkpoints, section.steps, state["iteration"])
    watch = interruption.Watch(section)
    for iteration in range(state["iteration"], section.steps):
        warming = iteration < section.value_warmup
        made, health = answered(section, models, scorer, gold, rows, state, checkpoints)
        health |= update(section, models, optimizer, made, warming, taught)
        ppo_health.check_ratio(section, health)
        schedule.step()
        if section.kl_target and not warming:
            state["kl_coefficient"] = maths.adapted_kl(
                state["kl_coefficient"], health["kl"], section.kl_target, section.batch_size, section.kl_horizon
            )
        state["iteration"] = iteration + 1
        state["history"].append(health)
        if parallel.main():
            tracking.log(health, iteration + 1)
            progress.beat(iteration + 1, f"reward {health['reward']:.3f}, KL {health['kl']:.2f}")
        ppo_state.keep(section, models, found, state, optimizer, schedule, watch, checkpoints)
    # The policy of the last update is watched too.
    _, health = answered(section, models, scorer, gold, rows, state, checkpoints)
    publish(section, models, found, work, checkpoints)
    return {"summary": {key: value for key, value in health.items() if key != "step"}, "history": state["history"]}


def answered(
    section: Ppo, models: Models, scorer, gold, rows: list[dict], state: dict, checkpoints: Path
) -> tuple[Experience, dict]:
    """The next iteration's experience and its health. Raises UserError when the policy has left the rails."""
    iteration = state["iteration"]
    asked = [rows[n] for n in drawn(len(rows), section.batch_size, section.seed, iteration)]
    made = experience(section, models, scorer, asked, iteration, state["kl_coefficient"])
    health = ppo_health.summary(made, asked, models.tokenizer, gold) | {
        "kl_coefficient": state["kl_coefficient"],
        "step": iteration + 1,
    }
    ppo_health.check_rails(section, health, state["history"], checkpoints)
    return made, health


def load(section: Ppo, found: adapters.Foundation) -> Models:
    """The frozen weights with a policy and a value function that both begin as the SFT policy; the value head is 0."""
    import peft
    from transformers import set_seed

    set_seed(section.seed)
    tokenizer = policy.load_tokenizer(found.weights)
    model = adapters.load_as_sft(found, section, name="policy")
    model.add_adapter("value", adapters.lora_config(section, found, task_type="CAUSAL_LM"))
    adapters.start_as_sft(model, found, "value")
    if found.adapter:
        config = peft.PeftConfig.from_pretrained(found.adapter.parent / "model")
        model.add_adapter("reference", config)
        adapters.start_as_sft(model, found, "reference")
    head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return Models(model.eval(), tokenizer, head.to(model.device), "reference" if found.adapter else None)


def model_scorer(models: Models, reward: Path) -> Callable[[Answers, list[dict]], Tensor]:
    """Scores answers with the reward model, as one more adapter."""
    from posttrain.models import reward_head

    head = reward_head.add_to(models.peft, reward)

    def score(given: Answers, rows: list[dict]) -> Tensor:
        with torch.no_grad(), adapter(models.peft, "reward"):
            return answers.scores(models.peft, head, given)

    return score


def function_scorer(section: Ppo, models: Models) -> Callable[[Answers, list[dict]], Tensor]:
    """Scores answers with the hand-written reward."""
    function = handwritten.load_judge(section, "reward")

    def score(given: Answers, rows: list[dict]) -> Tensor:
        said = answers.texts(models.tokenizer, given)
        return torch.tensor(function.scores(rows, said), device=given.replies.device)

    return score


def prompts(section: Ppo, data: Path, models: Models) -> list[dict]:
    """Training prompts, each once: its tokens (`ids`), its text and, where the row has one, its answer.

    Raises UserError when there are fewer than an iteration answers.
    """
    file = data.parent / "data" / section.prompts / "train.jsonl"
    rows = {}
    for row in read_jsonl(file) if file.is_file() else []:
        ids = tokens.encode_prompt(models.tokenizer, row)
        known = {"ids": ids, "prompt": texts.prompt_text(row), "answer": row.get("answer")}
        rows.setdefault(tuple(ids), known)
    answers.refuse_long(models.peft, list(rows.values()), section.max_new_tokens)
    if len(rows) < section.batch_size:
        raise UserError(f"ppo: {file} has {len(rows)} different prompts, fewer than batch_size ({section.batch_size})")
    return list(rows.values())


def demonstrations(data: Path, models: Models) -> list[tuple[list[int], list[int]]]:
    """The rows of supervised fine-tuning as tokens: what is asked, and the assistant's last turn.

    Raises UserError where there is none.
    """
    file, found = data.parent / "data" / "sft" / "train.jsonl", []
    for row in read_jsonl(file) if file.is_file() else []:
        encoded = tokens.encode(models.tokenizer, row)
        ids, labels = encoded["input_ids"], encoded["labels"]
        stop = max(n for n, label in enumerate(labels) if label != tokens.MASKED) + 1
        start = max((n for n in range(stop) if labels[n] == tokens.MASKED), default=-1) + 1
        found.append((ids[:start], ids[start:stop]))
    if not found:
        raise UserError(f"ppo.sft_coefficient: there are no rows of supervised fine-tuning in {file}")
    return found


def drawn(rows: int, count: int, seed: int, iteration: int, name: str = "prompts") -> list[int]:
    """The rows of an iteration: passes through all of them in a fresh order each, by seed and iteration alone."""
    chosen = []
    for place in range(iteration * count, (iteration + 1) * count):
        if not chosen or place % rows == 0:
            order = torch.Generator().manual_seed(answers.stream(name, seed, place // rows))
            shuffled = torch.randperm(rows, generator=order).tolist()
        chosen.append(shuffled[place % rows])
    return chosen


def experience(
    section: Ppo, models: Models, scorer, asked: list[dict], iteration: int, coefficient: float
) -> Experience:
    """Answers to the prompts, and all that is known of them before the update. Every process holds all of it.

    Policy log-probabilities are taken in the batches of the first epoch, so that its first ratio is exactly 1.
    """
    seeds = [answers.stream("answer", section.seed, iteration, n) for n in range(len(asked))]
    with torch.no_grad(), completions.autocast(models.peft, section.precision), adapter(models.peft, "policy"):
        made = answers.draw(
            models.peft,
            models.tokenizer,
            [row["ids"] for row in asked],
            seeds,
            section.max_new_tokens,
            section.temperature,
            only=parallel.share(len(asked)),
        )
    found = {name: torch.zeros_like(made.mask, dtype=torch.float32) for name in ("logp", "reference", "values")}
    scores = torch.zeros(len(asked), device=made.mask.device)
    for part in [part for some in minibatches(section, range(len(asked))) for part in micro_batches(section, some)]:
        some = made.rows(part)
        with torch.no_grad(), completions.autocast(models.peft, section.precision):
            with adapter(models.peft, "policy"):
                found["logp"][part] = completions.log_probs(models.peft, some, section.temperature)
            with adapter(models.peft, models.reference):
                found["reference"][part] = completions.log_probs(models.peft, some, section.temperature)
            with adapter(models.peft, "value"):
                found["values"][part] = answers.values(models.peft, models.value_head, some)
        scores[part] = scorer(some, [asked[n] for n in part])
    found, scores = {name: parallel.summed(value) for name, value in found.items()}, parallel.summed(scores)
    paid = scores - section.missing_eos_penalty * ~made.ended
    kl = likelihood.kl_k1(found["logp"], found["reference"])
    rewards = maths.token_rewards(paid, kl, made.mask, coefficient)
    if section.whiten_rewards:
        rewards = maths.whiten(rewards, made.mask, shift=False)
    advantage, returns = maths.advantages(rewards, found["values"], made.mask, section.gamma, section.gae_lambda)
    return Experience(made, **found, scores=scores, advantages=maths.whiten(advantage, made.mask), returns=returns)


def minibatches(section: Ppo, order) -> list[list[int]]:
    """Answers in the given order, one list for each optimiser step."""
    size = math.ceil(len(order) / section.minibatches)
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def micro_batches(section: Ppo, which) -> list[list[int]]:
    """This process's part of some answers, in pieces of at most `micro_batch_size`."""
    mine = [which[n] for n in parallel.share(len(which))]
    size = parallel.at_once(section, len(mine))
    return [mine[start : start + size] for start in range(0, len(mine), size)]


def update(section: Ppo, models: Models, optimizer, made: Experience, warming: bool, taught: list = ()) -> dict:
    """Some epochs of clipped updates of policy and value function (in warm-up of the value function alone).

    Each minibatch's loss is a sum over its tokens divided by their number, whatever it is split into: micro-batches
    and processes change nothing but rounding. Returns the health of the update. Raises UserError for a loss that is
    no number, before it reaches the weights.
    """
    count, health = len(made.answers), []
    for epoch in range(section.epochs):
        order = list(range(count))
        if epoch:  # the first epoch goes in order, as the old log-probabilities were taken
            name = answers.stream("shuffle", section.seed, optimizer.step_count)
            shuffle = torch.Generator().manual_seed(name)
            order = torch.randperm(count, generator=shuffle).tolist()
        for which in minibatches(section, order):
            health.append(minibatch(section, models, optimizer, made, which, warming, taught))
    means = {key: sum(part[key] for part in health) / len(health) for key in health[0]}
    return means | {"first_ratio_error": health[0]["ratio_error"]}


def minibatch(
    section: Ppo, models: Models, optimizer, made: Experience, which: list[int], warming: bool, taught: list = ()
) -> dict:
    """One optimiser step on some answers, and on as many rows of supervised fine-tuning where those are `taught`."""
    total = made.answers.mask[which].sum()
    sums = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "entropy", "approx_kl"), 0.0)
    ratio_error = 0.0
    optimizer.zero_grad()
    for part in micro_batches(section, which):
        some, mask = made.answers.rows(part), made.answers.mask[part]
        with completions.autocast(models.peft, section.precision):
            with adapter(models.peft, "policy"), torch.set_grad_enabled(not warming):
                logits = completions.reply_logits(models.peft, some, section.temperature)
                logp = likelihood.log_probs(logits, some.replies) * mask
                losses = maths.policy_loss(logp, made.logp[part], made.advantages[part], section.clip)
                loss = (losses * mask).sum() / total
                if not warming:
                    loss.backward()
            with adapter(models.peft, "value"):
                values = answers.values(models.peft, models.value_head, some)
                errors = maths.value_loss(values, made.values[part], made.returns[part], section.value_clip)
                value_loss = (errors * mask).sum() / total
                value_loss.backward()
        with torch.no_grad():
            old, weight = made.logp[part], mask / total
            ratio_error = max(ratio_error, (((logp - old).exp() - 1).abs() * mask).max().item())
            sums["policy_loss"] += loss.item()
            sums["value_loss"] += value_loss.item()
            sums["clip_fraction"] += (maths.clipped(logp, old, section.clip) * weight).sum().item()
            sums["entropy"] += (likelihood.entropy(logits) * weight).sum().item()
            sums["approx_kl"] += (likelihood.kl_k3(old, logp) * weight).sum().item()  # the answers are the old policy's
    if taught and not warming:
        sums["sft_loss"] = rehearse(
            section,
            models,
            [taught[n] for n in drawn(len(taught), len(which), section.seed, optimizer.step_count, "taught")],
        )
    sums = parallel.summed_numbers(sums, models.peft.device)
    ratio_error = parallel.largest(ratio_error, models.peft.device)
    if not all(map(math.isfinite, sums.values())):
        raise Diverged(f"ppo: a loss is no number ({sums}): lower learning_rate")
    norms = optimizer.step(section.max_grad_norm, policy=not warming)
    return sums | norms | {"ratio_error": ratio_error}


def rehearse(section: Ppo, models: Models, rows: list[tuple[list[int], list[int]]]) -> float:
    """Gradients of the SFT loss, per token, times its weight: PPO-ptx (2203.02155, eq. 2). Returns this process's part
    of the loss."""
    total, loss = sum(len(reply) for _, reply in rows), 0.0
    for part in micro_batches(section, range(len(rows))):
        some = completions.given(models.tokenizer, *zip(*[rows[n] for n in part], strict=True), models.peft.device)
        with completions.autocast(models.peft, section.precision), adapter(models.peft, "policy"):
            nll = -completions.log_probs(models.peft, some).sum() / total
            (section.sft_coefficient * nll).backward()
        loss += nll.item()
    return loss


def publish(section: Ppo, models: Models, found: adapters.Foundation, work: Path, checkpoints: Path) -> None:
    """Write the policy and its snapshots."""
    import shutil

    adapters.publish(models.peft, models.tokenizer, found, work / "model", name="policy")
    if not parallel.main():
        return
    (work / "snapshots").mkdir()
    contract = read_json(work / "model" / "policy.json")
    for number in range(section.snapshot_steps, section.steps, section.snapshot_steps):
        folder = work / "snapshots" / f"{number:06d}"
        shutil.copytree(checkpoints / "snapshots" / folder.name, folder)
        write_json(folder / "policy.json", contract)
