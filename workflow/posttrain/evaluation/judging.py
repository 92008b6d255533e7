"""Have a language model behind an OpenAI-compatible endpoint judge pairs of answers, each in both orders.

An answer's win over another is the mean of the two orders' scores: 1 won, 0.5 tied, 0 lost (Zheng et al. 2023, arXiv
2306.05685, section 3.4, on the bias towards the first answer). A request is a dict: id of the prompt, order, text.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import httpx

from posttrain.config.sections import Judge
from posttrain.ground import credentials
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say
from posttrain.maths.intervals import mean_stderr

PROMPT = """Which of two answers to a prompt is more helpful? Do not let length or the order of the answers decide.

Prompt:
{prompt}

Answer A:
{first}

Answer B:
{second}

Compare the two in one sentence. Then write one last line: "Verdict: A", "Verdict: B" or "Verdict: tie"."""
VERDICT = re.compile(r"(?i:\b(?:verdict|preferred|more helpful|better))\W*(A|B|[Tt]ie)\b")
ORDERS = ("policy first", "policy second")
RETRIED = (408, 429)  # and every status from 500 on: the same request may succeed later
PATIENCE = 5  # failed requests in a row after which no more are sent


def key_of(judge: Judge) -> str | None:
    """The endpoint's key. Raises UserError where the environment variable that holds it is not set here."""
    if judge.key_variable is None:
        return None
    key = credentials.known().get(judge.key_variable) or os.environ.get(judge.key_variable)
    if not key:
        raise UserError(
            f"compare.judge.key_variable: {judge.key_variable} is not set. Set it where snakemake starts. It is not "
            "passed to other machines: on a cluster, name an endpoint that needs no key, or run this stage there."
        )
    return key


def refuse_unreachable(judge: Judge) -> None:
    """Raise UserError where nothing answers at the endpoint; any HTTP status is an answer."""
    try:
        httpx.get(f"{judge.url}/models", timeout=judge.timeout)
    except httpx.HTTPError as error:
        raise UserError(
            f"compare.judge.url: nothing answers at {judge.url} ({type(error).__name__}). This stage needs a network "
            "to it; where a cluster's nodes have none, serve the judge there or run this stage on the login node."
        ) from None


def requests(judge: Judge, answers: list[dict], others: dict[str, str]) -> list[dict]:
    """Two requests for each answer with another reply to compare it with. others: id of the prompt -> that reply."""
    asked = []
    for answer in answers:
        if answer["id"] in others:
            pair = (answer["reply"], others[answer["id"]])
            for order, (first, second) in zip(ORDERS, (pair, pair[::-1]), strict=True):
                text = filled(judge.prompt or PROMPT, prompt=answer["prompt"], first=first, second=second)
                asked.append({"id": answer["id"], "order": order, "request": text})
    return asked


def filled(template: str, **texts: str) -> str:
    """A template with its fields replaced in one pass, so that a field's name within an answer stays as it is."""
    return re.sub(r"\{(prompt|first|second)\}", lambda match: texts[match[1]], template)


def judged(judge: Judge, asked: list[dict], record: Path) -> list[dict]:
    """The requests, each with the judge's `reply` and `verdict`, or with the reason of its `failure`.

    record: file of the verdicts so far, to which each is appended as it comes; those in it are not asked again.
    """
    given = verdicts_of(record)
    key, failed, rows = key_of(judge), 0, []
    with httpx.Client(timeout=judge.timeout) as client:
        for request in asked:
            row = given.get((request["id"], request["order"], request["request"]))
            if row is None and failed >= PATIENCE:
                row = request | {"failure": f"not asked after {PATIENCE} failures in a row"}
            elif row is None:
                row = request | ask(client, judge, key, request["request"])
                failed = failed + 1 if "failure" in row else 0
                if "verdict" in row:
                    append(record, row)
            rows.append(row)
    return rows


def verdicts_of(record: Path) -> dict[tuple[str, str, str], dict]:
    """(id, order, request) -> row, of the verdicts that an earlier attempt was given; a torn last line is left out."""
    rows = []
    for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return {(row["id"], row["order"], row["request"]): row for row in rows}


def append(record: Path, row: dict) -> None:
    """Add a row to a file of JSON Lines and wait until it is on disk. It begins a line: the last may be torn."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with open(record, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def ask(client: httpx.Client, judge: Judge, key: str | None, text: str) -> dict:
    """The judge's `reply` and its `verdict`, after at most `attempts` requests; else the last `failure`."""
    outcome: dict = {}
    for attempt in range(judge.attempts):
        sleep(judge.pause * (2**attempt - 1))
        outcome, final = ask_once(client, judge, key, text)
        if final:
            break
    return outcome


def ask_once(client: httpx.Client, judge: Judge, key: str | None, text: str) -> tuple[dict, bool]:
    """(outcome of one request, whether asking again is pointless). A failure tells its kind alone, as an error's text
    may repeat the key."""
    body = {"model": judge.model, "messages": [{"role": "user", "content": text}]}
    sampling = {"temperature": judge.temperature, "max_tokens": judge.max_tokens}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = client.post(f"{judge.url}/chat/completions", json=body | sampling, headers=headers)
        if (status := response.status_code) != 200:
            return {"failure": f"HTTP status {status}"}, status < 500 and status not in RETRIED
        reply = str(response.json()["choices"][0]["message"]["content"])
    except httpx.HTTPError as error:
        return {"failure": type(error).__name__}, False
    except (ValueError, LookupError, TypeError):
        return {"failure": "no chat completion in the response"}, False
    stated = VERDICT.findall(reply)
    reply = reply.replace(key, "[key]") if key else reply
    if not stated:
        return {"failure": "no verdict in the reply", "reply": reply}, False
    return {"reply": reply, "verdict": stated[-1] if stated[-1] in "AB" else "tie"}, True


def score(row: dict) -> float | None:
    """1 where the policy's answer won, 0.5 for a tie, 0 where it lost; None without a verdict."""
    if "verdict" not in row:
        return None
    wins = "A" if row["order"] == ORDERS[0] else "B"
    return {wins: 1.0, "tie": 0.5}.get(row["verdict"], 0.0)


def rows_of(verdicts: list[dict]) -> list[dict]:
    """Rows of the result table. Pairs that lack a verdict in one of the orders count as failed and as nothing else."""
    scores: dict[str, list[float | None]] = {}
    for verdict in verdicts:
        scores.setdefault(verdict["id"], []).append(score(verdict))
    pairs = [(one, other) for one, other in scores.values() if one is not None and other is not None]
    columns = {
        "judge_win_rate": ([(one + other) / 2 for one, other in pairs], True),
        "judge_ties": ([((one == 0.5) + (other == 0.5)) / 2 for one, other in pairs], None),
        "judge_disagreement": ([float(one != other) for one, other in pairs], False),
        "judge_failed": ([float(None in pair) for pair in scores.values()], False),
    }
    return [_row(metric, values, higher) for metric, (values, higher) in columns.items() if values]


def _row(metric: str, values: list[float], higher: bool | None) -> dict:
    value, stderr = mean_stderr(values)
    n = len(values)
    return {"task": "answers", "metric": metric, "value": value, "stderr": stderr, "n": n, "higher_is_better": higher}


def warnings(verdicts: list[dict]) -> Iterator[str]:
    """Warnings of the requests that failed, by their reason."""
    for reason, count in Counter(row["failure"] for row in verdicts if "failure" in row).items():
        warning = f"the judge gave no verdict on {count} of {len(verdicts)} requests: {reason}"
        say(f"warning: {warning}")
        yield warning
