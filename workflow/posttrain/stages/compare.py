"""Compare a policy's answers to held-out prompts with the SFT policy's: rewards, win rate, KL, length, variety.

python -m posttrain compare --config results/NAME/compare/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reward results/NAME/reward/manifest.json --policy results/NAME/ppo/manifest.json \
    --beside results/NAME/compare/sft/manifest.json --output results/NAME/compare/ppo/manifest.json

Each prompt has its own random stream, the same for every policy, so that differences between policies are paired.
"""

from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch

from posttrain.config.sections import Compare
from posttrain.evaluation import comparison, judging
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl, sha256, write_jsonl
from posttrain.ground.progress import say
from posttrain.maths import likelihood
from posttrain.models import adapters, completions, network, reward_head
from posttrain.models import policy as policies
from posttrain.models import quantization as nf4
from posttrain.models.network import Network
from posttrain.rl import answers, handwritten, verifiable
from posttrain.rl.prompts import given_replies, held_out_prompts
from posttrain.rl.referee import Referee

PARTS = 4  # parts of similar length in which a batch of answers is measured


class Measures(NamedTuple):
    """The measuring models and functions: the SFT policy as the adapter `sft`, and the reward model, as an adapter on
    the same frozen weights or with weights of its own."""

    model: Any  # PEFT's
    tokenizer: Any
    reward_model: reward_head.RewardModel | None
    reward: handwritten.Judge | Referee | None
    gold: handwritten.Judge | None


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
    if section.judge:  # before the models are loaded
        judging.key_of(section.judge)
        judging.refuse_unreachable(section.judge)
    foundation = adapters.foundation_of(base, sft, section.method)
    measures = load_measures(section, foundation, reward)
    rows = held_out_prompts(section, data, measures.tokenizer, measures.model)
    speaker = load_speaker(measures, policy, foundation, section.four_bits)
    stage = policy.parent.name
    answered = answer(section, measures, rows, speaker)
    write_jsonl(work / "data" / "answers.jsonl", answered)
    table = comparison.summarise(answered)
    if beside:
        table += comparison.gains(answered, read_jsonl(beside.parent / "data" / "answers.jsonl"))
    verdicts = judge(section, answered, data, beside, checkpoints)
    if verdicts:
        write_jsonl(work / "data" / "verdicts.jsonl", verdicts)
        table += judging.rows_of(verdicts)
    for row in table:
        say(f"{row['metric']} {row['value']:.4f}")
    points = [comparison.point(answered, stage, stage)]
    if stage == "sft" and section.best_of > 1 and comparison.column(answered, "reward"):
        more = [answer(section, measures, rows, speaker, again) for again in range(1, section.best_of)]
        points += comparison.best_of_points([answered, *more])
    points += snapshot_points(section, measures, rows, policy, foundation)
    warnings = form_warnings(rows, policy) + policies.quantize_warnings(section, policy)
    warnings += judging.warnings(verdicts)
    return {"policy": stage, "rows": table, "frontier": points, **({"warnings": warnings} if warnings else {})}


def snapshot_points(section: Compare, measures: Measures, rows: list[dict], policy: Path, foundation) -> list[dict]:
    """A point of the frontier for each snapshot that is stored beside a policy."""
    points = []
    for folder in sorted((policy.parent / "snapshots").glob("[0-9]*")):
        speaker = load_snapshot(measures, policy, folder, foundation)
        of_snapshot = answer(section, measures, rows, speaker)
        points.append(comparison.point(of_snapshot, policy.parent.name, f"step {int(folder.name)}"))
        if speaker.adapter:
            speaker.model.delete_adapter(speaker.adapter)
    return points


def judge(section: Compare, answered: list[dict], data: Path, beside: Path | None, checkpoints: Path) -> list[dict]:
    """The judge's verdicts on a policy's answers; none without a judge, nor on the SFT policy beside itself."""
    if section.judge is None:
        return []
    if section.judge.against == "given":
        others = given_replies(data)
    elif beside:
        others = {answer["id"]: answer["reply"] for answer in read_jsonl(beside.parent / "data" / "answers.jsonl")}
    else:
        return []
    asked = judging.requests(section.judge, answered, others)
    if not asked:
        raise UserError("compare.judge.against: given: no held-out prompt has a given reply")
    say(f"asking {section.judge.model} for {len(asked):,} verdicts")
    return judging.judged(section.judge, asked, checkpoints / "verdicts.jsonl")


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
    """The SFT policy as the adapter `sft`, the reward model, and the functions that score answers."""
    model = adapters.load_as_sft(foundation, name="sft").eval()
    scorer = reward_head.load(reward, foundation, model) if reward else None
    gold = handwritten.load_judge(section, "gold")
    if section.reward_function and section.reward_seconds:  # what fails counts as 0, as in training
        function: Any = Referee(section, section.reward_seconds)
    else:
        function = handwritten.load_judge(section, "reward")
    return Measures(model, policies.load_tokenizer(foundation.weights), scorer, function, gold)


def load_speaker(measures: Measures, manifest: Path, foundation: adapters.Foundation, quantize: str | None) -> Network:
    """The network of a policy. manifest: the policy's. quantize: type of 4 bits to which a whole model is quantised;
    one under the measuring adapters may be so already.

    For the SFT policy it is the measuring model itself, which is quantised after full fine-tuning unless a policy is
    trained on it as it is. Raises UserError for an adapter on other weights.
    """
    contract = policies.read_contract(manifest)
    if manifest.parent.name == "sft":
        return Network(measures.model, "sft")
    if contract["method"] == "weights":
        settings = nf4.settings(policies.dtype_of(manifest), kind=quantize) if quantize else None
        held = foundation.quantization
        if settings and held and settings["type"] == held["type"] and sha256(manifest) == sha256(foundation.weights):
            return Network(measures.model)
        return Network(policies.load_verified(manifest, settings).eval())
    if contract["base"] != sha256(foundation.weights):
        raise UserError(f"{manifest}: its adapter was trained on other weights than {foundation.weights}")
    return load_adapter(measures, manifest, manifest.parent / "model", "policy", foundation)


def load_snapshot(measures: Measures, manifest: Path, folder: Path, foundation: adapters.Foundation) -> Network:
    """The network of a policy at an earlier step: an adapter, or a whole model. folder: of the snapshot."""
    if policies.read_contract(manifest)["method"] == "weights":
        return Network(policies.load_model(folder, dtype=policies.dtype_of(manifest)).eval())
    return load_adapter(measures, manifest, folder, folder.name, foundation)


def load_adapter(
    measures: Measures, manifest: Path, folder: Path, name: str, foundation: adapters.Foundation
) -> Network:
    """A policy's adapter on the frozen weights of the measuring model, or on such as it was trained on where these are
    quantised and those are not. folder: of the adapter's files."""
    model = measures.model
    if bool(policies.read_contract(manifest)["quantization"]) != bool(foundation.quantization):
        own = policies.load_under(manifest, foundation.weights)
        return Network(peft.PeftModel.from_pretrained(own, folder, adapter_name=name).eval(), name)
    model.load_adapter(folder, name)
    return Network(model, name)


def answer(section: Compare, measures: Measures, rows: list[dict], speaker: Network, again: int = 0) -> list[dict]:
    """One measured answer to each prompt. again: number of the answer among several to a prompt; KL is computed for
    the first only."""
    answered = []
    for start in range(0, len(rows), section.batch_size):
        answered += answer_batch(section, measures, rows[start : start + section.batch_size], speaker, again)
    return answered


def answer_batch(section: Compare, measures: Measures, rows: list[dict], speaker: Network, again: int) -> list[dict]:
    """A batch of answers: reply, length, whether it ended by itself, KL to the SFT policy in nats, and rewards."""
    seeds = [answers.stream("compare", section.seed, row["id"], again) for row in rows]
    ids = [row["ids"] for row in rows]
    with torch.no_grad(), speaker.active():
        batch = answers.draw(speaker.model, measures.tokenizer, ids, seeds, section.max_new_tokens, section.temperature)
    kl, rewards = measure(section, measures, batch, speaker, with_kl=not again)
    replies = answers.texts(measures.tokenizer, batch)
    checked = verifiable.measured(section.checks, rows, replies)
    if measures.reward_model is None and measures.reward:
        rewards = list(measures.reward.scores(rows, replies))
    elif measures.reward_model is None and section.checks:
        rewards = list(verifiable.summed(section.checks, checked))
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
            **{name: values[number] for name, values in checked.items()},
        }
        for number, (row, reply, length, ended, distance, reward, gold) in enumerate(
            zip(rows, replies, batch.mask.sum(dim=1).tolist(), batch.ended.tolist(), kl, rewards, golds, strict=True)
        )
    ]


def measure(
    section: Compare, measures: Measures, batch: completions.Answers, speaker: Network, with_kl: bool
) -> tuple[list[float | None], list[float | None]]:
    """(KL of each answer to the SFT policy in nats, its score by the reward model); None where not computed."""
    kl: list[float | None] = [None] * len(batch)
    rewards: list[float | None] = [None] * len(batch)
    with torch.no_grad():
        for part, some in batch.by_length(PARTS):
            if with_kl:
                with speaker.active():
                    logp = completions.log_probs(speaker.model, some, section.temperature)
                with network.adapter(measures.model, "sft"):
                    reference = completions.log_probs(measures.model, some, section.temperature)
                put(kl, part, (likelihood.kl_k1(logp, reference) * some.mask).sum(dim=1))
            if scorer := measures.reward_model:
                with scorer.network.active():
                    put(rewards, part, answers.scores(scorer.network.model, scorer.head, some))
    return kl, rewards


def put(column: list, places: list[int], values: torch.Tensor) -> None:
    """Write values into a column, at their places."""
    for place, value in zip(places, values.tolist(), strict=True):
        column[place] = value
