"""A policy's own answers to held-out prompts, beside those of the SFT policy: rewards, win rate, KL, length, variety.

python -m posttrain compare --config results/NAME/compare/config.yaml --data results/NAME/prepare/manifest.json \
    --base results/NAME/base/manifest.json --sft results/NAME/sft/manifest.json \
    --reward results/NAME/reward/manifest.json --policy results/NAME/ppo/manifest.json \
    --beside results/NAME/compare/sft/manifest.json --output results/NAME/compare/ppo/manifest.json

Each prompt's answer is drawn from a random stream of its own, the same for every policy: the differences are paired.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from posttrain.config.sections import Compare
from posttrain.data import texts
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_jsonl, sha256, write_jsonl
from posttrain.ground.progress import say
from posttrain.maths import best_of_n, likelihood
from posttrain.maths.intervals import mean_stderr
from posttrain.models import adapters, tokens
from posttrain.models import policy as policies
from posttrain.rl import handwritten

PARTS = 4  # a batch of answers is measured in so many parts of similar length


class Judge(NamedTuple):
    """What answers are measured by: the SFT policy and the reward model, adapters on one set of frozen weights."""

    model: object
    tokenizer: object
    reward_head: object | None
    function: handwritten.Judge | None
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

    reward: manifest of the reward model, if there is one; beside: of the comparison of the SFT policy, for all others.
    """
    found = adapters.foundation_of(base, sft)
    judge = load(section, found, reward)
    rows = prompts(section, data, judge.tokenizer, judge.model)
    model, name = speaker(judge, policy, found)
    stage = policy.parent.name
    answered = answer(section, judge, rows, model, name)
    write_jsonl(work / "data" / "answers.jsonl", answered)
    table = measured(answered)
    if beside:
        table += paired(answered, read_jsonl(beside.parent / "data" / "answers.jsonl"))
    for row in table:
        say(f"{row['metric']} {row['value']:.4f}")
    points = [point(answered, stage, stage)]
    if stage == "sft":
        points += best_of(section, judge, rows, answered, model, name)
    for folder in sorted((policy.parent / "snapshots").glob("[0-9]*")):
        judge.model.load_adapter(folder, folder.name)
        points.append(point(answer(section, judge, rows, judge.model, folder.name), stage, f"step {int(folder.name)}"))
        judge.model.delete_adapter(folder.name)
    return {"policy": stage, "rows": table, "frontier": points}


def load(section: Compare, found: adapters.Foundation, reward: Path | None) -> Judge:
    """The SFT policy as the adapter `sft`, with the reward model's beside it."""
    from posttrain.models import reward_head

    model = adapters.load_as_sft(found, name="sft").eval()
    head = reward_head.add_to(model, reward) if reward else None
    reward_function, gold = (handwritten.load_judge(section, kind) for kind in ("reward", "gold"))
    return Judge(model, policies.load_tokenizer(found.weights), head, reward_function, gold)


def prompts(section: Compare, data: Path, tokenizer, model) -> list[dict]:
    """Held-out prompts of preference pairs, else of conversations, each once: id, tokens, text, and answer if known.

    Raises UserError when there are none.
    """
    for kind in ("preference", "sft"):
        file = data.parent / "data" / kind / "test.jsonl"
        rows = {}
        for row in read_jsonl(file) if file.is_file() else []:
            ids = tokens.encode_prompt(tokenizer, row)
            known = {"id": row["id"], "ids": ids, "prompt": texts.prompt_text(row), "answer": row.get("answer")}
            rows.setdefault(tuple(ids), known)
        if rows:
            order = np.random.default_rng(section.seed).permutation(len(rows))[: section.prompts]
            from posttrain.rl import answers

            chosen = [list(rows.values())[n] for n in sorted(order)]
            answers.refuse_long(model, chosen, section.max_new_tokens)
            return chosen
    raise UserError(f"compare: {data} holds out no prompts; raise prepare.test_fraction")


def speaker(judge: Judge, policy: Path, found: adapters.Foundation) -> tuple:
    """The model that speaks for a policy, and the adapter that is it (None: the model as it stands).

    The SFT policy is the one that the others are held to, quantised after full fine-tuning too. Raises UserError for
    an adapter of other weights.
    """
    contract = policies.read_contract(policy)
    if policy.parent.name == "sft":
        return judge.model, "sft"
    if contract["method"] == "weights":
        return policies.load_verified(policy).eval(), None
    if contract["base"] != sha256(found.weights):
        raise UserError(f"{policy}: its adapter was trained on other weights than {found.weights}")
    judge.model.load_adapter(policy.parent / "model", "policy")
    return judge.model, "policy"


def answer(section: Compare, judge: Judge, rows: list[dict], model, name: str | None, again: int = 0) -> list[dict]:
    """One answer to each prompt, with what is known of it. again: which of several answers to the same prompt, of which
    only the first has its KL taken."""
    made = []
    for start in range(0, len(rows), section.batch_size):
        part = rows[start : start + section.batch_size]
        made += answer_batch(section, judge, part, model, name, again)
    return made


def answer_batch(section: Compare, judge: Judge, rows: list[dict], model, name: str | None, again: int) -> list[dict]:
    """A batch of answers: reply, length, whether it ended, KL to the SFT policy in nats, and rewards."""
    import contextlib

    import torch

    from posttrain.models import completions
    from posttrain.rl import answers

    seeds = [answers.stream("compare", section.seed, row["id"], again) for row in rows]
    kl, scores = [None] * len(rows), [None] * len(rows)

    def speaking():
        return answers.adapter(model, name) if name else contextlib.nullcontext()

    with torch.no_grad():
        with speaking():
            prompts = [row["ids"] for row in rows]
            said = answers.draw(model, judge.tokenizer, prompts, seeds, section.max_new_tokens, section.temperature)
        for part, some in said.by_length(PARTS):
            if not again:
                with speaking():
                    logp = completions.log_probs(model, some, section.temperature)
                with answers.adapter(judge.model, "sft"):
                    reference = completions.log_probs(judge.model, some, section.temperature)
                put(kl, part, (likelihood.kl_k1(logp, reference) * some.mask).sum(dim=1))
            if judge.reward_head is not None:
                with answers.adapter(judge.model, "reward"):
                    put(scores, part, answers.scores(judge.model, judge.reward_head, some))
    replies = answers.texts(judge.tokenizer, said)
    if judge.function and judge.reward_head is None:
        scores = judge.function.scores(rows, replies)
    golds = judge.gold.scores_of_answered(rows, replies) if judge.gold else [None] * len(rows)
    return [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "reply": reply,
            "answer": row["answer"],
            "length": length,
            "ended": ended,
            "kl": distance,
            "reward": score,
            "gold_reward": gold,
        }
        for row, reply, length, ended, distance, score, gold in zip(
            rows, replies, said.mask.sum(dim=1).tolist(), said.ended.tolist(), kl, scores, golds, strict=True
        )
    ]


def put(column: list, places: list[int], values) -> None:
    """Write values (a tensor) into their places."""
    for place, value in zip(places, values.tolist(), strict=True):
        column[place] = value


def column(answered: list[dict], key: str) -> list[float]:
    """The known values of a column."""
    return [float(row[key]) for row in answered if row[key] is not None]


def measured(answered: list[dict]) -> list[dict]:
    """Rows of the result table: means with standard errors over prompts, and the variety of the answers."""
    rows = []
    for key, metric, higher in (
        ("gold_reward", "gold_reward", True), ("reward", "reward", True), ("kl", "kl_to_sft", False),
        ("length", "length", None), ("ended", "eos_rate", True),
    ):  # fmt: skip
        if values := column(answered, key):
            rows.append(table_row(metric, *mean_stderr(values), len(values), higher))
    replies = [row["reply"] for row in answered]
    for n in (1, 2):
        rows.append(table_row(f"distinct_{n}", distinct(replies, n), None, len(replies), True))
    rows.append(table_row("distinct_answers", len(set(replies)) / len(replies), None, len(replies), True))
    return rows


def table_row(metric: str, value: float, stderr: float | None, n: int, higher: bool | None) -> dict:
    """One row of the result table."""
    return {"task": "answers", "metric": metric, "value": value, "stderr": stderr, "n": n, "higher_is_better": higher}


def distinct(replies: list[str], n: int) -> float:
    """Different n-grams of words over all n-grams of the answers (Li et al. 2016, arXiv 1510.03055, section 5)."""
    grams = [gram for words in map(str.split, replies) for gram in zip(*(words[k:] for k in range(n)), strict=False)]
    return len(set(grams)) / max(1, len(grams))


def paired(answered: list[dict], beside: list[dict]) -> list[dict]:
    """Against the SFT policy's answers to the same prompts: win rate (a tie is half won) with the p of an exact sign
    test, and mean gain, plain and in standard deviations of the SFT policy's reward.

    By gold reward where there is one, else by the learned one. Raises UserError for other prompts.
    """
    from scipy.stats import binomtest

    if [row["id"] for row in answered] != [row["id"] for row in beside]:
        raise UserError("compare: the SFT policy answered other prompts; remake its comparison")
    rows = []
    judged = [key for key in ("gold_reward", "reward") if column(answered, key)]
    for number, key in enumerate(judged):
        before, after = np.array(column(beside, key)), np.array(column(answered, key))
        gains = after - before
        name = "gold_gain" if key == "gold_reward" else "reward_gain"
        rows.append(table_row(name, *mean_stderr(gains.tolist()), len(gains), True))
        if before.std() > 0:
            rows.append(table_row(f"{name}_sd", gains.mean() / before.std(ddof=1), None, len(gains), True))
        if number == 0:
            wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
            rows.append(table_row("win_rate", *mean_stderr(((np.sign(gains) + 1) / 2).tolist()), len(gains), True))
            p = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
            rows.append(table_row("win_rate_p", float(p), None, wins + losses, False))
    return rows


def point(answered: list[dict], series: str, label: str) -> dict:
    """A point of the frontier: KL, gold and learned reward, each with its standard error."""
    made = {"series": series, "label": label, "n": len(answered)}
    for key in ("kl", "gold_reward", "reward"):
        if values := column(answered, key):
            made[key], made[f"{key}_stderr"] = mean_stderr(values)
    return made


def best_of(
    section: Compare, judge: Judge, rows: list[dict], answered: list[dict], model, name: str | None
) -> list[dict]:
    """Best-of-n of the SFT policy's answers by the reward, n = 1, 2, 4, ...: the unbiased estimator over them."""
    if section.best_of == 1 or not column(answered, "reward"):
        return []
    drawn = [answered, *(answer(section, judge, rows, model, name, again) for again in range(1, section.best_of))]
    rewards = np.array([column(one, "reward") for one in drawn]).T
    golds = np.array([column(one, "gold_reward") for one in drawn]).T
    with_gold = [number for number, row in enumerate(answered) if row["gold_reward"] is not None]
    points = []
    for n in (2**k for k in range(int(math.log2(section.best_of)) + 1)):
        made = {"series": "best of n", "label": f"best of {n}", "n": len(rows)}
        made |= {"kl": best_of_n.kl(n), "kl_stderr": None}
        for key, worth, ranked in (("gold_reward", golds, rewards[with_gold]), ("reward", rewards, rewards)):
            if worth.size:
                values = best_of_n.expected(worth, ranked, n).tolist()
                made[key], made[f"{key}_stderr"] = mean_stderr(values)
        points.append(made)
    return points
