"""The health figures of reinforcement learning, and checks against the limits beyond which it fails (`Rails`)."""

import math
from pathlib import Path

from posttrain.config.sections import Sampled
from posttrain.ground.errors import Diverged
from posttrain.maths import likelihood
from posttrain.rl import answers
from posttrain.rl.handwritten import Judge


def health_of(experience, tokenizer, gold: Judge | None) -> dict:
    """The health of an iteration's answers (`loop.Experience`); KL and its estimators in nats per answer.

    gold: scores answers to rows that have an `answer`.
    """
    rows, mask = experience.rows, experience.answers.mask
    health = {
        "reward": experience.scores.mean().item(),
        "kl": (likelihood.kl_k1(experience.logp, experience.reference) * mask).sum(dim=1).mean().item(),
        "kl_k2": (likelihood.kl_k2(experience.logp, experience.reference) * mask).sum(dim=1).mean().item(),
        "kl_k3": (likelihood.kl_k3(experience.logp, experience.reference) * mask).sum(dim=1).mean().item(),
        **experience.figures,
        "eos_rate": experience.answers.ended.float().mean().item(),
        "length": mask.sum(dim=1).float().mean().item(),
    }
    if gold:
        judged = gold.scores_of_answered(rows, answers.texts(tokenizer, experience.answers))
        if golds := [value for value in judged if value is not None]:
            health["gold_reward"] = sum(golds) / len(golds)
    return health


def check_rails(section: Sampled, health: dict, history: list[dict], checkpoints: Path) -> None:
    """Raise Diverged, naming the reason and the last good checkpoint, for answers beyond the limits (`Rails`).

    The answers are those of the policy after `step - 1` updates, so that this policy's checkpoint is not a good one.
    """
    name = section.__class__.__name__.lower()
    rails, first = section.rails, (history or [health])[0]
    longest = rails.max_growth * first["length"]
    if first["length"] < 0.5 * section.max_new_tokens:  # otherwise answers start near the limit
        longest = min(longest, 0.95 * section.max_new_tokens)
    broken = []
    if not math.isfinite(health["reward"]) or not math.isfinite(health["kl"]):
        broken.append(f"reward {health['reward']} or KL {health['kl']} is no number")
    if health["kl"] > rails.max_kl:
        broken.append(f"KL exploded: {health['kl']:.1f} nats an answer, {name}.rails.max_kl is {rails.max_kl}")
    if health["eos_rate"] < rails.min_eos_rate <= max(entry["eos_rate"] for entry in [*history, health]):
        broken.append(f"answers no longer end: EOS rate {health['eos_rate']:.2f}, min_eos_rate is {rails.min_eos_rate}")
    if health["length"] > longest:
        broken.append(f"answers run away: {health['length']:.0f} tokens, {first['length']:.0f} at first")
    entropy = history[-1].get("entropy", math.inf) if history else math.inf  # of the update before these answers
    if entropy < (rails.min_entropy or 0):
        broken.append(f"entropy fell to {entropy:.3f} nats a token, {name}.rails.min_entropy is {rails.min_entropy}")
    if broken:
        folders = sorted(checkpoints.glob("checkpoint-*"), reverse=True)
        good = next((folder for folder in folders if int(folder.name[11:]) < health["step"] - 1), None)
        where = f"the last good checkpoint is {good}" if good else "there is no good checkpoint"
        raise Diverged(f"{name}: stopped at iteration {health['step']}: {'; '.join(broken)}; {where}")


def check_ratio(section: Sampled, iteration: int, off: float) -> None:
    """Raise Diverged where the ratio of an iteration's first minibatch is off 1: the policy to update is not the one
    that answered. iteration: its number, from 0."""
    if off > section.rails.max_ratio_error:
        name = section.__class__.__name__.lower()
        limit = f"{name}.rails.max_ratio_error is {section.rails.max_ratio_error}"
        where = f"{name}: stopped at iteration {iteration + 1}, before its first update"
        raise Diverged(f"{where}: the first ratio is off 1 by {off:.2g}, {limit}")
