"""A policy's own answers to held-out prompts, beside those of the SFT policy: rewards, win rate, KL, length, variety.

python -m posttrain compare --config results/NAME/compare/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reward results/NAME/reward/manifest.json --policy results/NAME/ppo/manifest.json \
    --beside results/NAME/compare/sft/manifest.json --output results/NAME/compare/ppo/manifest.json

Each prompt's answer is drawn from a random stream of its own, the same for every policy: the differences are paired.
"""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from posttrain.config.sections import Compare
from posttrain.evaluation import comparison
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl, sha256, write_jsonl
from posttrain.ground.progress import say
from posttrain.maths import likelihood
from posttrain.models import adapters, completions, reward_head
from posttrain.models import policy as policies
from posttrain.rl import answers, handwritten
from posttrain.rl.prompts import held_out_prompts

PARTS = 4  # a batch of answers is measured in so many parts of similar length


class Measures(NamedTuple):
    """What measures answers: the SFT policy and the reward model, adapters on one set of frozen weights; functions."""

    model: Any  # PEFT's
    tokenizer: Any
    reward_head: torch.nn.Module | None
    reward: handwritten.Judge | None
    gold: handwritten.Judge | None


class Speaker(NamedTuple):
    """The model that answers for a policy, and the adapter to be active in it; None for the model as it is."""

    model: Any
    adapter: str | None

    def active(self) -> contextlib.AbstractContextManager:
        """Have the policy's adapter active."""
        return answers.adapter(self.model, self.adapter) if self.adapter else contextlib.nullcontext()


def compare(
    section: Compare,
    data: Path,
    base: Path,
    sft: Path,
    policy: Path,
    work: Path,
    checkpoints: Path,
    reward: Path | None = None,
    beside: Path | None = None,
) -> dict:
    """Write `work/data/answers.jsonl` and return the table's rows and the points of the reward-KL frontier.

    reward: manifest of the reward model, if there is one; beside: of the comparison of the SFT policy, for all others.
    """
    foundation = adapters.foundation_of(base, sft)
    measures = load_measures(section, foundation, reward)
    rows = held_out_prompts(section, data, measures.tokenizer, measures.model)
    speaker = load_speaker(measures, policy, foundation)
    stage = policy.parent.name
    answered = answer(section, measures, rows, speaker)
    write_jsonl(work / "data" / "answers.jsonl", answered)
    table = comparison.summarise(answered)
    if beside:
        table += comparison.gains(answered, read_jsonl(beside.parent / "data" / "answers.jsonl"))
    for row in table:
        say(f"{row['metric']} {row['value']:.4f}")
    points = [comparison.point(answered, stage, stage)]
    if stage == "sft" and section.best_of > 1 and comparison.column(answered, "reward"):
        more = [answer(section, measures, rows, speaker, again) for again in range(1, section.best_of)]
        points += comparison.best_of_points([answered, *more])
    for folder in sorted((policy.parent / "snapshots").glob("[0-9]*")):
        measures.model.load_adapter(folder, folder.name)
        of_snapshot = answer(section, measures, rows, Speaker(measures.model, folder.name))
        points.append(comparison.point(of_snapshot, stage, f"step {int(folder.name)}"))
        measures.model.delete_adapter(folder.name)
    return {"policy": stage, "rows": table, "frontier": points}


def load_measures(section: Compare, foundation: adapters.Foundation, reward: Path | None) -> Measures:
    """The SFT policy as the adapter `sft`, with the reward model's beside it, and the functions that judge answers."""
    model = adapters.load_as_sft(foundation, name="sft").eval()
    head = reward_head.add_to(model, reward) if reward else None
    judges = (handwritten.load_judge(section, kind) for kind in ("reward", "gold"))
    return Measures(model, policies.load_tokenizer(foundation.weights), head, *judges)


def load_speaker(measures: Measures, manifest: Path, foundation: adapters.Foundation) -> Speaker:
    """The speaker of the policy with this manifest.

    The SFT policy is the one that measures, quantised after full fine-tuning too. Raises UserError for an adapter of
    other weights.
    """
    contract = policies.read_contract(manifest)
    if manifest.parent.name == "sft":
        return Speaker(measures.model, "sft")
    if contract["method"] == "weights":
        return Speaker(policies.load_verified(manifest).eval(), None)
    if contract["base"] != sha256(foundation.weights):
        raise UserError(f"{manifest}: its adapter was trained on other weights than {foundation.weights}")
    measures.model.load_adapter(manifest.parent / "model", "policy")
    return Speaker(measures.model, "policy")


def answer(section: Compare, measures: Measures, rows: list[dict], speaker: Speaker, again: int = 0) -> list[dict]:
    """One measured answer to each prompt. again: which of several answers to the same prompt; only the first has its
    KL taken."""
    answered = []
    for start in range(0, len(rows), section.batch_size):
        answered += answer_batch(section, measures, rows[start : start + section.batch_size], speaker, again)
    return answered


def answer_batch(section: Compare, measures: Measures, rows: list[dict], speaker: Speaker, again: int) -> list[dict]:
    """A batch of answers: reply, length, whether it ended, KL to the SFT policy in nats, and rewards."""
    seeds = [answers.stream("compare", section.seed, row["id"], again) for row in rows]
    ids = [row["ids"] for row in rows]
    with torch.no_grad(), speaker.active():
        batch = answers.draw(speaker.model, measures.tokenizer, ids, seeds, section.max_new_tokens, section.temperature)
    kl, rewards = measure(section, measures, batch, speaker, with_kl=not again)
    replies = answers.texts(measures.tokenizer, batch)
    if measures.reward and measures.reward_head is None:
        rewards = list(measures.reward.scores(rows, replies))
    golds = measures.gold.scores_of_answered(rows, replies) if measures.gold else [None] * len(rows)
    return [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "reply": reply,
            "answer": row["answer"],
            "length": length,
            "ended": ended,
            "kl": distance,
            "reward": reward,
            "gold_reward": gold,
        }
        for row, reply, length, ended, distance, reward, gold in zip(
            rows, replies, batch.mask.sum(dim=1).tolist(), batch.ended.tolist(), kl, rewards, golds, strict=True
        )
    ]


def measure(
    section: Compare, measures: Measures, batch: completions.Answers, speaker: Speaker, with_kl: bool
) -> tuple[list[float | None], list[float | None]]:
    """Of each answer its KL to the SFT policy in nats, and the reward model's score; None for what is not taken."""
    kl: list[float | None] = [None] * len(batch)
    rewards: list[float | None] = [None] * len(batch)
    with torch.no_grad():
        for part, some in batch.by_length(PARTS):
            if with_kl:
                with speaker.active():
                    logp = completions.log_probs(speaker.model, some, section.temperature)
                with answers.adapter(measures.model, "sft"):
                    reference = completions.log_probs(measures.model, some, section.temperature)
                put(kl, part, (likelihood.kl_k1(logp, reference) * some.mask).sum(dim=1))
            if measures.reward_head is not None:
                with answers.adapter(measures.model, "reward"):
                    put(rewards, part, answers.scores(measures.model, measures.reward_head, some))
    return kl, rewards


def put(column: list, places: list[int], values: torch.Tensor) -> None:
    """Write values into their places."""
    for place, value in zip(places, values.tolist(), strict=True):
        column[place] = value
