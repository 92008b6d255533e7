"""What reinforcement-learning stages share: answer, score, update, and continue where it was.

python -m posttrain ppo ...
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.config.sections import Sampled
from posttrain.ground.errors import Diverged
from posttrain.ground.files import read_json, write_json
from posttrain.models import adapters, completions, policy
from posttrain.models.completions import Answers
from posttrain.rl import answers, handwritten, states
from posttrain.rl.batches import group_of, micro_batches, minibatches, rows_of_iteration
from posttrain.rl.health import check_rails, check_ratio, health_of
from posttrain.rl.networks import Models
from posttrain.rl.scorers import Scorer
from posttrain.training import interruption, parallel, tracking, trainers

Demonstration = tuple[list[int], list[int]]  # the tokens of a prompt and of the reply to it


class Experience(NamedTuple):
    """One iteration's B answers of at most T tokens, and their numbers, B x T but for the scores and, in GRPO, the
    advantages."""

    iteration: int  # from 0
    rows: list[dict]  # that were answered
    answers: Answers
    logp: Tensor
    reference: Tensor
    scores: Tensor  # B
    advantages: Tensor
    coefficient: float  # of KL
    values: Any = None  # B x T in PPO
    returns: Any = None
    figures: dict[str, float] = {}  # noqa: RUF012  # further health figures


class Method(NamedTuple):
    """What differs between the methods."""

    gather: Callable
    """(section, models, scorer, rows, iteration, coefficient, spare) -> Experience; spare: of rows, by their number and
    the name of a random stream."""
    add_gradients: Callable
    """(section, models, experience, part, which, warming) -> (its share of the losses and health of the minibatch
    `which`, its largest ratio error). It adds the gradients of a micro-batch."""
    figures: tuple[str, ...]
    """The losses and health figures that `add_gradients` returns."""
    adapt: Callable | None = None
    """(section, coefficient, health) -> the next iteration's coefficient of KL."""


def train(
    method: Method,
    section: Sampled,
    models: Models,
    foundation: adapters.Foundation,
    scorer: Scorer,
    rows: list[dict],
    work: Path,
    checkpoints: Path,
    demonstrated: Sequence[Demonstration] = (),
) -> dict:
    """Train the policy from the newest checkpoint on; write `work/model` and `work/snapshots`, and return the metrics.

    rows: training prompts. demonstrated: rows of supervised fine-tuning that are trained on beside the answers.
    """
    gold = handwritten.load_judge(section, "gold")
    optimizer, schedule = states.optimizers(section, models)
    state = states.resume(checkpoints, models, optimizer, schedule) or {
        "iteration": 0, "kl_coefficient": section.kl_coefficient, "history": []
    }  # fmt: skip
    parallel.barrier()  # otherwise the first process could remove the checkpoints before another has read them
    progress = trainers.Heartbeat(checkpoints, section.steps, state["iteration"])
    watch = interruption.Watch(section)
    for iteration in range(state["iteration"], section.steps):
        warming = iteration < getattr(section, "value_warmup", 0)
        experience, health = next_experience(method, section, models, scorer, gold, rows, state, checkpoints)
        health |= update(method, section, models, optimizer, experience, warming, demonstrated)
        schedule.step()
        if method.adapt and not warming:
            state["kl_coefficient"] = method.adapt(section, state["kl_coefficient"], health)
        state["iteration"] = iteration + 1
        state["history"].append(health)
        if parallel.main():
            tracking.log(health, iteration + 1)
            progress.beat(iteration + 1, f"reward {health['reward']:.3f}, KL {health['kl']:.2f}")
        states.save(section, models, foundation, state, optimizer, schedule, watch, checkpoints)
    if section.method == "full":
        trainers.round_trained(models.policy.model, policy.dtype_of(foundation.weights))  # it is published in this type
    # The policy after the last update is checked too.
    _, health = next_experience(method, section, models, scorer, gold, rows, state, checkpoints)
    publish(section, models, foundation, work, checkpoints)
    return {"summary": {key: value for key, value in health.items() if key != "step"}, "history": state["history"]}


def next_experience(
    method: Method,
    section: Sampled,
    models: Models,
    scorer: Scorer,
    gold: handwritten.Judge | None,
    rows: list[dict],
    state: dict,
    checkpoints: Path,
) -> tuple[Experience, dict]:
    """The next iteration's experience and its health. Raises Diverged where the answers are beyond the limits."""
    iteration, coefficient = state["iteration"], state["kl_coefficient"]

    def chosen(count: int, name: str = "prompts") -> list[dict]:
        return [rows[n] for n in rows_of_iteration(len(rows), count, section.seed, iteration, name)]

    asked = chosen(section.batch_size // group_of(section))
    experience = method.gather(section, models, scorer, asked, iteration, coefficient, chosen)
    health = health_of(experience, models.tokenizer, gold)
    health |= {"kl_coefficient": coefficient, "step": iteration + 1}
    check_rails(section, health, state["history"], checkpoints)
    return experience, health


def draw(section: Sampled, models: Models, rows: list[dict], seeds: list[int]) -> Answers:
    """An answer to each row, the same in every process. seeds: of their random streams."""
    ids, mine, learner = [row["ids"] for row in rows], parallel.share(len(rows)), models.policy.model
    at_once = parallel.fitting(section.answer_batch_size or len(rows))
    with torch.no_grad(), completions.autocast(learner, section.precision), models.policy.active():
        return answers.draw(
            learner, models.tokenizer, ids, seeds, section.max_new_tokens, section.temperature, at_once, mine
        )


def parts_of(section: Sampled, count: int) -> list[list[int]]:
    """This process's micro-batches of the first epoch's minibatches, of so many answers."""
    return [part for some in minibatches(section, range(count)) for part in micro_batches(section, some)]


def update(
    method: Method,
    section: Sampled,
    models: Models,
    optimizer: states.Optimizers,
    experience: Experience,
    warming: bool,
    demonstrated: Sequence[Demonstration] = (),
) -> dict:
    """The epochs of clipped updates of the policy and, where there is one, the value function; in warm-up of that only.

    Each minibatch's loss is a sum over its tokens with weights of the whole minibatch, so that micro-batches and
    processes change it by rounding only. Returns the health of the update. Raises Diverged, before weights change, for
    a loss that is not finite and for a first ratio that is not 1.
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
            health.append(
                step(method, section, models, optimizer, experience, which, warming, taught, first=not health)
            )
    means = {key: sum(part[key] for part in health) / len(health) for key in health[0]}
    return means | {"first_ratio_error": health[0]["ratio_error"]}


def step(
    method: Method,
    section: Sampled,
    models: Models,
    optimizer: states.Optimizers,
    experience: Experience,
    which: list[int],
    warming: bool,
    demonstrated: Sequence[Demonstration] = (),
    first: bool = False,
) -> dict:
    """One optimiser step on a minibatch of answers, and on as many demonstrations where there are any. first: whether
    it is an iteration's first minibatch, whose ratio must be 1."""
    sums = dict.fromkeys(method.figures, 0.0)
    ratio_error = 0.0
    optimizer.zero_grad()
    for part in micro_batches(section, which):
        numbers, error = method.add_gradients(section, models, experience, part, which, warming)
        sums = {key: sums[key] + numbers[key] for key in sums}
        ratio_error = max(ratio_error, error)
    if demonstrated:
        chosen = rows_of_iteration(len(demonstrated), len(which), section.seed, optimizer.step_count, "taught")
        sums["sft_loss"] = add_sft_gradients(section, models, [demonstrated[n] for n in chosen])
    device = models.policy.model.device
    sums = parallel.summed_numbers(sums, device)
    ratio_error = parallel.largest(ratio_error, device)
    if not all(map(math.isfinite, sums.values())):
        raise Diverged(f"{section.__class__.__name__.lower()}: a loss is no number ({sums}): lower learning_rate")
    if first:
        check_ratio(section, experience.iteration, ratio_error)
    norms = optimizer.step(section.max_grad_norm, policy=not warming)
    return sums | norms | {"ratio_error": ratio_error}


def add_sft_gradients(section: Sampled, models: Models, rows: list[Demonstration]) -> float:
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


def publish(section: Sampled, models: Models, foundation: adapters.Foundation, work: Path, checkpoints: Path) -> None:
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
