"""Proximal policy optimisation of a language model against a reward: answer, score, update.

python -m posttrain ppo --config results/NAME/ppo/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reward results/NAME/reward/manifest.json --output results/NAME/ppo/manifest.json

One set of frozen weights is in memory, in NF4 where the SFT policy's are. Policy, value function, reward model and the
reference (the SFT policy) are adapters on it; with `method: full` each is a whole model. There is no dropout. The
mathematics is in `maths/ppo.py`. Several processes (torchrun) share the answers and make the same update as one.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from posttrain.config.sections import Ppo
from posttrain.maths import likelihood
from posttrain.maths import ppo as maths
from posttrain.models import adapters, completions
from posttrain.rl import answers, loop, scorers
from posttrain.rl.loop import Experience, Method
from posttrain.rl.networks import Models, load_models
from posttrain.rl.prompts import demonstrations, training_prompts
from posttrain.rl.scorers import Scorer
from posttrain.training import parallel


def ppo(
    section: Ppo, data: Path, base: Path, sft: Path, work: Path, checkpoints: Path, reward: Path | None = None
) -> dict:
    """Write `work/model`, an adapter or (method `full`) a whole model, and `work/snapshots`, and return the metrics.
    reward: its manifest."""
    foundation = adapters.foundation_of(base, sft, section.method)
    models = load_models(section, foundation, reward)
    scorer = scorers.of(section, models, foundation, reward)
    rows = training_prompts(section, data, models.tokenizer, models.policy.model)
    taught = demonstrations(data, models.tokenizer) if section.sft_coefficient else []
    return loop.train(METHOD, section, models, foundation, scorer, rows, work, checkpoints, taught)


def gather(
    section: Ppo,
    models: Models,
    scorer: Scorer,
    rows: list[dict],
    iteration: int,
    coefficient: float,
    spare: Callable | None = None,
) -> Experience:
    """Answers to the prompts, with their rewards and values before the update; the same in every process.

    Policy log-probabilities are computed in the batches of the first epoch, so that its first ratio is exactly 1.
    """
    seeds = [answers.stream("answer", section.seed, iteration, n) for n in range(len(rows))]
    batch, learner = loop.draw(section, models, rows, seeds), models.policy.model
    logp, reference, values = (torch.zeros_like(batch.mask, dtype=torch.float32) for _ in range(3))
    scores = torch.zeros(len(rows), device=batch.mask.device)
    for part in loop.parts_of(section, len(rows)):
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
    figures = {"explained_variance": maths.explained_variance(values, returns, batch.mask).item()}
    return Experience(
        iteration, rows, batch, logp, reference, scores, advantages, coefficient, values, returns, figures
    )


def add_gradients(
    section: Ppo, models: Models, experience: Experience, part: list[int], which: list[int], warming: bool
) -> tuple[dict[str, float], float]:
    """Add the gradients of a micro-batch of the minibatch `which`; returns its share of the minibatch's
    losses and health, and its largest ratio error."""
    total = experience.answers.mask[which].sum()
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


def adapt(section: Ppo, coefficient: float, health: dict) -> float:
    """The coefficient of KL of the next iteration, which moves KL towards `kl_target`."""
    if section.kl_target is None:
        return coefficient
    return maths.adapted_kl(coefficient, health["kl"], section.kl_target, section.batch_size, section.kl_horizon)


FIGURES = ("policy_loss", "value_loss", "clip_fraction", "entropy", "approx_kl")
METHOD = Method(gather, add_gradients, FIGURES, adapt)
