"""The last lines of a run: which figures they show, in how many columns, and of which plan."""

import pytest

from posttrain.ground.files import sha256, write_json
from posttrain.reporting import summary

KINDS = ("biggest", "capital", "colour", "heaviest", "highest", "home", "opposite")
ANSWERS = ("gold_reward", "reward", "kl_to_sft", "length", "eos_rate", "distinct_1", "distinct_2", "distinct_answers")


def row(experiment, policy, judge, task, metric, value=0.5, stderr=0.01, member=False, group=False) -> dict:
    named = {"experiment": experiment, "seed": 0, "policy": policy, "judge": judge, "task": task, "metric": metric}
    return named | {"value": value, "stderr": stderr, "n": 100, "member": member, "group": group}


def questions(experiment: str, policy: str) -> list[dict]:
    """The questions of the default's world, and the policy's own answers."""
    rows = [row(experiment, policy, "evaluate", "world", "exact_match", 0.963, group=True)]
    rows += [row(experiment, policy, "evaluate", f"world_{kind}", "exact_match", member=True) for kind in KINDS]
    metrics = [*ANSWERS, *(["gold_gain", "win_rate"] if policy != "sft" else [])]
    return rows + [row(experiment, policy, "compare", "answers", metric, 1.5) for metric in metrics]


def long_texts(experiment: str, policy: str) -> list[dict]:
    """Pass words by length and depth, and perplexities by length."""
    rows = []
    for length in (64, 256):
        rows.append(row(experiment, policy, "evaluate", f"passkey_{length}", "exact_match", group=True))
        rows.append(row(experiment, policy, "evaluate", f"recall_{length}", "exact_match"))
        for depth in (0, 25, 50, 75, 100):
            task = f"passkey_{length}_depth_{depth}"
            rows.append(row(experiment, policy, "evaluate", task, "exact_match", member=True))
    texts = [f"{name}_{length}" for name in ("long_text", "near_text") for length in (64, 128, 256)]
    return rows + [row(experiment, policy, "lengths", task, "perplexity", 12.34, 0.5) for task in texts]


DEFAULT = [row for policy in ("base", "sft", "ppo", "dpo") for row in questions("tiny", policy)]
DEFAULT += [row for name in ("tiny-lora", "tiny-prefix", "tiny-prompt") for row in questions(name, "sft")[:8]]
DEFAULT += questions("tiny-dpo-beta-50", "dpo") + long_texts("tiny-long", "base") + long_texts("tiny-long", "longctx")


def test_the_default_campaign_fits_and_has_a_line_for_each_policy():
    head, metrics, *lines, end = summary.text(DEFAULT, []).splitlines()
    assert max(map(len, [head, metrics, *lines, end])) <= 100
    assert head.split() == ["experiment", "policy", "world", "passkey_256", "answers", "answers", "long_text_256"]
    assert metrics.split() == ["exact_match", "exact_match", "gold_reward", "win_rate", "perplexity"]
    assert [line.split()[:2] for line in lines] == [
        *(["tiny", policy] for policy in ("base", "sft", "ppo", "dpo")),
        *([name, "sft"] for name in ("tiny-lora", "tiny-prefix", "tiny-prompt")),
        ["tiny-dpo-beta-50", "dpo"], ["tiny-long", "base"], ["tiny-long", "longctx"],
    ]  # fmt: skip
    assert lines[1].split()[2:] == ["0.963", "±0.010", "1.500", "±0.010"]
    shown = sum(line.count("±") for line in lines)
    assert end == f"Value ± standard error. {len(DEFAULT) - shown} more figures are in the report."


def test_long_texts_are_shown_at_the_greatest_length():
    rows = long_texts("tiny-long", "base") + long_texts("tiny-long-yarn-untuned", "longctx")
    head = summary.text(rows, []).splitlines()[0]
    assert head.split()[2:] == ["passkey_256", "recall_256", "long_text_256", "near_text_256"]


def test_a_task_shows_its_first_metric_and_answers_the_learned_reward_where_there_is_no_other():
    rows = [row("a", "sft", "evaluate", "choices", metric) for metric in ("acc", "acc_norm")]
    rows += [row("a", "sft", "compare", "answers", metric) for metric in ("reward", "length", "win_rate")]
    assert summary.text(rows, []).splitlines()[1].split() == ["acc", "reward", "win_rate"]


def test_what_finds_no_room_is_left_out_whole():
    rows = [row("a", "sft", "evaluate", f"task_{letter * 20}", "acc") for letter in "abcdefgh"]
    lines = summary.text(rows, []).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[2:] == [f"task_{letter * 20}" for letter in "abc"], "no name is cut"
    assert lines[-1].endswith("5 more figures are in the report.")


def test_long_names_stand_on_lines_of_their_own():
    name = "an-experiment@dpo.beta=0.1,dpo.learning_rate=0.0005,seed=1"
    rows = [row(name, policy, "evaluate", "world", "acc", 0.5, None) for policy in ("sft", "dpo")]
    rows.append(row("short", "sft", "evaluate", "world", "acc", float("nan"), None))
    assert summary.text(rows, []).splitlines() == [
        "policy  world", "          acc", name, "  sft   0.500", "  dpo   0.500", "short", "  sft     nan",
        "Value ± standard error.",
    ]  # fmt: skip


def test_a_partial_report_says_so():
    pieces = [{"name": f"results/a/stage-{number}"} for number in range(7)]
    lines = summary.text([row("a", "sft", "evaluate", "world", "acc")], pieces).splitlines()
    assert "PARTIAL: 7 missing:" in lines and lines[-1] == "  and 2 more"
    assert summary.text([], pieces[:1]) == "Nothing was measured.\nPARTIAL: 1 missing:\n  results/a/stage-0\n"
    assert "PARTIAL" not in summary.text([], []), "control"


@pytest.fixture
def report(tmp_path):
    """A report of one evaluation, made for the campaign `c.json` with the lineage `l`."""
    evaluation = tmp_path / "manifest.json"
    evaluation.write_text("{}")
    (tmp_path / "report").mkdir()
    (tmp_path / "report/summary.txt").write_text("")
    record = {"stage": "report", "params": ["c.json", "code", "l"]}
    read = {"evaluations": {str(evaluation): sha256(evaluation)}}
    write_json(tmp_path / "report/provenance.json", record | {"inputs": read})
    return tmp_path / "report"


def test_only_the_report_of_the_plan_is_shown(report):
    assert summary.outdated(report, "c.json", "l") == "", "control"
    assert "another campaign's" in summary.outdated(report, "other.json", "l")
    assert "settings or the code have changed" in summary.outdated(report, "c.json", "other")
    (report.parent / "manifest.json").write_text("{} ")
    assert f"made from another {report.parent}/manifest.json" in summary.outdated(report, "c.json", "l")
    (report / "provenance.json").unlink()
    assert summary.outdated(report, "c.json", "l")
    (report / "summary.txt").unlink()
    assert "there is no report" in summary.outdated(report, "c.json", "l")


def test_a_run_that_made_no_report_ends_with_what_it_made(report):
    def lines(made, campaign="c.json"):
        return summary.last_lines_of_run(made, report, campaign, "l").splitlines()

    assert lines(["a/sft", "report"]) == [f"report: {report}/index.html"], "control: its own report"
    assert lines(["a/sft"]) == ["made: a/sft", f"{report}: is older than this run; run snakemake without a target"]
    assert lines([])[0] == "nothing was made", "snakemake --touch"
    first, second = lines([f"a/{number}" for number in range(7)], campaign="other.json")
    assert first == "made: a/0, a/1, a/2, a/3, a/4 and 2 more" and "is another campaign's" in second
