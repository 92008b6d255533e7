"""report: from records on disk to table, figures and page; with pieces missing, broken or hostile."""

import csv
import hashlib
import html
import html.parser
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from posttrain.__main__ import main
from posttrain.reporting.tables import COLUMNS
from posttrain.stages.report import report

TASKS = ("copy", "reverse")
SCRIPT, IMAGE = "<script>alert(1)</script>", "</svg><img src=x onerror=alert(1)>"


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def artifact(results: Path, name: str, metrics: dict) -> None:
    """An artifact as the stages leave it: metrics, provenance, manifest."""
    folder = results / name
    write(folder / "metrics.json", metrics)
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "peft": "0.21.2"}
    made = {"started": "2026-11-23T14:54:10+00:00", "seconds": 41.2, "peak_memory_mb": 1630, "host": "node7"}
    commit = {"git_commit": "0c4d6a4a4d1bb7e4c1f7f0c9e2a5b6d7e8f90123", "command": ["posttrain", "sft"]}
    write(folder / "provenance.json", made | commit | {"shape": {"versions": versions}})
    digest = hashlib.sha256((folder / "metrics.json").read_bytes()).hexdigest()
    write(folder / "manifest.json", {"files": {"metrics.json": {"sha256": digest, "size": 1}}})


def training(rng: random.Random, start: float, end: float) -> dict:
    """A loss curve and a summary."""
    history = []
    for step in range(10, 301, 10):
        loss = end + (start - end) * 0.985**step + rng.gauss(0, 0.04)
        history.append({"step": step, "loss": loss, "learning_rate": 1e-3})
        if step % 100 == 0:
            history[-1]["eval_loss"] = loss + 0.05
    summary = {"train_loss": end, "trainable_parameters": 172032, "learning_rate": 2e-5}
    return {"summary": summary, "history": history, "tokens": {"trained": 18432, "prompt": 50211}}


def evaluation(results: Path, name: str, accuracy: float, answer: str = "blue") -> None:
    """An evaluation: rows of the tasks and their group, lm-eval's file, its samples."""
    rng, rows = random.Random(name), []
    for task in TASKS:
        value = min(1, max(0, rng.gauss(accuracy, 0.04)))
        stderr = (value * (1 - value) / 199) ** 0.5
        row = {"task": task, "metric": "exact_match", "higher_is_better": True}
        rows.append(row | {"value": value, "stderr": stderr, "n": 200})
        for n in range(8):
            right = rng.random() < value
            given = "red" if right else answer
            sample = {"doc_id": n, "target": "red", "arguments": [[f"<user> {task} {n} <end>", {}]]}
            sample |= {"resps": [[given]], "filtered_resps": [given], "exact_match": float(right)}
            file = results / name / "data" / "samples" / f"{task}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as lines:
                lines.write(json.dumps(sample) + "\n")
    mean = sum(row["value"] for row in rows) / len(rows)
    rows.append(rows[0] | {"task": "world", "value": mean, "stderr": 0.01, "n": 400})
    write(results / name / "lm_eval.json", {"groups": {"world": {}}, "group_subtasks": {"world": TASKS}})
    artifact(results, name, {"policy": name.rpartition("/")[2], "rows": rows})


CARD = {
    "sources": [
        {"name": "world", "task": "sft", "total": 6400, "kept": 6371,
         "dropped": {"duplicate": 29}, "warnings": {}},
        {"name": "../data/hh.jsonl.gz", "task": "pairs", "total": 2000, "kept": 1961,
         "dropped": {"empty answer": 31, "chosen equals rejected": 8}, "warnings": {"CRLF line ends": 12},
         "licence": "MIT", "origin": "org/hh at 0123", "languages": "en"},
    ],
    "splits": {"sft": {"train": 5734, "test": 637}},
    "tokens": {"sft": {"min": 6, "median": 14, "p95": 27, "max": 44, "truncated": 0,
                       "histogram": [[8, 900], [12, 2700], [16, 2100], [24, 671], [32, 0], [48, 1]]}},
}  # fmt: skip
METHODS = {"tiny": 0.94, "tiny-lora": 0.93, "tiny-full": 0.96, "tiny-prefix": 0.52}
ROWS = len(TASKS) + 1


@pytest.fixture
def campaign(tmp_path) -> dict:
    """Five experiments that share data and base, each with its own tuning."""
    results = tmp_path / "results"
    artifact(results, "tiny/prepare", CARD)
    artifact(results, "tiny/base", training(random.Random(1), 5.4, 1.3))
    evaluation(results, "tiny/evaluate/base", 0.02)
    experiments = []
    for name, accuracy in METHODS.items():
        artifact(results, f"{name}/sft", training(random.Random(name), 2.2, 1.6 - accuracy))
        evaluation(results, f"{name}/evaluate/sft", accuracy)
        shared = {part: f"results/tiny/{part}" for part in ("prepare", "base", "evaluate/base")}
        question = f"How far does {name.removeprefix('tiny-')} tuning come with the same data and steps?"
        own = {part: f"results/{name}/{part}" for part in ("sft", "evaluate/sft")}
        experiments.append({"name": name, "question": question, "seed": 0, "stages": shared | own})
    return {"title": "The embedded world: what each way of tuning learns", "experiments": experiments}


@pytest.fixture
def made(campaign, tmp_path):
    """Make the report; returns (what is missing, its folder)."""
    output = tmp_path / "report"
    return lambda **more: (report(campaign, output, tmp_path / "results", **more), output)


@pytest.fixture
def undrawn(monkeypatch):
    """No figures: for tests of everything else, which matplotlib would make slow."""
    monkeypatch.setattr("posttrain.reporting.figures.draw", lambda record: [])


def test_what_every_attempt_cost_is_in_the_page(made, tmp_path, undrawn):
    """Those that gave nothing too, with the reason; an artifact without an account counts by its provenance."""
    folder = tmp_path / "results/compute/tiny-lora/sft"
    spent = {"stage": "sft", "identity": "a1", "seconds": 5400, "cpu_seconds": 5400, "gpus": 2, "gpu": IMAGE}
    write(folder / "1.json", spent | {"outcome": "failed", "reason": SCRIPT})
    write(folder / "2.json", spent | {"outcome": None, "identity": None, "seconds": 600})
    write(tmp_path / "results/compute/other/sft/3.json", spent | {"outcome": "done"})
    _, output = made()
    page = (output / "index.html").read_text()
    section = page[page.index('<h2 id="compute">') : page.index('<h2 id="provenance">')]
    assert html.escape(SCRIPT) in section and SCRIPT not in page and IMAGE not in page
    shown = Tags(section).text
    assert "≥ 1.7" in shown and "Of 1 no end is on record" in shown and "Not of this campaign" in shown
    sums = json.loads((output / "compute.json").read_text())
    assert sums["stages"]["sft"]["attempts"] == 1 + len(METHODS) and sums["stages"]["sft"]["failed"] == 1
    assert sums["total"]["gpu_hours"] == pytest.approx(2 * 6000 / 3600)
    assert sums["total"]["hours_without_result"] == pytest.approx(6000 / 3600)
    assert sums["by_provenance"] == 2 + len(METHODS) * 2 and sums["other"]["attempts"] == 1
    assert sums["unknown_gpus"] == [IMAGE]


def test_every_number_links_to_its_artifact_and_names_the_command_that_explains_it(
    campaign, made, tmp_path, undrawn, monkeypatch, capsys
):
    """Of tasks, their group, answers and lengths; names with quotes and spaces too. Each of these commands works."""
    results, stages = tmp_path / "results", campaign["experiments"][0]["stages"]
    for judge, rows in (
        ("compare", [("answers", "gold_reward", None), ("answers", "kl_to_sft", 0.1)]),
        ("lengths", [("long_text_64", "perplexity", 0.1), ("it's \u202e", "perplexity", 0.1)]),
    ):
        values = [{"task": task, "metric": name, "value": 1.25, "stderr": error, "n": 3} for task, name, error in rows]
        artifact(results, f"tiny/{judge}/sft", {"policy": "sft", "rows": values})
        stages[f"{judge}/sft"] = f"results/tiny/{judge}/sft"
    missing, output = made()
    assert missing == []
    tags = Tags((output / "index.html").read_text())
    commands = [shlex.split(value) for name, value in tags.attributes if name == "title" and "explain" in value]
    monkeypatch.chdir(tmp_path)
    explained = {tuple(words[2:]) for words in commands if len(words) == 4}
    assert len(explained) == (len(METHODS) + 1) * ROWS + 4, "each cell of the table"
    for words in commands:
        assert words[0] == "posttrain" and main(words[1:]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"{words[2]}: {' '.join(words[3:])}") or len(words) == 3
    anchors, links = ({v for name, v in tags.attributes if name == of} for of in ("id", "href"))
    assert {link.removeprefix("#") for link in links} <= anchors
    assert main(["explain", "tiny/compare/sft", "answers no_metric"]) == 2, "control"
    assert main(["explain", "tiny/compare/nobody"]) == 2, "control"


def table(output: Path) -> list[dict]:
    with (output / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Tags(html.parser.HTMLParser):
    """Every element and attribute of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_complete_report_has_all_its_parts(made):
    missing, output = made()
    assert missing == []
    known = json.loads((output / "manifest.json").read_text())["files"]
    written = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()} - {"manifest.json"}
    figures = {"figures/benchmark-exact_match.svg", "figures/lengths.svg", "figures/training-curves.svg"}
    assert set(known) == written == figures | {
        "index.html", "table.csv", "table.md", "summary.txt", "metrics.json", "curves.csv", "verdict.json",
        "compute.json",
    }  # fmt: skip
    for name, entry in known.items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == entry["sha256"]
    page = (output / "index.html").read_text()
    assert "PARTIAL" not in page
    assert "± 1 standard error over n = 200 to 400 questions; one seed" in page


def test_table_has_exactly_the_columns_and_each_policy_once(undrawn, made, tmp_path):
    _, output = made()
    rows = table(output)
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == (1 + len(METHODS)) * ROWS
    assert {row["experiment"] for row in rows if row["policy"] == "base"} == {"tiny"}
    digest = hashlib.sha256((tmp_path / "results/tiny-lora/sft/manifest.json").read_bytes()).hexdigest()
    lora = next(row for row in rows if row["experiment"] == "tiny-lora")
    assert lora["artifact"] == f"results/tiny-lora/sft@{digest[:12]}"
    assert lora["task"] == "world", "the group's own row comes first"
    source = json.loads((tmp_path / "results/tiny-lora/evaluate/sft/metrics.json").read_text())["rows"][0]
    copy = next(row for row in rows if row["experiment"] == "tiny-lora" and row["task"] == source["task"])
    assert float(copy["value"]) == source["value"], "every digit is kept"
    assert (output / "table.md").read_text().splitlines()[0] == f"| {' | '.join(COLUMNS)} |"
    page = Tags((output / "index.html").read_text()).text
    assert "used by tiny, tiny-lora, tiny-full, tiny-prefix" in page
    assert "Uses base of tiny." in page


def test_a_policy_counts_once_however_many_judges_it_has(undrawn, campaign, made, tmp_path):
    assert f"of {1 + len(METHODS)} policies" in (made()[1] / "index.html").read_text(), "control"
    rows = [{"task": "long_text_64", "metric": "perplexity", "value": 3.0, "stderr": 0.1, "n": 64}]
    artifact(tmp_path / "results", "tiny/lengths/base", {"rows": rows})
    campaign["experiments"][0]["stages"]["lengths/base"] = "results/tiny/lengths/base"
    assert f"of {1 + len(METHODS)} policies" in (made()[1] / "index.html").read_text()


def test_same_records_same_bytes(made):
    _, output = made()
    first = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    made()
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == first


def test_another_number_gives_other_bytes(made, tmp_path):
    _, output = made()
    before = (output / "figures/benchmark-exact_match.svg").read_bytes()
    evaluation(tmp_path / "results", "tiny-lora/evaluate/sft", 0.3)
    made()
    assert (output / "figures/benchmark-exact_match.svg").read_bytes() != before


def test_missing_pieces_are_named_and_the_rest_is_shown(undrawn, made, tmp_path):
    results = tmp_path / "results"
    made()
    (results / "tiny-lora/sft/manifest.json").unlink()
    (results / "logs/tiny-lora").mkdir(parents=True)
    (results / "logs/tiny-lora/sft.log").write_text("step 1\rstep 2\n\x1b[31mUserError: loss is nan\x1b[0m\n")
    (results / "tiny-full/evaluate/sft/metrics.json").write_text('{"rows": [')
    (results / "tiny/evaluate/sft/data/samples/copy.jsonl").write_text("{}\n")
    missing, output = made(reasons={"results/tiny-prefix/evaluate/sft": "killed: out of memory"})
    said = {piece["name"]: piece["reason"] for piece in missing}
    assert said == {
        "results/tiny-lora/sft": "not made: it has no manifest.json",
        "results/tiny-lora/evaluate/sft": "waits for results/tiny-lora/sft, which is missing",
        "results/tiny-full/evaluate/sft": said["results/tiny-full/evaluate/sft"],
        "results/tiny-prefix/evaluate/sft": "killed: out of memory",
        "results/tiny/evaluate/sft/data/samples/copy.jsonl": "'arguments' is missing from its records",
    }
    assert "metrics.json cannot be read" in said["results/tiny-full/evaluate/sft"]
    assert not (output / "manifest.json").exists()
    assert {row["experiment"] for row in table(output)} == {"tiny"}
    text = Tags((output / "index.html").read_text()).text
    assert "PARTIAL: this is not the whole campaign." in text
    assert "step 1\nstep 2\nUserError: loss is nan" in text
    assert "**PARTIAL**, missing: results/tiny-lora/sft" in (output / "table.md").read_text()


def test_nothing_at_all_is_still_a_page(made, tmp_path):
    shutil.rmtree(tmp_path / "results")
    missing, output = made()
    assert len(missing) == 2 + 2 * len(METHODS) + 1
    assert table(output) == []
    assert "Nothing was measured yet." in (output / "index.html").read_text()
    assert list((output / "figures").iterdir()) == []


@pytest.mark.parametrize("content", [
    "[]", "{", "[" * 100_000, '{"rows": 3}', '{"rows": [{"task": "a"}]}', '{"rows": [3]}', "\udcff",
    '{"rows": [{"task": "a", "metric": "m", "value": "1", "n": 2}]}',
])  # fmt: skip
def test_malformed_metrics_are_a_missing_piece(undrawn, made, tmp_path, content):
    folder = tmp_path / "results/tiny-lora/evaluate/sft"
    (folder / "metrics.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    write(folder / "manifest.json", {"files": {}})
    missing, output = made()
    assert [piece["name"] for piece in missing] == ["results/tiny-lora/evaluate/sft"]
    assert missing[0]["reason"]
    assert len(table(output)) == len(METHODS) * ROWS


def test_metrics_that_differ_from_the_manifest_are_refused(undrawn, made, tmp_path):
    file = tmp_path / "results/tiny-lora/evaluate/sft/metrics.json"
    file.write_text(file.read_text().replace("0.9", "1.0"))
    missing, _ = made()
    assert [piece["reason"] for piece in missing] == ["metrics.json: its bytes differ from its manifest"]


def test_text_from_models_and_data_is_inert(campaign, made, tmp_path):
    results, evil = tmp_path / "results", SCRIPT + IMAGE + "\x00\u202eexe.\ud800"
    campaign["title"] = campaign["experiments"][1]["question"] = evil
    campaign["experiments"][1]["paper"] = dict.fromkeys(("title", "id", "table", "variant"), evil) | {
        "deviations": {evil: evil}
    }
    shutil.rmtree(results / "tiny-lora/evaluate/sft")
    evaluation(results, "tiny-lora/evaluate/sft", 0.1, evil)
    metrics = json.loads((results / "tiny-lora/evaluate/sft/metrics.json").read_text())
    metrics["rows"].append(metrics["rows"][0] | {"task": evil, "value": 0.5})
    metrics["rows"].append({"task": "$\\x$", "metric": evil, "value": 1})
    artifact(results, "tiny-lora/evaluate/sft", metrics)
    card = CARD | {
        "sources": [CARD["sources"][0] | {"name": evil, "dropped": {evil: 1}, "licence": evil, "origin": evil}]
    }
    artifact(results, "tiny/prepare", card)
    (results / "tiny-full/sft/manifest.json").unlink()
    (results / "logs/tiny-full").mkdir(parents=True)
    (results / "logs/tiny-full/sft.log").write_text(SCRIPT + IMAGE + "\n")
    missing, output = made()
    assert {piece["name"] for piece in missing} == {"results/tiny-full/sft", "results/tiny-full/evaluate/sft"}
    page = Tags((output / "index.html").read_text(encoding="utf-8"))
    assert page.text.count(SCRIPT) >= 14, "it is shown as text: title, question, paper, card, answers, log, figure"
    assert "⟨U+0000⟩⟨U+202E⟩exe.⟨U+D800⟩" in page.text
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "image"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = {value for name, value in page.attributes if name in ("href", "xlink:href", "src")}
    assert all(link.startswith("#") for link in links)
    for figure in (output / "figures").glob("*.svg"):
        elements = {e.tag.rpartition("}")[2] for e in xml.etree.ElementTree.parse(figure).iter()}
        assert not {"script", "img", "image", "foreignObject"} & elements
    assert "<" not in (output / "table.md").read_text()


def test_the_inertness_check_sees_a_live_script():
    page = Tags(f"<p>{SCRIPT}{IMAGE}</p>")
    assert "script" in page.tags and "img" in page.tags and ("onerror", "alert(1)") in page.attributes


def test_page_forbids_everything_but_its_own_style(undrawn, made):
    _, output = made()
    page = (output / "index.html").read_text()
    policies = [value for _, value in Tags(page).attributes if value and value.startswith("default-src")]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:; ")
    assert "url(http" not in page and "@import" not in page and 'href="http' not in page


def test_what_is_not_finite_is_said_and_drawn_around(made, tmp_path):
    results = tmp_path / "results"
    curve = training(random.Random(3), 2, 1)
    curve["history"][5]["loss"] = float("nan")
    curve["summary"]["train_loss"] = float("inf")
    artifact(results, "tiny-lora/sft", curve)
    rows = [{"task": "copy", "metric": "exact_match", "value": float("nan"), "stderr": None, "n": None}]
    artifact(results, "tiny-lora/evaluate/sft", {"rows": rows})
    missing, output = made()
    assert missing == []
    assert [row["value"] for row in table(output) if row["experiment"] == "tiny-lora"] == ["nan"]
    page = (output / "index.html").read_text()
    assert re.search(r'badge bad" href="#results/tiny-lora/evaluate/sft" title="[^"]*">nan</a>', page)
    assert any(">nan</text>" in figure.read_text() for figure in (output / "figures").glob("benchmark-*.svg"))


def test_seeds_of_one_experiment_become_one_bar(campaign, made, tmp_path):
    results = tmp_path / "results"
    for seed in (1, 2):
        name = f"tiny-lora-s{seed}"
        artifact(results, f"{name}/sft", training(random.Random(seed), 2.2, 0.6))
        evaluation(results, f"{name}/evaluate/sft", 0.9)
        own = {part: f"results/{name}/{part}" for part in ("sft", "evaluate/sft")}
        stages = campaign["experiments"][1]["stages"] | own
        entry = {"name": name, "family": "tiny-lora", "question": "", "seed": seed, "stages": stages}
        campaign["experiments"].append(entry)
    missing, output = made()
    assert missing == []
    page = (output / "index.html").read_text()
    assert "and ± 1 standard deviation over 3 seeds" in page and "<h3>Over seeds</h3>" in page
    folders = ("tiny-lora", "tiny-lora-s1", "tiny-lora-s2")
    title = "; ".join(f"posttrain explain {name}/evaluate/sft 'copy exact_match'" for name in folders)
    assert ("title", title) in Tags(page).attributes, "the mean names the command of each"
    assert "Over seeds:" in (output / "table.md").read_text()
    assert {row["seed"] for row in table(output)} == {"0", "1", "2"}


def test_an_owner_outside_the_campaign_is_named(undrawn, campaign, made):
    del campaign["experiments"][0]
    missing, output = made()
    assert missing == []
    assert "Not listed in this campaign" in (output / "index.html").read_text()
    assert "tiny" in {row["experiment"] for row in table(output)}


def test_an_artifact_without_provenance_is_shown(undrawn, made, tmp_path):
    """A clone with pulled artifacts may lack it."""
    assert "node7" in (made()[1] / "index.html").read_text(), "control"
    for file in (tmp_path / "results").rglob("provenance.json"):
        file.unlink()
    missing, output = made()
    page = (output / "index.html").read_text()
    assert missing == [] and "results/tiny-lora/sft@" in page and "node7" not in page


def test_an_experiment_may_have_its_own_evaluation_of_a_shared_policy(undrawn, campaign, made, tmp_path):
    evaluation(tmp_path / "results", "tiny-lora/evaluate/base", 0.05)
    own = {f"evaluate/{policy}": f"results/tiny-lora/evaluate/{policy}" for policy in ("base", "sft")}
    campaign["experiments"][1]["stages"] |= own
    missing, output = made()
    assert missing == []
    rows = [row for row in table(output) if row["experiment"] == "tiny-lora" and row["policy"] == "base"]
    assert len(rows) == ROWS and rows[0]["artifact"].startswith("results/tiny/base@")


def test_accepted_edits_are_named(undrawn, campaign, made):
    page = "dpo: 0123 -> 4567 accepted 2026-01-02 by <b>x</b> (word): a loop became a comprehension"
    _, output = made()
    assert "accepted edit" not in (output / "index.html").read_text(), "control"
    campaign["accepted"] = [page]
    made()
    assert page in Tags((output / "index.html").read_text()).text, "as text"


def test_a_judgements_warnings_and_settings_of_generation_are_shown(undrawn, made, tmp_path):
    """Control: without them, no word of either."""
    page = (made()[1] / "index.html").read_text()
    assert 'badge bad">warning' not in page and "answers generated with" not in page
    folder = tmp_path / "results/tiny-lora/evaluate/sft"
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics |= {"warnings": [f"another form {SCRIPT}"], "generation": {"e2e": {"num_beams": 10, "length_penalty": 0.9}}}
    artifact(tmp_path / "results", "tiny-lora/evaluate/sft", metrics)
    page = (made()[1] / "index.html").read_text()
    assert "warning tiny-lora · evaluate/sft: another form <script>" in Tags(page).text and SCRIPT not in page
    assert "evaluate/sft: answers generated with e2e: num_beams 10, length_penalty 0.9" in Tags(page).text


def test_old_figures_go(made):
    _, output = made()
    (output / "figures/benchmark-old.svg").write_text("old")
    made()
    assert not (output / "figures/benchmark-old.svg").exists()


def test_long_answers_are_cut_with_a_note(undrawn, made, tmp_path):
    shutil.rmtree(tmp_path / "results/tiny-lora/evaluate/sft")
    evaluation(tmp_path / "results", "tiny-lora/evaluate/sft", 0.0, "again " * 1000)
    _, output = made()
    assert "4,800 characters left out" in (output / "index.html").read_text()


def test_the_last_lines_hold_the_groups_figure_of_every_policy(undrawn, made, tmp_path):
    _, output = made()
    head, _, *lines, end = (output / "summary.txt").read_text().splitlines()
    assert head.split() == ["experiment", "policy", "world"], "not the tasks of the group"
    assert len(lines) == 1 + len(METHODS) and all("±" in line for line in lines)
    assert end == f"Value ± standard error. {(1 + len(METHODS)) * len(TASKS)} more figures are in the report."
    shutil.rmtree(tmp_path / "results/tiny-lora/evaluate/sft")
    made()
    assert (output / "summary.txt").read_text().endswith("PARTIAL: 1 missing:\n  results/tiny-lora/evaluate/sft\n")


def test_report_never_loads_a_model_library():
    heavy = "{'torch', 'transformers', 'matplotlib'}"
    code = f"import sys, posttrain.stages.report; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_browser_runs_nothing(made, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here: the page was not opened in a browser")

    def opened(page: Path) -> str:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'home'}"]
        command = [browser, *options, "--dump-dom", page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=300).stdout

    own = "document.title = 'owned'"
    hostile = f'<script>{own}</script></svg><img src=x onerror="{own}">'
    shutil.rmtree(tmp_path / "results/tiny-lora/evaluate/sft")
    evaluation(tmp_path / "results", "tiny-lora/evaluate/sft", 0.1, hostile)
    _, output = made()
    shown = opened(output / "index.html")
    assert "<title>The embedded world" in shown and own in Tags(shown).text
    (tmp_path / "control.html").write_text(f"<title>quiet</title>{hostile}")
    assert "<title>owned</title>" in opened(tmp_path / "control.html"), "the browser does run what is live"


def test_the_page_shows_what_a_model_said_and_what_was_read_as_its_answer():
    from posttrain.reporting import samples

    same = {"arguments": [["question", {}]], "target": "red", "exact_match": 0.0}
    said = same | {"resps": [["go away!"]], "filtered_resps": ["[invalid]"]}
    assert samples.read_sample(said, "exact_match")["answer"] == "go away!\n[read as the answer: [invalid]]"
    assert samples.read_sample(same | {"resps": [["red"]], "filtered_resps": ["red"]}, "exact_match")["answer"] == "red"
    number = same | {"resps": [["42"]], "filtered_resps": ["42"]}
    assert samples.read_sample(number, "exact_match")["answer"] == "42", "a number that was said is an answer"
    rolling = same | {"arguments": [["a whole text"]], "resps": [["-113.969"]], "filtered_resps": ["-113.969"]}
    assert samples.read_sample(rolling, "bits_per_byte")["answer"] == "log-likelihood -114.0"


def test_the_page_names_the_command_for_its_own_campaign(campaign, made, tmp_path):
    """Snakemake takes all that follows --configfile for files: the target stands before it."""
    shutil.rmtree(tmp_path / "results/tiny-lora/sft")
    text = (made()[1] / "index.html").read_text()
    assert "<pre>make run</pre>" in text and "snakemake --cores 2 results/tiny-lora/sft/manifest.json\n" in text
    campaign["configfile"] = "config/other one.yaml"
    text = html.unescape((made()[1] / "index.html").read_text())
    assert "<pre>snakemake --cores 2 --configfile 'config/other one.yaml'</pre>" in text
    assert "snakemake --cores 2 results/tiny-lora/sft/manifest.json --configfile 'config/other one.yaml'" in text


def test_figures_of_longer_contexts():
    """Lines by length and by position, and a map with Wilson's interval in each cell."""
    from posttrain.maths.intervals import wilson
    from posttrain.reporting import figures

    same = {"experiment": "long", "policy": "longctx", "seed": 0, "judge": "evaluate", "group": False, "higher": True}
    texts = [
        same | {"task": f"long_text_{n}", "metric": "perplexity", "value": v, "stderr": 0.1, "n": 8}
        for n, v in ((64, 2.0), (256, 40.0))
    ]
    keys = [
        same | {"task": f"passkey_256_depth_{depth}", "metric": "exact_match", "value": v, "stderr": 0.0, "n": 40}
        for depth, v in ((0, 1.0), (50, 0.25))
    ]
    parts = [{"from": 1, "to": 64, "loss": 2.0, "stderr": 0.1}, {"from": 65, "to": 255, "loss": 3.0, "stderr": None}]
    curves = [{"experiment": "long", "policy": "longctx", "parts": parts}]
    found = {figure["name"]: figure for figure in figures.figures([*texts, *keys], [], [], curves, [])}
    assert set(found) == {"long-perplexity", "long-positions", "long-passkey"}, "and no bars of the same"
    drawn = {name: figures.svg(figure, figures.WIDE) for name, figure in found.items()}
    assert "0.25  [0.14, 0.40]" in drawn["long-passkey"] and "1.00  [0.91, 1.00]" in drawn["long-passkey"]
    assert all("long · longctx" in svg for svg in drawn.values())
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4), "the textbook's"
