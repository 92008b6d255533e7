"""Group relative policy optimisation: several answers to each prompt, scored and compared with each other.

python -m posttrain grpo --config results/NAME/grpo/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reward results/NAME/reward/manifest.json --output results/NAME/grpo/manifest.json

There is no value function: the baseline of an answer's reward is its group's. The mathematics is in `maths/grpo.py`,
the loop in `rl/loop.py`, which PPO shares.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from posttrain.config.sections import Grpo
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say
from posttrain.maths import grpo as maths
from posttrain.maths import likelihood
from posttrain.models import adapters, completions
from posttrain.models.completions import Answers
from posttrain.rl import answers, loop, scorers, verifiable
from posttrain.rl.loop import Experience, Method
from posttrain.rl.networks import Models, load_models
from posttrain.rl.prompts import demonstrations, training_prompts
from posttrain.rl.scorers import Scorer
from posttrain.training import parallel

FIGURES = ("policy_loss", "kl_loss", "clip_fraction", "entropy", "approx_kl")


def grpo(
    section: Grpo, data: Path, base: Path, sft: Path, work: Path, checkpoints: Path, reward: Path | None = None
) -> dict:
    """Write `work/model`, an adapter or (method `full`) a whole model, and `work/snapshots`, and return the metrics.
    reward: its manifest."""
    foundation = adapters.foundation_of(base, sft, section.method)
    models = load_models(section, foundation)
    rows = training_prompts(section, data, models.tokenizer, models.policy.model)
    refuse_unanswered(section, rows)
    taught = demonstrations(data, models.tokenizer) if section.sft_coefficient else []
    with scorers.of_parts(section, models, foundation, reward) as scorer:
        return loop.train(METHOD, section, models, foundation, scorer, rows, work, checkpoints, taught)


def refuse_unanswered(section: Grpo, rows: list[dict]) -> None:
    """Raise UserError where a term compares with answers and no row has one that it can read; tell if some have none.

    rows: the prompts.
    """
    for number, part in enumerate(section.rewards or ()):
        without = [row["id"] for row in rows if part.kind == "exact" and not verifiable.answerable(part, row["answer"])]
        what = f"grpo.rewards[{number}]: exact compares with a {part.answer} in each row's `answer`"
        if without and len(without) == len(rows):
            raise UserError(f"{what}, and none of {len(rows):,} {section.prompts} prompts has one")
        if without:
            say(f"warning: {what}, and {len(without):,} of {len(rows):,} prompts, first {without[0]}, have none: 0")


def gather(
    section: Grpo,
    models: Models,
    scorer: Scorer,
    rows: list[dict],
    iteration: int,
    coefficient: float,
    spare: Callable | None = None,
) -> Experience:
    """A group of answers to each prompt, with their rewards; the same in every process. spare: further prompts, for
    groups whose rewards are all equal."""
    rows, batch, scores, redrawn = scored(section, models, scorer, rows, iteration, spare)
    logp, reference = (torch.zeros_like(batch.mask, dtype=torch.float32) for _ in range(2))
    learner = models.policy.model
    for part in loop.parts_of(section, len(rows)):
        some = batch.rows(part)
        with torch.no_grad(), completions.autocast(learner, section.precision):
            with models.policy.active():
                logp[part] = completions.log_probs(learner, some, section.temperature)
            with models.reference.active():
                reference[part] = completions.log_probs(models.reference.model, some, section.temperature)
    logp, reference = map(parallel.summed, (logp, reference))
    paid = paid_for(section, scores, batch)
    equal = maths.equal(paid, section.group).float().mean().item()  # before KL, which differs for every answer
    if section.kl == "reward":
        paid = paid - coefficient * (likelihood.kl_k1(logp, reference) * batch.mask).sum(dim=1)
    if section.labels == "shuffled":
        paid = shuffled(paid, section.group, answers.stream("labels", section.seed, iteration))
    advantages = maths.advantages(paid, section.group, section.advantage == "leave_one_out", section.scale)
    figures = {"equal_groups": equal} | ({"redrawn_groups": redrawn} if section.redraws else {})
    return Experience(iteration, rows, batch, logp, reference, scores, advantages, coefficient, figures=figures)


def shuffled(rewards: torch.Tensor, group: int, seed: int) -> torch.Tensor:
    """The rewards of each group in a random order. B."""
    numbers = torch.rand(len(rewards) // group, group, generator=torch.Generator().manual_seed(seed))
    return rewards.view(-1, group).gather(1, numbers.argsort(dim=1).to(rewards.device)).flatten()


def scored(
    section: Grpo, models: Models, scorer: Scorer, prompts: list[dict], iteration: int, spare: Callable | None
) -> tuple[list[dict], Answers, torch.Tensor, int]:
    """(the row of each answer, answers, their scores, number of groups drawn again).

    Groups whose rewards are all equal teach nothing: others take their places, at most `redraws` times (dynamic
    sampling, arXiv 2503.14476, section 3.2).
    """
    rows = [row for row in prompts for _ in range(section.group)]
    batch = loop.draw(section, models, rows, seeds_of(section, iteration, len(rows)))
    scores, redrawn = score(section, scorer, batch, rows), 0
    for attempt in range(section.redraws if spare else 0):
        groups = maths.equal(paid_for(section, scores, batch), section.group).nonzero().flatten().tolist()
        if not groups:
            break
        redrawn += len(groups)
        places = [group * section.group + n for group in groups for n in range(section.group)]
        fresh = [row for row in spare(len(groups), f"redraw {attempt}") for _ in range(section.group)]  # type: ignore
        more = loop.draw(section, models, fresh, seeds_of(section, iteration, len(fresh), attempt + 1))
        batch = answers.replaced(batch, places, more, models.tokenizer.pad_token_id)
        scores[places] = score(section, scorer, more, fresh)
        for place, row in zip(places, fresh, strict=True):
            rows[place] = row
    return rows, batch, scores, redrawn


def seeds_of(section: Grpo, iteration: int, count: int, attempt: int = 0) -> list[int]:
    """The random streams of an iteration's answers. attempt: 0 for the first drawing."""
    return [answers.stream("answer", section.seed, iteration, n, *[attempt] * bool(attempt)) for n in range(count)]


def score(section: Grpo, scorer: Scorer, batch: Answers, rows: list[dict]) -> torch.Tensor:
    """The score of each answer, B, in every process."""
    scores = torch.zeros(len(rows), device=batch.mask.device)
    for part in loop.parts_of(section, len(rows)):
        scores[part] = scorer(batch.rows(part), [rows[n] for n in part])
    return parallel.summed(scores)


def paid_for(section: Grpo, scores: torch.Tensor, batch: Answers) -> torch.Tensor:
    """The scores, less the penalty of answers that do not end by themselves. B."""
    return scores - section.missing_eos_penalty * ~batch.ended


def add_gradients(
    section: Grpo, models: Models, experience: Experience, part: list[int], which: list[int], warming: bool
) -> tuple[dict[str, float], float]:
    """Add the gradients of a micro-batch of the minibatch `which`; returns its share of the minibatch's losses and
    health, and its largest ratio error."""
    batch, old = experience.answers.rows(part), experience.logp[part]
    weights = weights_of(section, experience.answers.rows(which))[[which.index(n) for n in part]]
    low, high = section.clip, section.clip_high or section.clip
    learner = models.policy.model
    with completions.autocast(learner, section.precision), models.policy.active():
        logits = completions.reply_logits(learner, batch, section.temperature)
        logp = likelihood.log_probs(logits, batch.replies) * batch.mask
        ratio = maths.log_ratio(logp, old, batch.mask, section.ratio == "sequence")
        loss = (maths.policy_loss(ratio, experience.advantages[part], low, high) * weights).sum()
        far = (likelihood.kl_k3(logp, experience.reference[part]) * weights).sum()
        (loss + experience.coefficient * far if section.kl == "loss" else loss).backward()
    with torch.no_grad():
        outside = ((ratio.exp() < 1 - low) | (ratio.exp() > 1 + high)).float()
        share = batch.mask / experience.answers.mask[which].sum()
        numbers = {
            "policy_loss": loss.item(),
            "kl_loss": far.item(),
            "clip_fraction": (outside * share).sum().item(),
            "entropy": (likelihood.entropy(logits) * share).sum().item(),
            "approx_kl": (likelihood.kl_k3(old, logp) * share).sum().item(),  # of the old policy, which answered
        }
        return numbers, (((logp - old).exp() - 1).abs() * batch.mask).max().item()


def weights_of(section: Grpo, batch: Answers) -> torch.Tensor:
    """The weight of each token's loss in a minibatch, B x T; 0 for the answers that are left out."""
    mask = batch.mask.float()
    if section.unended == "masked":
        mask = mask * batch.ended.unsqueeze(1)
    return maths.token_weights(mask, section.average, section.max_new_tokens)


METHOD = Method(gather, add_gradients, FIGURES)
