"""A small whole campaign through the workflow's own commands, in a copy of the project."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from project import copy_of, environment, snakemake

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def project(root, tmp_path_factory) -> Path:
    return copy_of(root, tmp_path_factory.mktemp("project"))


UNREAD = {
    "longctx": {"policy"},  # the workflow reads it, and gives the stage that policy
    "ppo": {"kl_horizon"},  # only with kl_target, and refused without it
    "prepare": {"allow_empty_user", "group_key", "max_line_mb"},  # only with sources, likewise
}
TAKEN = "reusing an earlier artifact"
WHOLE = "experiments=[mini,mini-lora,mini-align,mini-long]"


def jobs(said: str) -> dict[str, str]:
    """How many jobs of each rule a dry run says it would run."""
    return dict(line.split() for line in said.split("Job stats:")[1].split("\n\n")[0].splitlines()[3:])


MINI = ("--configfile", str(HERE / "mini/config.yaml"))


@pytest.fixture(scope="module")
def failed(project):
    """The campaign with its broken experiment."""
    return snakemake(project, "--cores", "2", *MINI)


@pytest.fixture(scope="module")
def finished(project, failed):
    """The same campaign without it."""
    done = snakemake(project, "--cores", "2", *MINI, "--config", WHOLE)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_a_failed_experiment_does_not_withhold_the_others(project, failed):
    report = project / "results/report"
    assert failed.returncode != 0
    page = (report / "index.html").read_text()
    assert "partial" in page.lower() and "results/mini-broken/base" in page and "did not learn" in page
    assert not (report / "manifest.json").exists(), "a partial report is never taken for a result"
    rows = list(csv.DictReader((report / "table.csv").open()))
    assert {row["experiment"] for row in rows} == {"mini", "mini-lora", "mini-align", "mini-long"}


def test_its_text_is_inert_in_the_page(project, failed):
    page = (project / "results/report/index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_the_failure_is_told_without_a_traceback(failed, finished):
    said = failed.stdout + failed.stderr
    assert "error: base: did not learn" in said
    assert "Traceback" not in said
    end = said.rpartition("report: results/report/index.html")[2]
    assert "1 failed or were stopped; " in end, "said once more, last"
    assert "mini-broken/base: base: did not learn" in end
    assert "failed or were stopped" not in finished.stdout + finished.stderr, "control"


def test_every_attempt_is_counted_the_failed_one_too(project, finished):
    """With what its stage says of itself; and the page sums them."""
    files = sorted((project / "results/compute").rglob("*.json"))
    accounts = {"/".join(file.parts[len(project.parts) + 2 : -1]): json.loads(file.read_text()) for file in files}
    broken = accounts.pop("mini-broken/base")
    assert broken["outcome"] == "failed" and "did not learn" in broken["reason"] and broken["cpu_seconds"] > 1
    assert {"mini/sft", "mini/evaluate/sft", "mini-align/ppo", "mini-long/longctx"} <= accounts.keys()
    for name, account in accounts.items():
        made = json.loads((project / "results" / name / "provenance.json").read_text())
        assert account["outcome"] == "done" and account["identity"] == made["identity"], name
        assert account["cpu_seconds"] >= 0.9 * made["cpu_seconds"] and account["peak_memory_mb"] > 50, name
    total = json.loads((project / "results/report/compute.json").read_text())["total"]
    assert total["done"] == len(accounts) and total["kwh"] > 0 and total["share_without_result"] == 0.0


def test_progress_is_visible(failed):
    said = failed.stdout + failed.stderr
    for words in ("[mini/sft] step 8/8", "loss", "left", "steps (", "[mini/evaluate/base] done"):
        assert words in said


def test_the_table(project, finished):
    rows = list(csv.DictReader((project / "results/report/table.csv").open()))
    columns = ["experiment", "seed", "policy", "task", "metric", "value", "stderr", "n", "artifact"]
    assert list(rows[0]) == columns
    benchmarked = {(row["experiment"], row["policy"]) for row in rows if row["task"] == "world"}
    expected = {("mini", "base"), ("mini", "sft"), ("mini-lora", "sft"), ("mini-align", "ppo"), ("mini-align", "dpo")}
    assert benchmarked == expected | {("mini-align", "kto")}, "what is shared stands there once"
    compared = {(row["experiment"], row["policy"]) for row in rows if row["metric"] == "kl_to_sft"}
    assert compared == {("mini-align", policy) for policy in ("base", "sft", "ppo", "dpo", "kto")}
    long = {(row["policy"], row["task"]) for row in rows if row["experiment"] == "mini-long"}
    for policy in ("base", "longctx"):
        tasks = {"passkey_256", "passkey_256_depth_50", "long_text_64", "long_text_256"}
        assert tasks <= {task for name, task in long if name == policy}
    assert all(row["metric"] == "exact_match" for row in rows if row["task"].startswith("world"))
    assert (project / "results/report/manifest.json").exists()
    assert "world" in finished.stdout and "results/report/index.html" in finished.stdout, "the last lines"


def test_the_artifacts(project, finished):
    for stage, part in (("prepare", "data"), ("base", "model"), ("sft", "model")):
        folder = project / "results/mini" / stage
        assert {"config.yaml", part, "metrics.json", "manifest.json", "provenance.json"} <= {
            p.name for p in folder.iterdir()
        }
        manifest = json.loads((folder / "manifest.json").read_text())["files"]
        assert all(set(entry) == {"sha256", "size"} for entry in manifest.values())
    assert not (project / "results/mini-lora/base").exists(), "an equal stage is the parent's"


def test_changed_keys_rerun_their_stages_and_what_descends_from_them(project, finished, tmp_path):
    shutil.copytree(HERE / "mini", tmp_path / "mini")
    for name, before, after in (
        ("mini-lora", "packing: true", "packing: true, steps: 9"),
        ("mini-align", "dpo: {", "dpo: {beta: 0.25, "),
    ):
        file = tmp_path / f"mini/experiments/{name}.yaml"
        assert before in file.read_text()
        file.write_text(file.read_text().replace(before, after))
    (tmp_path / "mini/config.yaml").write_text(f"title: A small whole campaign\n{WHOLE.replace('=', ': ')}\n")
    done = snakemake(project, "-n", "--configfile", str(tmp_path / "mini/config.yaml"))
    one = dict.fromkeys(("all", "sft", "dpo", "compare", "report"), "1")
    assert jobs(done.stdout + done.stderr) == one | {"evaluate": "2", "total": "7"}, done.stderr


def test_every_key_is_read_by_its_stage(project, finished):
    """Over all the artifacts of a stage; what none of them reads would be a setting without effect."""
    never: dict[str, set[str]] = {}
    for record in project.glob("results/mini*/**/provenance.json"):
        made = json.loads(record.read_text())
        never.setdefault(made["stage"], set(made["unread"])).intersection_update(made["unread"])
    assert len(never) == 12
    assert {stage: keys for stage, keys in never.items() if keys} == UNREAD


def test_what_comes_to_the_same_bytes_costs_seconds(project, finished, tmp_path):
    """Rows that are too long are cut instead of dropped, but none is: `prepare` runs, all else is taken again. Changed
    back, `prepare` is taken again too."""
    here = shutil.copytree(project, tmp_path / "project", symlinks=True)
    shutil.copytree(HERE / "mini", tmp_path / "mini")
    file = tmp_path / "mini/experiments/mini.yaml"
    short = WHOLE.replace(",mini-long", "")  # whose rows are longer
    file.write_text(file.read_text().replace("  world: {", "  long_rows: cut\n  world: {", 1))
    start = time.monotonic()
    other = ("--configfile", str(tmp_path / "mini/config.yaml"), "--config", short)
    done = snakemake(here, "--cores", "2", *other)
    took = time.monotonic() - start
    assert done.returncode == 0, done.stderr[-3000:]
    assert digests_of(here) == digests_of(project)
    logs = {str(log.relative_to(here / "results/logs")): log for log in here.glob("results/logs/mini*/**/*.log")}
    taken = {name for name, log in logs.items() if TAKEN in log.read_text()}
    assert len(taken) >= 18 and not any(name.endswith("/prepare.log") for name in taken)
    print(f"{len(taken)} artifacts taken again, in {took:.0f} s with one preparation")
    back = snakemake(here, "--cores", "2", "results/mini/sft/manifest.json", *MINI, "--config", WHOLE)
    assert back.returncode == 0 and all(TAKEN in logs[f"mini/{stage}.log"].read_text() for stage in ("prepare", "sft"))
    assert digests_of(here) == digests_of(project)


def test_a_flipped_bit_is_found_named_and_mended(project, finished):
    """Before anything is built on it; what was kept of that artifact is the same file and is not believed either."""
    before = digests_of(project)
    weights = project / "results/mini-lora/sft/model/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    target = ("results/mini-lora/evaluate/sft/manifest.json", "--forcerun", "evaluate", "--cores", "2", *MINI)
    first = snakemake(project, *target, "--config", WHOLE, "keep_gb=0")
    said = first.stdout + first.stderr
    assert first.returncode != 0 and "adapter_model.safetensors: its bytes differ from its manifest" in said
    assert "results/mini-lora/sft: run snakemake again, which remakes it" in said and "Traceback" not in said
    assert snakemake(project, "--cores", "2", *MINI, "--config", WHOLE).returncode == 0
    assert digests_of(project) == before


def digests_of(project: Path) -> dict[str, str]:
    """Manifest -> its text, of every artifact but the report, which names the config."""
    manifests = [file for file in project.glob("results/mini*/**/manifest.json")]
    return {str(file.relative_to(project)): file.read_text() for file in manifests}


def test_alignment_is_in_the_page(project, finished):
    page = (project / "results/report/index.html").read_text()
    for words in ("Reward against KL", "best of n", "Calibration of reward models", "PPO of mini-align", "KL, nats"):
        assert words in page
    assert (project / "results/mini-align/ppo/snapshots/000001/adapter_model.safetensors").is_file()
    assert (project / "results/mini/reference/manifest.json").is_file(), "one reference for every beta"


def test_snakemakes_own_report(project, finished):
    done = snakemake(project, "--report", *MINI, "--config", WHOLE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (project / "report.html").stat().st_size > 100_000


def test_a_reviewer_is_handed_a_bundle(project, finished, root, tmp_path):
    done = snakemake(project, "--cores", "2", "bundle", *MINI, "--config", WHOLE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with zipfile.ZipFile(project / "results/bundle.zip") as packed:
        packed.extractall(tmp_path / "crate")
    alone = [sys.executable, "-I", "-S", "verify_bundle.py"]
    checked = subprocess.run(alone, cwd=tmp_path / "crate", capture_output=True, text=True)
    assert checked.stdout.startswith("valid: ") and checked.returncode == 0, checked.stdout
    partial = ["posttrain", "bundle", MINI[1], "--partial", "--output", str(tmp_path / "partial.zip")]
    told = subprocess.run(partial, cwd=project, env=environment(), capture_output=True, text=True)
    assert "artifacts are missing, and named so" in told.stdout, told.stdout + told.stderr
    with zipfile.ZipFile(tmp_path / "partial.zip") as packed:
        graph = json.loads(packed.read("ro-crate-metadata.json"))["@graph"]
    (run,) = (entity for entity in graph if entity["@id"] == "#run-mini-broken/base")
    assert "did not learn" in run["error"] and run["actionStatus"].endswith("/FailedActionStatus")
    validator = root / ".venv/validator/bin/python"
    if not validator.is_file():
        pytest.skip("the public validator is not installed: make .venv/validator/ready")
    said = validate(validator, root, tmp_path / "crate")
    assert said == "valid", said
    file = tmp_path / "crate/ro-crate-metadata.json"
    file.write_text(file.read_text().replace("ControlAction", "Action"))
    assert validate(validator, root, tmp_path / "crate").endswith("not valid"), "control"


def validate(validator, root, folder) -> str:
    """What the public validator says of a crate."""
    command = [validator, root / "tests/validate_crate.py", folder]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def test_the_literal_commands_work_from_the_root(project, finished):
    assert snakemake(project, "-n").returncode == 0
    assert snakemake(project, "-n", "--cores", "2").returncode == 0


def test_the_workflow_is_deployed_as_a_module(root, tmp_path):
    """As the Snakemake catalog's standardised usage and `snakedeploy deploy-workflow` do."""
    shutil.copytree(root / "config", tmp_path / "config")
    (tmp_path / "workflow").mkdir()
    text = f"module posttrain:\n    snakefile: {str(root / 'workflow/Snakefile')!r}\n    config: config\n"
    (tmp_path / "workflow/Snakefile").write_text(f'configfile: "config/config.yaml"\n{text}use rule * from posttrain\n')
    planned = snakemake(tmp_path, "-n")
    assert planned.returncode == 0 and re.search(r"^ppo +1$", planned.stdout, re.M), planned.stdout + planned.stderr


@pytest.mark.parametrize("dry", [True, False])
def test_a_typo_stops_before_any_job(project, tmp_path, dry):
    shutil.copytree(HERE / "mini", tmp_path / "mini")
    file = tmp_path / "mini/experiments/mini.yaml"
    file.write_text(file.read_text().replace("learning_rate", "leaning_rate"))
    configfile = ("--configfile", str(tmp_path / "mini/config.yaml"))
    done = snakemake(project, *(["-n"] if dry else ["--cores", "1"]), *configfile)
    assert done.returncode == 2
    assert "mini.yaml:14: base.scratch.leaning_rate: unknown key (did you mean 'learning_rate'?)" in done.stderr
    assert "Traceback" not in done.stderr and "Execute" not in done.stderr + done.stdout


def test_a_campaigns_file_means_the_same_to_snakemake(project, tmp_path):
    """Snakemake reads it too, as YAML 1.1: there `on` is true and a date is no text."""
    shutil.copytree(HERE / "mini", tmp_path / "mini")
    for title in ("on", "2024-01-01"):
        (tmp_path / "mini/config.yaml").write_text(f"title: {title}\nexperiments: [mini]\n")
        done = snakemake(project, "-n", "--configfile", str(tmp_path / "mini/config.yaml"))
        assert done.returncode == 0, done.stderr
    done = snakemake(project, "-n", "--configfile", "config/config.yaml", str(tmp_path / "mini/config.yaml"))
    assert done.returncode == 2 and "name one campaign" in done.stderr
    done = snakemake(project, "-n", *MINI, "--config", "experiments=mini", "titel=x")
    assert done.returncode == 2
    assert "--config: experiments: found 'mini'" in done.stderr and "--config: titel: unknown key" in done.stderr


def test_a_target_of_no_experiment_is_refused_without_a_traceback(project, finished):
    wrong = snakemake(project, "-n", "results/nosuch/sft/manifest.json", *MINI)
    said = wrong.stdout + wrong.stderr
    assert wrong.returncode != 0 and "MissingRuleException" in said and "Traceback" not in said
    right = snakemake(project, "-n", "results/mini/sft/manifest.json", *MINI)
    assert right.returncode == 0, "control"


def test_make_prints_the_table_even_where_nothing_is_to_be_done(project, finished, root):
    """`make run` prints it itself, and has Snakemake leave it out: once, either way."""
    again = snakemake(project, "--cores", "2", *MINI, "--config", WHOLE)
    assert "Nothing to be done" in again.stderr and "results/report/index.html" not in again.stdout
    (project / "results/report/manifest.json").unlink()
    later = snakemake(project, "--cores", "2", *MINI, "--config", WHOLE, POSTTRAIN_SUMMARY="later")
    assert later.returncode == 0 and "report: results/report/index.html" not in later.stdout
    recipe = (root / "Makefile").read_text().split("\nrun:")[1].split("\n\n")[0]
    assert "POSTTRAIN_SUMMARY=later snakemake" in recipe and "posttrain summary" in recipe


def test_a_stage_on_which_ctrl_c_was_typed_says_so(project, finished, tmp_path):
    here = shutil.copytree(project, tmp_path / "project", symlinks=True)
    shutil.copytree(HERE / "mini", tmp_path / "mini")
    (tmp_path / "mini/config.yaml").write_text("experiments: [endless]\n")
    endless = "extends: mini\nquestion: Ctrl-C?\nsft: {steps: 100000}\n"
    (tmp_path / "mini/experiments/endless.yaml").write_text(endless)
    command = ["snakemake", "--cores", "2", "results/endless/sft/manifest.json"]
    options = {"cwd": here, "env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    typed = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    run = subprocess.Popen([*command, "--configfile", str(tmp_path / "mini/config.yaml")], **options, **typed)
    log, end = here / "results/logs/endless/sft.log", time.monotonic() + 300
    while not (log.is_file() and "step 1/" in log.read_text()):
        assert time.monotonic() < end and run.poll() is None
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said = run.communicate(timeout=300)[0]
    assert run.returncode and "Traceback" not in said, said[-3000:]
    assert "[endless/sft] interrupted; the next run continues" in log.read_text(), log.read_text()[-900:]
    assert "  endless/sft: interrupted; the next run continues" in said.rpartition("failed or were stopped")[2]
    found = subprocess.run(["posttrain", "status", str(tmp_path / "mini/config.yaml")], **options | {"cwd": here})
    assert re.search(r"^endless/sft +stopped; the next run continues", found.stdout, re.M), found.stdout


def test_a_method_is_added_in_the_places_that_contributing_names(project, finished):
    """A class, a line in the table, a module and a caption: it is planned, run, judged and reported by these alone."""
    shutil.copytree(HERE / "mini/experiments", project / "own/experiments")
    (project / "own/config.yaml").write_text("experiments: [mini-echo]\n")
    others = "ppo: null\ndpo: null\nkto: null\n"
    (project / "own/experiments/mini-echo.yaml").write_text(
        f"question: Does a method of one's own run?\nextends: mini-align\n{others}echo: {{steps: 2, batch_size: 4}}\n"
    )
    own = ("--configfile", "own/config.yaml")
    package = {"PYTHONPATH": str(project / "workflow")}
    control = snakemake(project, "-n", *own, **package)
    assert control.returncode == 2 and "mini-echo.yaml:6: echo: unknown key" in control.stderr
    folder = project / "workflow/posttrain"
    sections, table = folder / "config/sections.py", folder / "config/stages.py"
    sections.write_text(sections.read_text() + '\n\nclass Echo(Dpo):\n    """DPO under another name."""\n')
    line = 'Stage(sections.Echo, "policy", "a method of one\'s own", ("data", "base", "sft", "reference"))'
    place = '    "longctx": Stage('
    table.write_text(table.read_text().replace(place, f'    "echo": {line},\n{place}', 1))
    module = (folder / "stages/dpo.py").read_text()
    (folder / "stages/echo.py").write_text(module.replace("dpo", "echo").replace("Dpo", "Echo"))
    (project / "workflow/report/echo.rst").write_text("A method of one's own.\n")
    planned = jobs(snakemake(project, "-n", *own, **package).stdout)
    assert planned == {"all": "1", "echo": "1", "evaluate": "1", "compare": "1", "report": "1", "total": "5"}
    needs = subprocess.run(
        ["posttrain", "plan", "own/config.yaml"],
        cwd=project,
        capture_output=True,
        text=True,
        env=environment(**package),
    )
    assert re.search(r"^mini-echo/echo +[\d.]+ k +\d", needs.stdout, re.M), needs.stdout + needs.stderr
    done = snakemake(project, "--cores", "2", *own, **package)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(csv.DictReader((project / "results/report/table.csv").open()))
    tasks = {row["task"] for row in rows if row["policy"] == "echo"}
    assert {"world", "answers"} <= tasks
    assert "mini-echo" in (project / "results/report/index.html").read_text()
