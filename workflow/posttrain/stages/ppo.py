"""Proximal policy optimisation of a language model against a reward: answer, score, update.

python -m posttrain ppo --config results/NAME/ppo/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reward results/NAME/reward/manifest.json --output results/NAME/ppo/manifest.json

One set of frozen weights is in memory, in NF4 where the SFT policy's are. Policy, value function, reward model and the
reference (the SFT policy) are adapters on it; with `method: full` each is a whole model. There is no dropout. The
mathematics is in `maths/ppo.py`. Several processes (torchrun) share the answers and make the same update as one.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.config.sections import Ppo
from posttrain.ground.errors import Diverged
from posttrain.ground.files import read_json, write_json
from posttrain.maths import likelihood
from posttrain.maths import ppo as maths
from posttrain.models import adapters, completions, policy, reward_head
from posttrain.models.completions import Answers
from posttrain.rl import answers, handwritten, ppo_health, ppo_state, scorers
from posttrain.rl.batches import micro_batches, minibatches, rows_of_iteration
from posttrain.rl.ppo_models import Models, load_models
from posttrain.rl.prompts import demonstrations, training_prompts
from posttrain.rl.scorers import Scorer
from posttrain.training import interruption, parallel, tracking, trainers

Demonstration = tuple[list[int], list[int]]  # the tokens of a prompt and of the reply to it


class Experience(NamedTuple):
    """One iteration's B answers of at most T tokens, and their numbers, B x T but for the scores."""

    iteration: int  # from 0
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
    """Write `work/model`, an adapter or (method `full`) a whole model, and `work/snapshots`, and return the metrics.
    reward: its manifest."""
    foundation = adapters.foundation_of(base, sft, section.method)
    models = load_models(section, foundation, reward)
    if reward:
        shared = models.policy.model if models.policy.adapter else None
        scorer = scorers.by_model(reward_head.load(reward, foundation, shared))
    else:
        scorer = scorers.by_function(section, models.tokenizer)
    gold = handwritten.load_judge(section, "gold")
    rows = training_prompts(section, data, models.tokenizer, models.policy.model)
    demonstrated = demonstrations(data, models.tokenizer) if section.sft_coefficient else []
    optimizer, schedule = ppo_state.optimizers(section, models)
    state = ppo_state.resume(checkpoints, models, optimizer, schedule) or {
        "iteration": 0, "kl_coefficient": section.kl_coefficient, "history": []
    }  # fmt: skip
    parallel.barrier()  # otherwise the first process could remove the checkpoints before another has read them
    progress = trainers.Heartbeat(checkpoints, section.steps, state["iteration"])
    watch = interruption.Watch(section)
    for iteration in range(state["iteration"], section.steps):
        warming = iteration < section.value_warmup
        experience, health = next_experience(section, models, scorer, gold, rows, state, checkpoints)
        health |= update(section, models, optimizer, experience, warming, demonstrated)
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
        ppo_state.save(section, models, foundation, state, optimizer, schedule, watch, checkpoints)
    if section.method == "full":
        trainers.round_trained(models.policy.model, policy.dtype_of(foundation.weights))  # it is published in this type
    # The policy after the last update is checked too.
    _, health = next_experience(section, models, scorer, gold, rows, state, checkpoints)
    publish(section, models, foundation, work, checkpoints)
    return {"summary": {key: value for key, value in health.items() if key != "step"}, "history": state["history"]}


def next_experience(
    section: Ppo,
    models: Models,
    scorer: Scorer,
    gold: handwritten.Judge | None,
    rows: list[dict],
    state: dict,
    checkpoints: Path,
) -> tuple[Experience, dict]:
    """The next iteration's experience and its health. Raises Diverged where the answers are beyond the limits."""
    iteration, coefficient = state["iteration"], state["kl_coefficient"]
    chosen = [rows[n] for n in rows_of_iteration(len(rows), section.batch_size, section.seed, iteration)]
    experience = gather(section, models, scorer, chosen, iteration, coefficient)
    health = ppo_health.summary(experience, chosen, models.tokenizer, gold)
    health |= {"kl_coefficient": coefficient, "step": iteration + 1}
    ppo_health.check_rails(section, health, state["history"], checkpoints)
    return experience, health


def gather(
    section: Ppo, models: Models, scorer: Scorer, rows: list[dict], iteration: int, coefficient: float
) -> Experience:
    """Answers to the prompts, with their rewards and values before the update; the same in every process.

    Policy log-probabilities are computed in the batches of the first epoch, so that its first ratio is exactly 1.
    """
    seeds = [answers.stream("answer", section.seed, iteration, n) for n in range(len(rows))]
    ids, mine = [row["ids"] for row in rows], parallel.share(len(rows))
    learner = models.policy.model
    with torch.no_grad(), completions.autocast(learner, section.precision), models.policy.active():
        at_once = parallel.fitting(section.answer_batch_size or len(rows))
        batch = answers.draw(
            learner, models.tokenizer, ids, seeds, section.max_new_tokens, section.temperature, at_once, mine
        )
    logp, reference, values = (torch.zeros_like(batch.mask, dtype=torch.float32) for _ in range(3))
    scores = torch.zeros(len(rows), device=batch.mask.device)
    for part in [part for some in minibatches(section, range(len(rows))) for part in micro_batches(section, some)]:
        some = batch.rows(part)
        with torch.no_grad(), completions.autocast(learner, section.precision):
            with models.policy.active():
                logp[part] = completions.log_probs(learner, some, section.temperature)
            with models.reference.active():
                reference[part] = completions.log_probs(models.reference.model, some, section.temperature)
            with models.value.active():
                values[part] = answers.values(models.value.model, models.value_head, some)
        scores[part] = scorer(some, [rows[n] for n in part])
    logp, reference, values, scores = map(parallel.summed, (logp, reference, values, scores))
    paid = scores - section.missing_eos_penalty * ~batch.ended
    rewards = maths.token_rewards(paid, likelihood.kl_k1(logp, reference), batch.mask, coefficient)
    if section.whiten_rewards:
        rewards = maths.whiten(rewards, batch.mask, shift=False)
    advantages, returns = maths.advantages(rewards, values, batch.mask, section.gamma, section.gae_lambda)
    advantages = maths.whiten(advantages, batch.mask)
    return Experience(iteration, batch, logp, reference, values, scores, advantages, returns)


def update(
    section: Ppo,
    models: Models,
    optimizer: ppo_state.Optimizers,
    experience: Experience,
    warming: bool,
    demonstrated: Sequence[Demonstration] = (),
) -> dict:
    """The epochs of clipped updates of policy and value function; in warm-up, of the value function only.

    Each minibatch's loss is a sum over its tokens divided by their number, so that micro-batches and processes change
    it by rounding only. Returns the health of the update. Raises Diverged, before weights change, for a loss that is
    not finite and for a first ratio that is not 1.
    """
    count = len(experience.answers)
    health: list[dict] = []
    for epoch in range(section.epochs):
        order = list(range(count))
        if epoch:  # the first epoch is in order, as the old log-probabilities were computed
            name = answers.stream("shuffle", section.seed, optimizer.step_count)
            shuffle = torch.Generator().manual_seed(name)
            order = torch.randperm(count, generator=shuffle).tolist()
        for which in minibatches(section, order):
            taught = demonstrated if not warming else ()
            health.append(step(section, models, optimizer, experience, which, warming, taught, first=not health))
    means = {key: sum(part[key] for part in health) / len(health) for key in health[0]}
    return means | {"first_ratio_error": health[0]["ratio_error"]}


def step(
    section: Ppo,
    models: Models,
    optimizer: ppo_state.Optimizers,
    experience: Experience,
    which: list[int],
    warming: bool,
    demonstrated: Sequence[Demonstration] = (),
    first: bool = False,
) -> dict:
    """One optimiser step on a minibatch of answers, and on as many demonstrations where there are any. first: whether
    it is an iteration's first minibatch, whose ratio must be 1."""
    total = experience.answers.mask[which].sum()
    sums = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "entropy", "approx_kl"), 0.0)
    ratio_error = 0.0
    optimizer.zero_grad()
    for part in micro_batches(section, which):
        numbers, error = add_gradients(section, models, experience, part, total, warming)
        sums = {key: sums[key] + numbers[key] for key in sums}
        ratio_error = max(ratio_error, error)
    if demonstrated:
        chosen = rows_of_iteration(len(demonstrated), len(which), section.seed, optimizer.step_count, "taught")
        sums["sft_loss"] = add_sft_gradients(section, models, [demonstrated[n] for n in chosen])
    device = models.policy.model.device
    sums = parallel.summed_numbers(sums, device)
    ratio_error = parallel.largest(ratio_error, device)
    if not all(map(math.isfinite, sums.values())):
        raise Diverged(f"ppo: a loss is no number ({sums}): lower learning_rate")
    if first:
        ppo_health.check_ratio(section, experience.iteration, ratio_error)
    norms = optimizer.step(section.max_grad_norm, policy=not warming)
    return sums | norms | {"ratio_error": ratio_error}


def add_gradients(
    section: Ppo, models: Models, experience: Experience, part: list[int], total: Tensor, warming: bool
) -> tuple[dict[str, float], float]:
    """Add the gradients of a micro-batch, of a minibatch with `total` tokens; returns its share of the minibatch's
    losses and health, and its largest ratio error."""
    batch, mask, old = experience.answers.rows(part), experience.answers.mask[part], experience.logp[part]
    with completions.autocast(models.policy.model, section.precision):
        with models.policy.active(), torch.set_grad_enabled(not warming):
            logits = completions.reply_logits(models.policy.model, batch, section.temperature)
            logp = likelihood.log_probs(logits, batch.replies) * mask
            losses = maths.policy_loss(logp, old, experience.advantages[part], section.clip)
            loss = (losses * mask).sum() / total
            if not warming:
                loss.backward()
        with models.value.active():
            values = answers.values(models.value.model, models.value_head, batch)
            errors = maths.value_loss(values, experience.values[part], experience.returns[part], section.value_clip)
            value_loss = (errors * mask).sum() / total
            value_loss.backward()
    with torch.no_grad():
        weight = mask / total
        numbers = {
            "policy_loss": loss.item(),
            "value_loss": value_loss.item(),
            "clip_fraction": (maths.clipped(logp, old, section.clip) * weight).sum().item(),
            "entropy": (likelihood.entropy(logits) * weight).sum().item(),
            "approx_kl": (likelihood.kl_k3(old, logp) * weight).sum().item(),  # of the old policy, which answered
        }
        return numbers, (((logp - old).exp() - 1).abs() * mask).max().item()


def add_sft_gradients(section: Ppo, models: Models, rows: list[Demonstration]) -> float:
    """Add the gradients of the weighted SFT loss per token: PPO-ptx (2203.02155, eq. 2); returns this process's share
    of the loss."""
    learner = models.policy.model
    total, loss = sum(len(reply) for _, reply in rows), 0.0
    for part in micro_batches(section, range(len(rows))):
        prompts, replies = ([rows[n][side] for n in part] for side in (0, 1))
        batch = completions.answers_of(models.tokenizer, prompts, replies, learner.device)
        with completions.autocast(learner, section.precision), models.policy.active():
            nll = -completions.log_probs(learner, batch).sum() / total
            (section.sft_coefficient * nll).backward()
        loss += nll.item()
    return loss


def publish(section: Ppo, models: Models, foundation: adapters.Foundation, work: Path, checkpoints: Path) -> None:
    """Write the policy and its snapshots."""
    adapters.publish(models.policy.model, models.tokenizer, foundation, work / "model", name="policy")
    if not parallel.main():
        return
    (work / "snapshots").mkdir()
    contract = read_json(work / "model" / "policy.json")
    for number in range(section.snapshot_steps, section.steps, section.snapshot_steps):
        folder = work / "snapshots" / f"{number:06d}"
        shutil.copytree(checkpoints / "snapshots" / folder.name, folder)
        write_json(folder / "policy.json", contract)
