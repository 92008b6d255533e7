"""Only what changed: what Snakemake decides for every key and every module, on artifacts as stages leave them."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fabricated import fabricate, rerun

from posttrain import campaign, code, schema, why
from posttrain.__main__ import main
from posttrain.config import Experiment, section_class
from posttrain.errors import UserError
from posttrain.identity import canonical, write_named

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def project(root, tmp_path_factory):
    """The campaign of every stage, done, in a folder of its own with the project's rules."""
    folder = tmp_path_factory.mktemp("rerun")
    for name in ("Snakefile", "workflow/rules", "workflow/report", "envs", "profiles"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(root / name)
    shutil.copytree(HERE / "whole", folder / "config")
    shutil.copy(HERE / "whole/experiments/whole.yaml", folder / "config/experiments/other-parent.yaml")
    for name in ("a.jsonl", "b.jsonl", "a.jinja"):
        (folder / name).write_text(name)
    (folder / "reward.py").write_text(
        "def short(prompt, reply, answer): ...\n\n\ndef long(prompt, reply, answer): ...\n"
    )
    for name in ("model", "model-b"):
        (folder / name).mkdir()
        for part in ("config.json", "tokenizer.json", "model.safetensors"):
            (folder / name / part).write_text("{}")
    previous = Path.cwd()
    os.chdir(folder)
    fabricate(campaign.load("config/config.yaml"))
    yield folder
    os.chdir(previous)


def test_nothing_is_to_be_done(project):
    assert rerun() == {}


POLICIES = ("base", "sft", "ppo", "dpo", "longctx")


def judged(judges: str, policies=POLICIES) -> set[str]:
    return {f"{judge}/{policy}" for judge in judges.split() for policy in policies}


ALL = {"base", "sft", "reward", "reference", "ppo", "dpo", "longctx", "report", *judged("evaluate compare lengths")}
ALIGNED = judged("evaluate lengths", ("sft", "ppo", "dpo")) | judged("compare") | {"report"}
RERUN = {  # by the section that a key stands in, of the experiment `whole`
    "prepare": ALL | {"prepare"},
    "base": ALL,
    "sft": {"sft", "reward", "reference", "ppo", "dpo"} | ALIGNED,
    "reward": {"reward", "ppo", "report"} | judged("evaluate lengths", ["ppo"]) | judged("compare"),
    "ppo": {"ppo", "report"} | judged("evaluate compare lengths", ["ppo"]),
    "reference": {"reference", "dpo", "report"} | judged("evaluate compare lengths", ["dpo"]),
    "dpo": {"dpo", "report"} | judged("evaluate compare lengths", ["dpo"]),
    "longctx": {"longctx", "report"} | judged("evaluate compare lengths", ["longctx"]),
    "evaluate": {"report"} | judged("evaluate"),
    "compare": {"report"} | judged("compare"),
    "lengths": {"report"} | judged("lengths"),
    "seed": ALL,
    "question": {"report"},
}


def keys(model=Experiment, prefix=""):
    """Every dotted key of the schema with its field; those of a list's sections as `key[].inner`."""
    for key, field in model.model_fields.items():
        inner = section_class(field.annotation)
        if key not in ("extends", "grid"):  # what is inherited counts as if it stood here; cells are other experiments
            yield f"{prefix}{key}", field
        if inner:
            yield from keys(inner, f"{prefix}{key}{'[]' if 'list' in str(field.annotation) else ''}.")


COMMIT, LATER = "86f7e437faa5a7fce15d1ddcb9eaeaea377667b8", "e9d71f5ee7c92d6dc9e92ffdad17b8bd49418f98"
HUB = {"id": "some/model", "revision": COMMIT}
SOURCES = ("text", "long", "sft", "preference", "choices")
FORMAT = {"text": "text", "long": "text", "sft": "messages", "preference": "preference", "choices": "refused"}
ADAPTER, MODULES = {"sft.method": "lora"}, ["q_proj", "v_proj"]
SOURCE = {"prepare.sft": [{"path": "a.jsonl"}]}
NO_LONGCTX = {"longctx": None}
OTHER_TEXT = {"prepare.world.long": None, "prepare.long": [{"path": "a.jsonl"}]}
GIVEN = {"base.scratch": None, "base.path": "model", "prepare.tokenizer": None}
# Keys that cannot simply get the next value: what must be set beforehand, and the other value.
SPECIAL = {
    "prepare": ({}, {"world": {"documents": 500, "long": {"context": 64}}}),
    "base": ({}, {"scratch": {"context": 64, "layers": 3}}),
    "prepare.world": ({"prepare.sft": [{"path": "a.jsonl"}]}, {"documents": 500, "long": {"context": 64}}),
    "prepare.world.long": ({}, {"context": 64, "documents": 500}),
    "prepare.world.long.context": (NO_LONGCTX, 32),
    "prepare.world.long.factor": (NO_LONGCTX, 8),
    "prepare.tokenizer": ({}, {"vocab_size": 600}),
    "prepare.tokenizer.vocab_size": ({}, 600),
    "prepare.tokenizer.path": ({"prepare.tokenizer": {"path": "model"}}, "model-b"),
    "prepare.tokenizer.hub": ({"prepare.tokenizer": {"hub": HUB}}, HUB | {"id": "other/model"}),
    "prepare.tokenizer.hub.id": ({"prepare.tokenizer": {"hub": HUB}}, "other/model"),
    "prepare.tokenizer.hub.revision": ({"prepare.tokenizer": {"hub": HUB}}, LATER),
    "prepare.tokenizer.hub.allow_floating": ({"prepare.tokenizer": {"hub": HUB}}, True),
    "prepare.chat_template": ({}, "a.jinja"),
    "prepare.max_tokens": ({}, 60),
    "prepare.group_key": (SOURCE, "kind"),
    "prepare.test_fraction": (SOURCE, 0.2),
    "prepare.allow_empty_user": (SOURCE, True),
    "prepare.max_line_mb": (SOURCE, 8.0),
    "base.path": (GIVEN, "model-b"),
    "base.hub": ({**GIVEN, "base.path": None, "base.hub": HUB}, HUB | {"id": "other/model"}),
    "base.hub.id": ({**GIVEN, "base.path": None, "base.hub": HUB}, "other/model"),
    "base.hub.revision": ({**GIVEN, "base.path": None, "base.hub": HUB}, LATER),
    "base.hub.allow_floating": ({**GIVEN, "base.path": None, "base.hub": HUB}, True),
    "base.scratch": ({}, {"context": 64, "layers": 3}),
    "base.scratch.context": (NO_LONGCTX, 80),
    "base.scratch.positions": (NO_LONGCTX, "alibi"),
    "base.scratch.heads": ({}, 2),
    "sft": ({}, {"method": "lora"}),
    "sft.virtual_tokens": (
        {"sft.method": "prefix", "longctx.policy": "base", **dict.fromkeys(("reward", "ppo", "dpo"))},
        8,
    ),
    "sft.max_length": ({}, 80),
    "reward.max_length": ({}, 80),
    "dpo.max_length": ({}, 80),
    "sft.method": ({}, "lora"),
    "reward": ({}, {"steps": 10}),
    "ppo": ({}, {"steps": 10}),
    "ppo.reward_function": ({"ppo.reward_function": "reward.py:short"}, "reward.py:long"),
    "ppo.kl_target": ({}, 3.0),
    "ppo.kl_horizon": ({"ppo.kl_target": 3.0}, 500),
    "ppo.rails": ({}, {"max_kl": 40.0}),
    "reference": ({}, {"batch_size": 32}),
    "dpo": ({}, {"beta": 0.3}),
    "dpo.loss": ({}, ["hinge"]),
    "dpo.loss_weights": ({"dpo.loss": ["sigmoid", "hinge"]}, [1.0, 0.5]),
    "dpo.label_smoothing": ({"dpo.loss": ["robust"]}, 0.2),
    "longctx": ({}, {"steps": 10}),
    "longctx.micro_batch_size": ({}, 4),
    "longctx.factor": (OTHER_TEXT, 2.0),
    "longctx.policy": ({}, "sft"),
    "lengths": ({}, {"tokens": [64]}),
    "lengths.tokens": ({}, [64, 128]),
    "compare": ({}, {"prompts": 100}),
    "evaluate": ({}, {"limit": 5}),
    "evaluate.chat_template": ({}, False),
    "evaluate.tasks": ({}, [{"task": "world"}]),
    "evaluate.tasks[].task": ({"evaluate.tasks": [{"task": "world"}]}, "passkey_64"),
    "evaluate.tasks[].revision": ({"evaluate.tasks": [{"task": "sciq", "revision": COMMIT}]}, LATER),
    "evaluate.tasks[].allow_floating": ({"evaluate.tasks": [{"task": "sciq", "revision": COMMIT}]}, True),
    "evaluate.tasks[].shots": ({"evaluate.tasks": [{"task": "world"}]}, 2),
    "compare.reward_function": ({}, "refused"),
    "compare.reward_code": ({}, "refused"),
    "ppo.reward_code": ({}, "refused"),
}
for source in SOURCES:
    rows = {"dataset": "some/rows", "revision": COMMIT}
    held = [] if source in ("text", "long") else [{"path": "a.jsonl"}]
    fields = {"path": ({"path": "a.jsonl"}, "b.jsonl"), "dataset": (rows, "other/rows"), "revision": (rows, LATER)}
    fields |= {"allow_floating": (rows, True), "subset": (rows, "part"), "rows": (rows, "test")}
    fields |= {"format": ({"path": "a.jsonl"}, FORMAT[source]), "separator": ({"path": "a.jsonl"}, " ")}
    fields |= {"use": ({"path": "a.jsonl"}, "train")}
    SPECIAL[f"prepare.{source}"] = ({f"prepare.{source}": [{"path": "a.jsonl"}]}, [{"path": "b.jsonl"}])
    for key, (before, value) in fields.items():
        SPECIAL[f"prepare.{source}[].{key}"] = ({f"prepare.{source}": [before]}, value)
# Keys whose value reaches further than their own section; declared where the key stands, as `also`.
FURTHER = {
    "base.scratch.context": RERUN["prepare"],
    "base.path": RERUN["prepare"],
    "base.hub": RERUN["prepare"],
    "base.hub.id": RERUN["prepare"],
    "base.hub.revision": RERUN["prepare"],
    "base.hub.allow_floating": RERUN["prepare"],
    "base.scratch": RERUN["base"],
    "ppo.reward_function": RERUN["ppo"] | RERUN["compare"],
}
REFUSED = ("reward_code", "compare.reward_function", "choices[].format", "choices[].use", "choices[].separator")
REFUSED += ("text[].separator", "long[].separator")


def next_value(key: str, field, value):
    """Another value of a key than its own or its default."""
    value = field.default if value is None else value
    text = str(field.annotation)
    if isinstance(value, bool):
        return not value
    if "target_modules" in key:
        return MODULES
    if "Literal" in text:
        choices = [choice for choice in schema.literals(field.annotation)]
        return choices[(choices.index(value) + 1) % len(choices)]
    if isinstance(value, int):
        return value + (64 if "size" in key and "64" in str(field.metadata) else 1)
    if isinstance(value, float):
        return value * 0.9 or 0.05
    if value is None or isinstance(value, str):
        return "another" if "str" in text else 16 if "int" in text else 0.5
    raise AssertionError(f"{key}: say in SPECIAL what its other value is")


def conditions(key: str, field) -> dict:
    """What must be set for a key to have an effect: its `only_with`."""
    only = (field.json_schema_extra or {}).get("only_with", {})
    return {f"{key.rpartition('.')[0]}.{other}": values[0] for other, values in only.items()}


def put(values: dict, key: str, value) -> None:
    """Set a dotted key of nested mappings; `tasks[].x` of the first item of a list."""
    *above, last = key.split(".")
    for part in above:
        values = values[part[:-2]][0] if part.endswith("[]") else values.setdefault(part, {})
    values[last] = value


def get(values, key: str):
    for part in key.split("."):
        values = (values or {}).get(part.removesuffix("[]"))
        values = values[0] if part.endswith("[]") and values else values
    return values


@pytest.mark.parametrize(
    ("key", "field"), [pytest.param(key, field, id=key) for key, field in keys() if key != "extends"]
)
def test_a_key_reruns_the_stage_of_its_section_and_what_descends_from_it(project, key, field):
    file = Path("config/experiments/whole.yaml")
    values = yaml.safe_load((HERE / "whole/experiments/whole.yaml").read_text())
    before, value = SPECIAL.get(key) or (conditions(key, field), next_value(key, field, get(values, key)))
    for other, setting in before.items():
        put(values, other, copy.deepcopy(setting))
    if any(key.endswith(end) for end in REFUSED):
        put(values, key, value)
        file.write_text(yaml.safe_dump(values))
        with pytest.raises(UserError, match=r"no effect|written by the workflow|it should be"):
            campaign.load("config/config.yaml")
        return
    file.write_text(yaml.safe_dump(values))
    fabricate(campaign.load("config/config.yaml"))
    assert rerun() == {}, "control"
    put(values, key, value)
    file.write_text(yaml.safe_dump(values))
    planned = {name for name in rerun() if not name.startswith("fetch/")}
    said = why.to_run(why.survey(campaign.load("config/config.yaml")))
    assert {folder.removeprefix("results/") for folder in said} == planned, "`posttrain why` says what Snakemake does"
    found = {name.removeprefix("whole/") for name in planned if not name.startswith("other/")}
    expected = FURTHER.get(key, RERUN[key.partition(".")[0]])
    there = {
        folder.removeprefix("results/whole/").removeprefix("results/")
        for folder in campaign.load("config/config.yaml").folders()
    }
    assert found == expected & there


@pytest.fixture
def package(project, root, tmp_path, monkeypatch):
    """A copy of the package that may be edited, whose code counts; and the campaign as at first."""
    shutil.copy(HERE / "whole/experiments/whole.yaml", "config/experiments/whole.yaml")
    shutil.copytree(root / "workflow/posttrain", tmp_path / "posttrain", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", tmp_path / "posttrain")
    forget()
    fabricate(campaign.load("config/config.yaml"))
    yield tmp_path / "posttrain"
    monkeypatch.undo()
    forget()


def forget() -> None:
    code.module.cache_clear()
    code.fingerprint_of.cache_clear()


PACKAGE = Path(code.__file__).parent
MODULES_OF = sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))
REACHED = {  # a few, by hand; the others by what `code.code` lists, which `test_nothing_else_is_loaded` holds to
    "world.py": {"prepare", "ppo", "compare"},
    "muon.py": {"base", "longctx", "lengths"},
    "maths/rope.py": set(),  # speaks in the tests alone: transformers does the arithmetic
    "maths/ppo.py": {"reference", "ppo", "dpo", "compare"},
    "ppo_health.py": {"ppo"},
    "figures.py": {"report"},
    "stages/sft.py": {"sft"},
    "stages/dpo.py": {"dpo"},
    "stages/reward.py": {"reward", "ppo", "dpo", "compare"},
    "config.py": set(),
    "progress.py": set(),
    "campaign.py": set(),
    "__main__.py": set(),
}


@pytest.mark.parametrize("module", MODULES_OF)
def test_a_module_reruns_the_stages_that_reach_it_and_formatting_reruns_none(package, module):
    file = package / module
    text = file.read_text()
    name = module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    file.write_text("# A comment.\n" + text.replace("\n\n\n", "\n\n\n\n# another\n") + "\n\n")
    forget()
    assert rerun() == {}
    file.write_text(text + "\n\nNEW = 1\n")
    forget()
    stages = {stage for stage in campaign.load("config/config.yaml").code if name in code.code(stage)}
    assert stages == REACHED.get(module, stages)
    expected = set().union(*({"report"} if stage == "report" else of_stage(stage) for stage in stages))
    assert {name.removeprefix("whole/") for name in rerun() if not name.startswith("other/")} == expected


def of_stage(stage: str) -> set[str]:
    """What reruns for another code of a stage: itself and what descends from it."""
    return RERUN[stage] | ({stage} if stage in ("prepare", "base") else set())


def test_nothing_else_is_loaded():
    """What a stage's module loads when it is imported is among what counts."""
    for stage in RERUN.keys() - {"seed", "question"}:
        script = f"import sys, posttrain.stages.{stage}; print(*(m for m in sys.modules if m.startswith('posttrain.')))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        loaded = {module.removeprefix("posttrain.") for module in done.stdout.split()} - {"stages"}
        counted = code.code(stage).keys() | set(code.UNCOUNTED) | {"maths"}
        assert loaded <= counted, stage
    assert "world" not in code.code("sft"), "control: something does not count"


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


def edit(key: str, value) -> None:
    """Set a key of `whole`."""
    file = Path("config/experiments/whole.yaml")
    values = yaml.safe_load(file.read_text())
    put(values, key, value)
    file.write_text(yaml.safe_dump(values))


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


def test_a_file_cut_short_is_named_and_its_stage_made_anew(package, capsys):
    file = Path("results/whole/sft/model/bytes")
    file.write_text("short")
    os.utime("results/whole/sft/manifest.json")  # as after a pull, which writes them all
    found = rerun()
    assert "results/whole/sft/model/bytes: is not of the size" in capsys.readouterr().err
    assert {"whole/sft", "whole/dpo", "report"} <= found.keys() and "whole/base" not in found
    assert rerun().keys() == found.keys(), "until it is made"


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
    code._known.cache_clear()
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
    (package / "helper/__init__.py").write_text("X = 1\n")
    (package / "aside.py").write_text("Y = 1\n")
    text = (package / "stages/dpo.py").read_text()
    (package / "stages/dpo.py").write_text(f"{text}\nfrom posttrain.helper import X\nfrom ..aside import Y\n")
    forget()
    assert {"helper", "aside"} <= code.code("dpo").keys() and "helper" not in code.code("sft")
    before = code.fingerprint_of("dpo")
    (package / "aside.py").write_text("Y = 2\n")
    forget()
    assert code.fingerprint_of("dpo") != before
    (package / "__init__.py").write_text("import random\n")
    forget()
    assert "__init__" in code.code("sft"), "every stage runs it"


def test_broken_code_is_named(package):
    (package / "stages/dpo.py").write_text("def dpo(:\n")
    forget()
    with pytest.raises(UserError, match=r"dpo.py: is no Python module that can be read"):
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
    assert len({canonical(campaign.load(path).summary()) for path in paths}) == 1


def test_a_job_that_waited_reads_the_plan_of_its_own_run(package):
    """As a cluster starts it: in a process of its own, which parses the workflow again, after the config was edited."""
    frozen = write_named(campaign.load("config/config.yaml").freeze())
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
