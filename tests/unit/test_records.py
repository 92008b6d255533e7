"""reporting: statistics against closed forms, numbers and text made safe, tables, the last lines of a run."""

import json
import math
import statistics

import pytest

from posttrain.maths import intervals
from posttrain.reporting import records, tables, text


def test_standard_error_of_a_proportion_is_lm_evals():
    values = [1] * 30 + [0] * 70
    mean, stderr = intervals.mean_stderr(values)
    assert mean == 0.3
    assert stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert intervals.mean_stderr([1]) == (1, None)


def test_standard_error_agrees_with_lm_eval():
    from lm_eval.api.metrics import mean_stderr

    assert intervals.mean_stderr([1, 0, 0, 1, 1])[1] == pytest.approx(mean_stderr([1, 0, 0, 1, 1]))


def test_mean_and_deviation_over_seeds():
    assert intervals.over_seeds([1, 2, 3]) == (2, pytest.approx(statistics.stdev([1, 2, 3])))
    assert intervals.over_seeds([2]) == (2, None)


def test_what_is_not_finite_survives_statistics():
    assert intervals.over_seeds([math.inf])[0] == math.inf
    assert math.isnan(intervals.over_seeds([math.inf, -math.inf, 1])[0])
    assert intervals.mean_stderr([1e200, -1e200])[1] == math.inf


def test_hidden_characters_become_visible():
    assert text.visible("a\x1b\u202eb\u200b\ud800\ufffe") == "a⟨U+001B⟩⟨U+202E⟩b⟨U+200B⟩⟨U+D800⟩⟨U+FFFE⟩"
    assert text.visible("a\nb\tc", keep="\n") == "a\nb⟨U+0009⟩c"
    plain = "naïve 你好 العربية 😀 a\u00a0b $x$ <b>"
    assert text.visible(plain) == plain


def test_clean_reaches_keys_and_lists():
    assert text.clean({"a\x00": ["b\x00", 1, None, 2.5]}) == {"a⟨U+0000⟩": ["b⟨U+0000⟩", 1, None, 2.5]}


def test_number_takes_numbers_only():
    assert text.number(3, "x") == 3
    assert math.isnan(text.number(math.nan, "x"))
    assert text.number(10**400, "x") == math.inf
    for wrong in (True, "3", None, [1]):
        with pytest.raises(ValueError, match="x is not a number"):
            text.number(wrong, "x")


@pytest.mark.parametrize("value, shown", [
    (0.9123, "0.912"), (12.34, "12.3"), (1234, "1,234"), (2e-5, "2.0e-05"), (0.0, "0.000"), (None, ""),
    (math.nan, "nan"), (-math.inf, "-inf"), (True, "True"), ("a\x00", "a⟨U+0000⟩"),
])  # fmt: skip
def test_short(value, shown):
    assert text.short(value) == shown


def test_markdown_cells_stay_cells():
    row = dict.fromkeys(tables.COLUMNS, "x") | {"task": "a|b<i>", "value": 0.5, "stderr": None, "n": 10}
    line = tables.table_md([row]).splitlines()[2]
    assert line == "| x | x | x | a\\|b&lt;i> | x | 0.500 |  | 10 | x |"


def test_csv_keeps_every_digit_and_quotes():
    row = dict.fromkeys(tables.COLUMNS, "x") | {"task": 'a,"b"', "value": 0.1 + 0.2, "stderr": None}
    assert tables.table_csv([row]).splitlines()[1] == 'x,x,x,"a,""b""",x,0.30000000000000004,,x,x'


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"no metrics\.json"):
        records.read_json(tmp_path / "metrics.json")
    for content in ("[1]", "{", "[" * 100_000):
        (tmp_path / "metrics.json").write_text(content)
        with pytest.raises(ValueError, match=r"metrics\.json cannot be read"):
            records.read_json(tmp_path / "metrics.json")
    (tmp_path / "metrics.json").write_text(json.dumps({"a": 1}))
    assert records.read_json(tmp_path / "metrics.json") == {"a": 1}


def test_every_artifact_once_with_owner_and_users(tmp_path):
    stages = {"prepare": "results/a/prepare", "sft": "results/a/sft", "evaluate/sft": "results/a/evaluate/sft"}
    campaign = {"experiments": [{"name": n, "seed": s, "stages": stages} for n, s in (("b", 5), ("a", 3))]}
    found = {entry["name"]: entry for entry in records.list_artifacts(campaign, tmp_path)}
    assert list(found) == ["results/a/prepare", "results/a/sft", "results/a/evaluate/sft"]
    sft = found["results/a/evaluate/sft"]
    assert (sft["experiment"], sft["seed"], sft["users"]) == ("a", 3, ["b", "a"])
    assert sft["policy"] == "results/a/sft" and sft["path"] == tmp_path / "a/evaluate/sft"


def test_figures_that_several_seeds_have():
    row = {"family": "a|b", "policy": "sft", "task": "t", "metric": "m"}
    table = [row | {"value": value} for value in (1.0, 2.0, 3.0)] + [row | {"task": "alone", "value": 5.0}]
    (found,) = tables.seeds(table)
    named = {"experiment": "a|b", "policy": "sft", "task": "t", "metric": "m"}
    assert found == named | {"mean": 2.0, "deviation": pytest.approx(1.0), "seeds": 3}
    lines = tables.seeds_md(table)
    assert "| a\\|b | sft | t | m | 2.000 | 1.000 | 3 |" in lines and "alone" not in lines
    assert tables.seeds_md(table[-1:]) == ""


def test_metrics_for_programs_and_a_column_for_every_curve():
    same = {"experiment": "e", "policy": "sft", "task": "t"}
    table = [same | {"metric": "m", "value": 0.5}, same | {"metric": "x", "value": math.nan}]
    assert json.loads(tables.metrics_json(table)) == {"e": {"sft": {"t": {"m": 0.5, "x": None}}}}
    curves = [
        {"name": "results/a/sft", "history": [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0}]},
        {"name": "results/b/sft", "history": [{"step": 2, "loss": 3.0}]},
        {"name": "results/b/prepare"},
    ]
    assert tables.curves_csv(curves) == "step,a/sft,b/sft\n1,2.0,\n2,,3.0\n"
