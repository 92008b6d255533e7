"""Statistics of a policy's answers: rows of the result table, and points of the reward-KL frontier.

An answer is a dict: id, reply, length, ended, and kl, reward, gold_reward and such as exact_reward, each None where it
was not measured.
"""

import math

import numpy as np
from scipy.stats import binomtest

from posttrain.ground.errors import UserError
from posttrain.maths import best_of_n
from posttrain.maths.intervals import mean_stderr

GAINS = {"gold_reward": "gold_gain", "reward": "reward_gain"}  # the first that was measured gives the win rate


def summarise(answers: list[dict]) -> list[dict]:
    """Rows of the result table: means with standard errors over prompts, and measures of variety."""
    rows = []
    checks = [key for key in answers[0] if is_check(key)]
    for key, metric, higher in (
        ("gold_reward", "gold_reward", True), ("reward", "reward", True),
        *((key, key, True) for key in checks), ("kl", "kl_to_sft", False),
        ("length", "length", None), ("ended", "eos_rate", True),
    ):  # fmt: skip
        if values := column(answers, key):
            rows.append(_row(metric, *mean_stderr(values), len(values), higher))
    replies = [answer["reply"] for answer in answers]
    for n in (1, 2):
        rows.append(_row(f"distinct_{n}", distinct(replies, n), None, len(replies), True))
    rows.append(_row("distinct_answers", len(set(replies)) / len(replies), None, len(replies), True))
    return rows


def gains(answers: list[dict], beside: list[dict]) -> list[dict]:
    """Rows that compare with the SFT policy's answers to the same prompts (`beside`): win rate (a tie counts half) with
    the p of an exact sign test, and mean gain, also in standard deviations of the SFT policy's reward.

    The win rate is by gold reward where there is one, else by the reward. Raises UserError for other prompts.
    """
    if [answer["id"] for answer in answers] != [answer["id"] for answer in beside]:
        raise UserError("compare: the SFT policy answered other prompts; remake its comparison")
    rows = []
    judged = [key for key in GAINS if column(answers, key)]
    for key in judged:
        before, after = np.array(column(beside, key)), np.array(column(answers, key))
        gain = after - before
        rows.append(_row(GAINS[key], *mean_stderr(gain.tolist()), len(gain), True))
        if before.std() > 0:
            rows.append(_row(f"{GAINS[key]}_sd", gain.mean() / before.std(ddof=1), None, len(gain), True))
        if key == judged[0]:
            wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
            rows.append(_row("win_rate", *mean_stderr(((np.sign(gain) + 1) / 2).tolist()), len(gain), True))
            p = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
            rows.append(_row("win_rate_p", float(p), None, wins + losses, False))
    return rows


def point(answers: list[dict], series: str, label: str) -> dict:
    """A point of the frontier: means of KL, gold reward and reward, each with its standard error."""
    means = {"series": series, "label": label, "n": len(answers)}
    for key in ("kl", "gold_reward", "reward"):
        if values := column(answers, key):
            means[key], means[f"{key}_stderr"] = mean_stderr(values)
    return means


def best_of_points(drawn: list[list[dict]]) -> list[dict]:
    """Points of best-of-n by the reward, n = 1, 2, 4, ..., by the unbiased estimator over N answers to each prompt.

    drawn: N lists of answers to the same prompts.
    """
    rewards, golds = (np.array([column(answers, key) for answers in drawn]).T for key in ("reward", "gold_reward"))
    with_gold = [number for number, answer in enumerate(drawn[0]) if answer["gold_reward"] is not None]
    points = []
    for n in (2**k for k in range(int(math.log2(len(drawn))) + 1)):
        means = {"series": "best of n", "label": f"best of {n}", "n": len(drawn[0])}
        means |= {"kl": best_of_n.kl(n), "kl_stderr": None}
        for key, worth, ranked_by in (("gold_reward", golds, rewards[with_gold]), ("reward", rewards, rewards)):
            if worth.size:
                values = best_of_n.expected(worth, ranked_by, n).tolist()
                means[key], means[f"{key}_stderr"] = mean_stderr(values)
        points.append(means)
    return points


def is_check(key: str) -> bool:
    """Whether a key is that of a reward that a program checks."""
    return "_reward" in key and key != "gold_reward"


def column(answers: list[dict], key: str) -> list[float]:
    """The measured values of a column, as a list."""
    return [float(answer[key]) for answer in answers if answer[key] is not None]


def distinct(replies: list[str], n: int) -> float:
    """Share of distinct word n-grams among all in the replies (Li et al. 2016, arXiv 1510.03055, section 5)."""
    grams = [gram for words in map(str.split, replies) for gram in zip(*(words[k:] for k in range(n)), strict=False)]
    return len(set(grams)) / max(1, len(grams))


def _row(metric: str, value: float, stderr: float | None, n: int, higher: bool | None) -> dict:
    """One row of the result table."""
    return {"task": "answers", "metric": metric, "value": value, "stderr": stderr, "n": n, "higher_is_better": higher}
