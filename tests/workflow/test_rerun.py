"""Only what changed: what Snakemake decides for every module, place and damage, on artifacts as stages leave them."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fabricated import RERUN, edit, fabricate, forget, rerun

from posttrain.__main__ import main
from posttrain.dag import campaign
from posttrain.dag.frozen import freeze, summary
from posttrain.engine import records
from posttrain.ground import code
from posttrain.ground.errors import UserError
from posttrain.ground.identity import canonical, write_named
from posttrain.tools import why

HERE = Path(__file__).parent


def test_nothing_is_to_be_done(done):
    assert rerun() == {}


PACKAGE = code.PACKAGE
MODULES_OF = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))
REACHED = {  # a few, by hand; the others by what `code.code` lists, which `test_nothing_else_is_loaded` holds to
    "world/rows.py": {"prepare"},
    "world/gold.py": {"prepare"},  # ppo and compare are told of it by `gold_code`
    "training/optimizer.py": {"base", "sft", "reward", "ppo", "grpo", "dpo", "kto", "longctx", "algebra"},
    # evaluate searches the training rows for lm-eval's questions, and reward reads a pair's ratings
    "data/texts.py": {"prepare", "reward", "evaluate"},
    "data/packing.py": {"base", "longctx", "lengths"},
    "maths/ppo.py": {"ppo", "algebra"},
    "maths/likelihood.py": {"reference", "ppo", "grpo", "dpo", "kto", "compare", "algebra"},
    "rl/health.py": {"ppo", "grpo"},
    "reporting/figures.py": {"report"},
    "stages/sft.py": {"sft"},
    "stages/dpo.py": {"dpo"},
    "models/reward_head.py": {"reward", "ppo", "grpo", "compare", "algebra"},
    "stages/reward.py": {"reward"},
    "config/sections.py": set(),
    "ground/progress.py": set(),
    "dag/campaign.py": set(),
    "__main__.py": set(),
}


def test_formatting_of_any_module_reruns_nothing(package):
    before = {module: code.module_parts(name_of(module)) for module in MODULES_OF}
    for module in MODULES_OF:
        text = (package / module).read_text()
        (package / module).write_text("# A comment.\n" + text.replace("\n\n\n", "\n\n\n\n# another\n") + "\n\n")
    forget()
    assert rerun() == {}
    assert [module for module in MODULES_OF if code.module_parts(name_of(module)) != before[module]] == []


def test_a_module_reruns_the_stages_that_reach_it(package):
    """The code of these stages is another for each module; Snakemake is asked once for the modules of the same ones."""
    before, reached_by = campaign.load("config/config.yaml").code, {}
    for module in MODULES_OF:
        with appended(package / module):
            now = campaign.load("config/config.yaml").code
            stages = {stage for stage in now if now[stage] != before[stage]}
            assert stages == {stage for stage in now if name_of(module) in code.code(stage)}, module
            assert stages == REACHED.get(module, stages), module
        reached_by[frozenset(stages)] = module
    assert len(reached_by) > 10, "control: modules differ in it"
    for stages, module in reached_by.items():
        expected = set().union(*({"report"} if stage == "report" else of_stage(stage) for stage in stages))
        with appended(package / module):
            found = {name.removeprefix("whole/") for name in rerun() if not name.startswith("other/")}
            assert found == expected, module
    assert rerun() == {}, "control"


def name_of(module: str) -> str:
    """The dotted name of a module's file."""
    return module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@contextlib.contextmanager
def appended(file: Path):
    """A module with a statement more, for a while."""
    text = file.read_text()
    file.write_text(text + "\n\nNEW = list()\n")
    forget()
    yield
    file.write_text(text)
    forget()


def of_stage(stage: str) -> set[str]:
    """What reruns for another code of a stage: itself and what descends from it."""
    return RERUN[stage] | ({stage} if stage in ("prepare", "base") else set())


LOADED = """
import importlib, os, sys
from posttrain.jobs import artifact
artifact.import_libraries()
print("compiler" if "torch._inductor.compile_fx" in sys.modules else "", flush=True)
for stage in sys.argv[1:]:
    if os.fork() == 0:
        for module in [module for module in sys.modules if module.partition(".")[0] == "posttrain"]:
            del sys.modules[module]
        importlib.import_module(f"posttrain.stages.{stage}")
        print(stage, *(module for module in sys.modules if module.startswith("posttrain.")), flush=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


def test_nothing_else_is_loaded():
    """What a stage's module loads when it is imported is among what counts; and torch's compiler is not loaded."""
    stages = sorted(RERUN.keys() - {"seed", "question", "paper", "claims"})
    done = subprocess.run([sys.executable, "-c", LOADED, *stages], stdout=subprocess.PIPE, text=True, check=True)
    compiler, *lines = done.stdout.splitlines()
    assert compiler == ""
    assert [line.split()[0] for line in lines] == stages
    for stage, *modules in map(str.split, lines):
        loaded = {module.removeprefix("posttrain.") for module in modules}
        assert f"stages.{stage}" in loaded
        empty = {module for module in loaded if code.source(module).name == "__init__.py"}
        uncounted = {module for module in loaded if code.uncounted(module)}
        assert loaded <= code.code(stage).keys() | uncounted | empty, stage
    assert "world.rows" not in code.code("sft"), "control: something does not count"


def test_a_template_counts_for_the_stages_that_read_it(package):
    """Chat templates are part of what `tokens` does."""
    (package / "templates/roles.jinja").write_text("other")
    forget()
    assert "whole/prepare" in rerun()


def test_touching_everything_reruns_nothing(package):
    for file in [*Path("results").rglob("*"), *Path("config").rglob("*"), *Path(".").glob("*.jsonl")]:
        os.utime(file)
    assert rerun() == {}
    (Path("results/whole/sft/model") / "bytes").touch()
    assert rerun() == {}
    for seconds, stage in enumerate(("dpo", "sft", "base", "prepare")):  # what is built on is newer than what is built
        os.utime(f"results/whole/{stage}/manifest.json", (time.time() - 10 + seconds,) * 2)
    for file in Path("results/whole/evaluate").rglob("*"):
        os.utime(file, (1e9, 1e9))
    assert rerun() == {}


def test_a_copy_elsewhere_needs_nothing(package, tmp_path, monkeypatch):
    """Dates and Snakemake's own records do not come along; one changed key then reruns exactly its stages."""
    shutil.copytree(".", tmp_path / "copy", symlinks=True, ignore=shutil.ignore_patterns(".snakemake"),
                    copy_function=shutil.copyfile)  # fmt: skip
    monkeypatch.chdir(tmp_path / "copy")
    assert rerun() == {}
    edit("dpo", {"beta": 0.3})
    assert {name for name in rerun() if not name.startswith("other/")} == {
        name if name == "report" else f"whole/{name}" for name in RERUN["dpo"]
    }


def test_two_swapped_values_count(package):
    """Snakemake compares parameters as a set without names: a section is one of them, as a whole."""
    edit("dpo", {"beta": 0.1, "label_smoothing": 0.3, "loss": ["robust"]})
    fabricate(campaign.load("config/config.yaml"))
    assert rerun() == {}, "control"
    edit("dpo", {"beta": 0.3, "label_smoothing": 0.1, "loss": ["robust"]})
    assert "whole/dpo" in rerun()


def test_a_replaced_data_file_counts_even_with_an_old_date(package):
    edit("prepare.sft", [{"path": "rows.jsonl"}])
    Path("rows.jsonl").write_text("first")
    fabricate(campaign.load("config/config.yaml"))
    assert rerun() == {}, "control"
    Path("rows.jsonl").write_text("other")
    os.utime("rows.jsonl", (1, 1))
    found = rerun()
    assert "made from another rows.jsonl" in found["whole/prepare"] and "whole/sft" in found
    Path("rows.jsonl").write_text("first")
    assert rerun() == {}, "it is the first again"


def test_another_artifact_in_the_place_of_one_counts(package):
    """As `dvc checkout` or `cp -p` may put one there, whatever its date."""
    manifest = Path("results/whole/sft/manifest.json")
    manifest.write_text(manifest.read_text().replace("\n", " \n", 1))
    os.utime(manifest, (1, 1))
    found = rerun()
    assert "made from another results/whole/sft/manifest.json" in found["whole/reward"]
    assert "whole/dpo" in found and "whole/sft" not in found


def changes(folder: Path) -> dict[str, tuple]:
    """When each file and folder below a folder was changed, and which it is."""
    stats = {str(path): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in stats.items()}


def test_a_file_cut_short_is_named_and_its_stage_made_anew(package, capsys):
    """By a run; `snakemake -n` leaves it as it is, since a copy may be under way, and believes it once it is whole."""
    file = Path("results/whole/sft/model/bytes")
    whole = file.read_bytes()
    for looking in range(2):
        file.write_text("short")
        os.utime("results/whole/sft/manifest.json")  # as after a pull, which writes them all
        before = changes(Path("results"))
        rerun(looking=True)
        told = capsys.readouterr().err
        assert "results/whole/sft/model/bytes: has another size than in its manifest; a run would remake" in told
        assert changes(Path("results")) == before
        if not looking:
            file.write_bytes(whole)
            assert rerun(looking=True) == rerun() == {}
    found = rerun()
    told = capsys.readouterr().err
    assert "has another size than in its manifest; results/whole/sft is remade" in told
    assert changes(Path("results")) != before, "control"
    assert {"whole/sft", "whole/dpo", "report"} <= found.keys() and "whole/base" not in found
    assert rerun().keys() == found.keys(), "until it is made"


def test_an_altered_judgement_is_named_and_made_anew(package, capsys):
    """Otherwise its report would fail for ever, and DVC enter the altered file; `snakemake -n` leaves it as it is."""
    file = Path("results/whole/evaluate/dpo/metrics.json")
    assert rerun() == {} and "bytes differ" not in capsys.readouterr().err, "control"
    file.write_text("[]")  # as long as before
    before = changes(Path("results"))
    rerun(looking=True)
    assert f"{file}: its bytes differ from its manifest; a run would remake" in capsys.readouterr().err
    assert changes(Path("results")) == before
    found = rerun()
    assert f"{file}: its bytes differ from its manifest; {file.parent} is remade" in capsys.readouterr().err
    assert found.keys() == {"whole/evaluate/dpo", "report"} == told()


def test_what_dvc_would_enter_is_compared_with_its_manifest(package, monkeypatch):
    """All files of every artifact, also those that nothing reads again, and each once while it stays as it is."""
    file = Path("results/whole/sft/model/bytes")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert rerun() == {}, "control: a plan reads no weights"
    monkeypatch.setenv("DVC_STAGE", "campaign")
    assert "whole/sft" in rerun() and not Path("results/whole/sft/manifest.json").exists()
    fabricate(campaign.load("config/config.yaml"))
    assert rerun() == {}
    monkeypatch.setattr("posttrain.engine.records.sha256", None)  # called, it raises
    records.verify(campaign.load("config/config.yaml").folders())


def told() -> set[str]:
    """What `posttrain why` says will be made."""
    return {folder.removeprefix("results/") for folder in why.to_run(why.survey(campaign.load("config/config.yaml")))}


def test_what_verify_finds_is_made_anew(package):
    for name, also in (("whole/sft/model", "whole/dpo"), ("whole/evaluate/dpo/data", "report")):
        file = Path("results", name, "bytes")
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        assert main(["verify"]) == 2
        found = rerun()
        assert {name.rpartition("/")[0], also} <= found.keys() == told()
        assert main(["verify"]) == 0 and rerun().keys() == found.keys(), "until it is made"
        fabricate(campaign.load("config/config.yaml"))
        for left in Path("results").glob("**/damaged-manifest.json"):
            left.unlink()  # as publishing does
        assert rerun() == {}


@pytest.mark.parametrize("records", [True, False])
def test_an_absent_artifact_hides_no_change_of_its_settings(package, records):
    """As after a pull of a part: what descends from it was made with other settings."""
    assert rerun() == {}
    for name in ("sft", "base", "prepare"):
        shutil.rmtree(f"results/whole/{name}")
    if not records:
        shutil.rmtree(".snakemake")
    assert rerun() == {} and told() == set(), "control: nothing needs them"
    edit("sft.method", "lora")
    found = rerun()
    assert {"whole/prepare", "whole/base", "whole/sft", "whole/evaluate/sft", "report"} <= found.keys() == told()


@pytest.mark.parametrize("how", ["gone", "empty", "other"])
@pytest.mark.parametrize("records", [True, False])
def test_an_artifact_of_unknown_origin_is_not_believed(package, how, records):
    file = Path("results/whole/dpo/provenance.json")
    file.write_text({"gone": "", "empty": "", "other": '{"params": ["x", "y"], "inputs": {}, "stage": "dpo"}'}[how])
    if how == "gone":
        file.unlink()
    if not records:
        shutil.rmtree(".snakemake", ignore_errors=True)
    found = rerun()
    assert found.keys() == told() and {"whole/dpo", "report"} <= found.keys() and "whole/sft" not in found
    assert "of unknown origin" in why.why(campaign.load("config/config.yaml"))


@pytest.mark.parametrize("how", ["deleted", "cut short", "one deleted"])
def test_lost_records_of_snakemake_are_written_again(package, how):
    assert rerun() == {}
    for number, record in enumerate(file for file in Path(".snakemake/metadata").rglob("*") if file.is_file()):
        if how != "one deleted" or number == 0:
            record.write_text(record.read_text()[:20]) if how == "cut short" else record.unlink()
    edit("dpo.beta", 0.3)
    assert {f"whole/{name}" for name in RERUN["dpo"] - {"report"}} <= rerun().keys() == told()


@pytest.mark.parametrize("name", ["seen.json", "fingerprints.json"])
@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"files": []}', '{"a": 1}', "{", '{"files": {"a": 1}}'])
def test_broken_notes_of_ours_are_written_again(package, name, text):
    assert rerun() == {}
    Path(".snakemake", name).write_text(text)
    code._parsed.cache_clear()
    forget()
    assert rerun() == {}
    edit("dpo.beta", 0.3)
    assert "whole/dpo" in rerun()


def test_a_file_written_over_in_place_with_its_old_date_counts(package):
    edit("prepare.sft", [{"path": "rows.jsonl"}])
    Path("rows.jsonl").write_text("aa")
    os.utime("rows.jsonl", (1e9, 1e9))
    fabricate(campaign.load("config/config.yaml"))
    assert rerun() == {}, "control"
    with open("rows.jsonl", "r+") as file:
        file.write("bb")
    os.utime("rows.jsonl", (1e9, 1e9))
    assert "whole/prepare" in rerun()


def test_the_template_of_the_page_reruns_the_report_alone(package):
    (package / "templates/report.html.j2").write_text("other")
    forget()
    assert rerun().keys() == {"report"}


def test_packages_and_relative_imports_count(package):
    (package / "helper").mkdir()
    (package / "helper/__init__.py").write_text("X = list()\n")
    (package / "aside.py").write_text("Y = list()\n")
    text = (package / "stages/dpo.py").read_text()
    (package / "stages/dpo.py").write_text(f"{text}\nfrom posttrain.helper import X\nfrom ..aside import Y\n")
    forget()
    assert {"helper", "aside"} <= code.code("dpo").keys() and "helper" not in code.code("sft")
    before = code.fingerprint_of("dpo")
    (package / "aside.py").write_text("Y = list(())\n")
    forget()
    assert code.fingerprint_of("dpo") != before
    (package / "__init__.py").write_text("import random\n")
    forget()
    assert "__init__" in code.code("sft"), "every stage runs it"


def test_broken_code_is_named(package):
    (package / "stages/dpo.py").write_text("def dpo(:\n")
    forget()
    with pytest.raises(UserError, match=r"dpo.py: is not a valid Python module"):
        campaign.load("config/config.yaml")
    (package / "stages/dpo.py").unlink()
    forget()
    with pytest.raises(UserError, match=r"dpo.py: cannot be read: No such file"):
        campaign.load("config/config.yaml")


def test_a_cell_with_several_axes_can_be_told_to_a_cluster(package):
    """As Snakemake tells a job of it, whose own reading parts at commas."""
    from snakemake.target_jobs import parse_target_jobs_cli_args

    edit("grid", {"dpo.beta": [0.2, 0.3], "seed": [0, 1]})
    name = "whole@beta=0.3@seed=1"
    assert name in campaign.load("config/config.yaml").names
    (job,) = parse_target_jobs_cli_args([f'dpo:experiment="{name}"'])
    assert name in str(job)


def test_a_campaign_is_the_same_wherever_it_is_named_from(package):
    paths = ["config/config.yaml", "./config/config.yaml", str(Path("config/config.yaml").absolute())]
    assert len({canonical(summary(campaign.load(path))) for path in paths}) == 1


def test_a_job_that_waited_reads_the_plan_of_its_own_run(package):
    """As a cluster starts it: in a process of its own, which parses the workflow again, after the config was edited."""
    frozen = write_named(freeze(campaign.load("config/config.yaml")))
    edit("dpo.beta", 0.3)
    job = [
        "snakemake",
        "-n",
        "-p",
        "--mode",
        "remote",
        "--target-jobs",
        "dpo:experiment=whole",
        "--cores",
        "1",
        "--force",
    ]
    job += ["--allowed-rules", "dpo"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "POSTTRAIN_CAMPAIGN": frozen}
    assert '"beta":0.1,' in subprocess.run(job, capture_output=True, text=True, env=environment).stdout
    Path("config/config.yaml").write_text("experiments: [gone]\n")
    assert '"beta":0.1,' in subprocess.run(job, capture_output=True, text=True, env=environment).stdout
    shutil.copy(HERE / "whole/config.yaml", "config/config.yaml")
    later = ["snakemake", "-n", "-p", "results/whole/dpo/manifest.json"]
    done = subprocess.run(later, capture_output=True, text=True, env=environment)
    assert '"beta":0.3,' in done.stdout, f"control: the main process reads the config as it is\n{done.stderr}"


def test_other_words_of_an_error_rerun_nothing(package):
    """Also of a module that every stage reaches; what is done with them counts, for the stages that do it."""
    file = package / "ground/files.py"
    text = file.read_text()
    assert text.count("is not valid JSON") == 1 and "ground.files:read_json" in code.definitions("sft")
    file.write_text(text.replace("is not valid JSON", "holds no JSON"))
    forget()
    assert rerun() == {} and told() == set()
    file.write_text(text.replace("return json.loads(path", "return {} or json.loads(path"))
    forget()
    assert "whole/sft" in rerun()
