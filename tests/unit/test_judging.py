"""A judge behind an endpoint of the test's own: both orders, ties, failures, resuming, its key."""

import json

import numpy as np
import pytest
from judge_server import longer, served

from posttrain.dag import campaign
from posttrain.evaluation import judging
from posttrain.ground.errors import UserError
from posttrain.ground.files import write_jsonl
from posttrain.rl.prompts import given_replies

ANSWERS = [{"id": str(n), "prompt": "Say {second}", "reply": "long " * (n + 1)} for n in range(6)]
OTHERS = {str(n): "long " * 3 for n in range(6)}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def ruled(judge, record):
    verdicts = judging.judged(judge, judging.requests(judge, ANSWERS, OTHERS), record)
    return verdicts, {row["metric"]: row for row in judging.rows_of(verdicts)}


def test_the_longer_answer_wins(tmp_path):
    """Two answers are shorter than the other, one is as long, three are longer."""
    with served(longer) as (judge, got):
        judging.refuse_unreachable(judge)
        verdicts, rows = ruled(judge, tmp_path / "verdicts.jsonl")
    assert rows["judge_win_rate"]["value"] == pytest.approx(3.5 / 6) and rows["judge_win_rate"]["n"] == 6
    assert rows["judge_win_rate"]["stderr"] == pytest.approx(np.std([0, 0, 0.5, 1, 1, 1], ddof=1) / 6**0.5)
    assert rows["judge_disagreement"]["value"] == 0 and rows["judge_ties"]["value"] == pytest.approx(1 / 6)
    assert rows["judge_failed"]["value"] == 0
    assert {(one["path"], one["model"], one["key"]) for one in got} == {("/v1/chat/completions", "a judge", None)}
    assert got[0]["text"] == f"Say {{second}}|long |{OTHERS['0']}", "a field's name in a prompt is not filled in"
    assert verdicts[1]["request"] == f"Say {{second}}|{OTHERS['0']}|long " and "at once" in verdicts[0]["reply"]


def test_a_judge_that_prefers_the_first_answer_shows_in_the_disagreement(tmp_path):
    with served(lambda first, second: "Preferred: A") as (judge, _):
        _, rows = ruled(judge, tmp_path / "verdicts.jsonl")
    assert rows["judge_win_rate"]["value"] == 0.5 and rows["judge_disagreement"]["value"] == 1.0


def test_failures_are_counted_and_are_no_wins(tmp_path, capsys):
    with served(longer, status=lambda count: 503 if count <= 3 else 200) as (judge, got):
        verdicts, rows = ruled(judge, tmp_path / "verdicts.jsonl")
    assert len(got) == 14 and verdicts[0]["failure"] == "HTTP status 503" and "verdict" not in verdicts[0]
    assert rows["judge_failed"]["value"] == pytest.approx(1 / 6) and rows["judge_win_rate"]["n"] == 5
    assert list(judging.warnings(verdicts)) == ["the judge gave no verdict on 1 of 12 requests: HTTP status 503"]
    with served(lambda first, second: "I cannot say.") as (judge, got):
        verdicts, rows = ruled(judge, tmp_path / "others.jsonl")
    assert len(got) == judging.PATIENCE * judge.attempts and set(rows) == {"judge_failed"}
    assert {row["failure"] for row in verdicts} == {"no verdict in the reply", "not asked after 5 failures in a row"}
    with served(longer, status=401) as (judge, got):
        ruled(judge, tmp_path / "third.jsonl")
    assert len(got) == judging.PATIENCE, "what another attempt cannot mend is tried once"


def test_verdicts_are_not_asked_for_again(tmp_path):
    record = tmp_path / "checkpoints" / "verdicts.jsonl"
    with served(longer) as (judge, got):
        whole, _ = ruled(judge, record)
        torn = record.read_text().splitlines()
        record.write_text("\n".join(torn[:8]) + "\n" + torn[9][:20])
        again, _ = ruled(judge, record)
        given = len([line for line in torn[:8] if line])
        assert again == whole and given == 4 and len(got) == 24 - given, "a torn line is no verdict"
        last, _ = ruled(judge, record)
        assert last == whole and len(got) == 24 - given
        changed = [{**ANSWERS[0], "reply": "another"}]
        judging.judged(judge, judging.requests(judge, changed, OTHERS), record)
        assert len(got) == 26 - given, "another answer is asked for"


def test_the_key_is_sent_and_written_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-secret")
    with served(lambda *pair: "you sent sk-secret. Better: tie", key_variable="JUDGE_API_KEY") as (judge, got):
        verdicts, rows = ruled(judge, tmp_path / "verdicts.jsonl")
    assert got[0]["key"] == "Bearer sk-secret" and rows["judge_ties"]["value"] == 1
    written = json.dumps(verdicts) + (tmp_path / "verdicts.jsonl").read_text() + "".join(capsys.readouterr())
    assert "sk-secret" not in written and "you sent [key]" in written
    monkeypatch.delenv("JUDGE_API_KEY")
    with pytest.raises(UserError, match=r"compare.judge.key_variable: JUDGE_API_KEY is not set"):
        judging.key_of(judge)


def test_an_endpoint_where_nothing_answers_is_refused():
    with served(longer) as (judge, _):
        pass
    with pytest.raises(UserError, match=r"compare.judge.url: nothing answers at .*needs a network"):
        judging.refuse_unreachable(judge)


def test_given_replies(tmp_path):
    pair = {
        "id": "a",
        "prompt": [{"role": "user", "content": "?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
    }
    write_jsonl(tmp_path / "data/preference/test.jsonl", [pair | {"rejected": []}])
    sft = [{"id": "b", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "no"}]}]
    write_jsonl(tmp_path / "data/sft/test.jsonl", sft)
    assert given_replies(tmp_path / "manifest.json") == {"a": "yes"}
    (tmp_path / "data/preference/test.jsonl").unlink()
    assert given_replies(tmp_path / "manifest.json") == {"b": "no"}


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("url: 'ftp://a/v1', model: a", "compare.judge.url: found .*an address http"),
        ("url: 'https://user" + ":word@a/v1', model: a", "compare.judge.url: found .*without user or query"),
        ("url: 'https://a/v1?key=3', model: a", "compare.judge.url: found .*without user or query"),
        (
            "url: 'http://a/v1', model: a, key_variable: JUDGE_API_KEY",
            "judge.url: would carry the key unencrypted",
        ),
        ("url: 'https://a/v1', model: a, key_variable: sk-secret", "compare.judge.key_variable: found .*_API_KEY"),
        ("url: 'https://a/v1', model: a, prompt: '{prompt} {first}'", "compare.judge.prompt: lacks {second}"),
    ],
)
def test_what_cannot_be_asked_is_refused(here, judge, said):
    (here / "config/experiments").mkdir(parents=True)
    (here / "config/config.yaml").write_text("experiments: [one]\n")
    text = "question: Why?\nbase: {scratch: {}}\nprepare: {world: {}}\nsft: {}\ndpo: {}\ncompare: {judge: {%s}}\n"
    (here / "config/experiments/one.yaml").write_text(text % judge)
    with pytest.raises(UserError, match=said):
        campaign.load("config/config.yaml")
    (here / "config/experiments/one.yaml").write_text(
        text % "url: 'http://localhost:80/v1', model: a, key_variable: A_TOKEN"
    )
    campaign.load("config/config.yaml")
