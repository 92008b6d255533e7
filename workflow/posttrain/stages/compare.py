"""Compare a policy's answers to held-out prompts with the SFT policy's: rewards, win rate, KL, length, variety.

python -m posttrain compare --config results/NAME/compare/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reward results/NAME/reward/manifest.json --policy results/NAME/ppo/manifest.json \
    --beside results/NAME/compare/sft/manifest.json --output results/NAME/compare/ppo/manifest.json

Each prompt has its own random stream, the same for every policy, so that differences between policies are paired.
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
from posttrain.models import quantization as nf4
from posttrain.rl import answers, handwritten
from posttrain.rl.prompts import held_out_prompts

PARTS = 4  # parts of similar length in which a batch of answers is measured


class Measures(NamedTuple):
    """The measuring models and functions: SFT policy and reward model, as adapters on one set of frozen weights."""

    model: Any  # PEFT's
    tokenizer: Any
    reward_head: torch.nn.Module | None
    reward: handwritten.Judge | None
    gold: handwritten.Judge | None


class Speaker(NamedTuple):
    """A policy that answers: its model, and the adapter to activate; None for the model itself."""

    model: Any
    adapter: str | None

    def active(self) -> contextlib.AbstractContextManager:
        """A context in which the policy's adapter is active, or none."""
        adapted = hasattr(self.model, "peft_config")
        return answers.adapter(self.model, self.adapter) if adapted else contextlib.nullcontext()


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

    reward: manifest of the reward model, if there is one; beside: manifest of the SFT policy's comparison, for any
    other policy.
    """
    foundation = adapters.foundation_of(base, sft)
    measures = load_measures(section, foundation, reward)
    rows = held_out_prompts(section, data, measures.tokenizer, measures.model)
    speaker = load_speaker(measures, policy, foundation, bool(section.quantize))
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
    warnings = form_warnings(rows, policy) + policies.quantize_warnings(section, policy)
    return {"policy": stage, "rows": table, "frontier": points, **({"warnings": warnings} if warnings else {})}


def form_warnings(rows: list[dict], policy: Path) -> list[str]:
    """Warnings, which are printed, of prompts in another form than that of the policy's training rows."""
    trained = policies.read_contract(policy).get("form", "chat")
    others = sum(row["form"] != trained for row in rows)
    words = {"plain": "plain text", "chat": "conversations, written by the chat template"}
    warning = f"{others} of {len(rows)} prompts are not {words[trained]}, as its training rows are"
    if others:
        say(f"warning: {policy.parent.name}: {warning}")
    return [warning] if others else []


def load_measures(section: Compare, foundation: adapters.Foundation, reward: Path | None) -> Measures:
    """The SFT policy as the adapter `sft`, the reward model as a second one, and the functions that score answers."""
    model = adapters.load_as_sft(foundation, name="sft").eval()
    head = reward_head.add_to(model, reward, foundation.weights) if reward else None
    judges = (handwritten.load_judge(section, kind) for kind in ("reward", "gold"))
    return Measures(model, policies.load_tokenizer(foundation.weights), head, *judges)


def load_speaker(measures: Measures, manifest: Path, foundation: adapters.Foundation, quantize: bool) -> Speaker:
    """The speaker of a policy. manifest: the policy's. quantize: whether a whole model is quantised to NF4; one under
    the measuring adapters is so already.

    For the SFT policy it is the measuring model itself, which is quantised after full fine-tuning. Raises UserError for
    an adapter on other weights.
    """
    contract = policies.read_contract(manifest)
    if manifest.parent.name == "sft":
        return Speaker(measures.model, "sft")
    if contract["method"] == "weights":
        if quantize and foundation.quantization and sha256(manifest) == sha256(foundation.weights):
            return Speaker(measures.model, None)
        settings = nf4.settings(policies.dtype_of(manifest)) if quantize else None
        return Speaker(policies.load_verified(manifest, settings).eval(), None)
    if contract["base"] != sha256(foundation.weights):
        raise UserError(f"{manifest}: its adapter was trained on other weights than {foundation.weights}")
    measures.model.load_adapter(manifest.parent / "model", "policy")
    return Speaker(measures.model, "policy")


def answer(section: Compare, measures: Measures, rows: list[dict], speaker: Speaker, again: int = 0) -> list[dict]:
    """One measured answer to each prompt. again: number of the answer among several to a prompt; KL is computed for
    the first only."""
    answered = []
    for start in range(0, len(rows), section.batch_size):
        answered += answer_batch(section, measures, rows[start : start + section.batch_size], speaker, again)
    return answered


def answer_batch(section: Compare, measures: Measures, rows: list[dict], speaker: Speaker, again: int) -> list[dict]:
    """A batch of answers: reply, length, whether it ended by itself, KL to the SFT policy in nats, and rewards."""
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
    """(KL of each answer to the SFT policy in nats, its score by the reward model); None where not computed."""
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
    """Write values into a column, at their places."""
    for place, value in zip(places, values.tolist(), strict=True):
        column[place] = value
