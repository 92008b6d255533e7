"""The code that runs is the code of the folder: clones, worktrees and images that share an environment."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from project import commit_of, copy_of

from posttrain.ground import code
from posttrain.ground.errors import UserError
from posttrain.jobs import provenance


@pytest.fixture(scope="module")
def clone(root, tmp_path_factory) -> Path:
    """A second clone, which has no environment of its own."""
    return copy_of(root, tmp_path_factory.mktemp("clone"))


def run(folder: Path, line: str) -> subprocess.CompletedProcess:
    """A command line in a folder, with the environment of the first clone active."""
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(code.PACKAGE.parent)}
    return subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, env=os.environ | paths)


def test_commands_of_a_second_clone_do_not_run_the_code_of_the_first(clone):
    refused = run(clone, "posttrain why")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    expected = f"not this folder's {clone}/workflow/posttrain: make setup && source .venv/bin/activate"
    assert expected in refused.stderr
    assert run(clone, "PYTHONPATH=workflow posttrain check").returncode == 0, "control: its own package"


# As much of conda as Snakemake calls: an environment's file must name torch's version, in itself or in a file that lies
# beside it. Its Python is that of these tests, and says that it runs.
CONDA = """#!{python}
import json, os, re, sys
call = sys.argv[1:]
if call[0] == "info":
    folders = dict.fromkeys(["conda_prefix", "root_prefix"], {folder!r})
    print(json.dumps(folders | {{"platform": "linux-64", "envs_dirs": []}}))
elif call[0] == "--version":
    print("conda 24.11.1")
elif call[0] == "config":
    print(json.dumps({{"get": {{"channel_priority": "strict"}}}}))
elif "create" in call:
    file, prefix = (call[call.index(option) + 1] for option in ("--file", "--prefix"))
    content = open(file).read()
    for beside in re.findall("-r (.*)", content):
        open(os.path.join(os.path.dirname(file), beside))
    assert "torch==" in content or "-r " in content
    os.makedirs(prefix + "/bin")
    with open(prefix + "/bin/python", "w") as script:
        script.write("#!/bin/sh\\necho conda runs $3 >&2\\nexec {python} \\"$@\\"\\n")
    os.chmod(prefix + "/bin/python", 0o755)
"""


@pytest.fixture
def conda(tmp_path) -> Path:
    """A folder of commands with conda, and its script that activates an environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "conda").write_text(CONDA.format(python=sys.executable, folder=str(tmp_path)))
    (folder / "conda").chmod(0o755)
    (folder / "activate").write_text('export PATH="$1/bin:$PATH" CONDA_PREFIX="$1"\n')
    return folder


def test_the_plan_and_the_jobs_of_a_second_clone_run_its_own_code(clone, conda):
    """So does an experiment that DVC queued: it runs the ledger's command in a copy of the folder. With `--sdm conda`
    the environment's Python runs it; the environment's file is copied without any file beside it."""
    command = yaml.safe_load((clone / "dvc.yaml").read_text())["stages"]["campaign"]["cmd"]
    assert run(clone, f"{command} -n").returncode == 0
    package = clone / "workflow/posttrain"
    for module, text in (("stages/prepare.py", "the edited stage"), ("dag/frozen.py", "the edited plan")):
        with (package / module).open("a") as file:
            file.write(f"\nprint('{text}', __file__)\n")
    line = f"{command.replace('--cores all', '--cores 1')} results/tiny/prepare/manifest.json --sdm conda"
    ran = run(clone, f"PATH={conda}:$PATH {line}")
    assert "conda runs attempt" in ran.stdout + ran.stderr, ran.stderr[-2000:]
    assert f"the edited plan {package}" in ran.stdout, ran.stderr
    assert f"the edited stage {package}" in ran.stdout + ran.stderr
    made = json.loads((clone / "results/tiny/prepare/provenance.json").read_text())
    assert made["git_commit"] == "unknown", "the first clone's commit is not this one's"


def test_an_image_of_an_earlier_edit_is_to_be_built_anew(root, tmp_path, monkeypatch):
    image = tmp_path / "image/posttrain"
    shutil.copytree(root / "workflow/posttrain", image, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "PACKAGE", image)
    monkeypatch.setenv("APPTAINER_CONTAINER", "posttrain.sif")
    code.refuse_other_package(root / "workflow")
    with (image / "stages/sft.py").open("a") as module:
        module.write("# an edit\n")
    (image / "templates/report.html.j2").unlink()
    with pytest.raises(UserError) as refused:
        code.refuse_other_package(root / "workflow")
    assert "stages/sft.py, templates/report.html.j2: apptainer build --force posttrain.sif" in str(refused.value)


def test_a_project_inside_another_repository_has_no_commit_of_that(tmp_path, monkeypatch):
    package = tmp_path / "project/workflow/posttrain"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(provenance, "PACKAGE", package)
    assert commit_of(tmp_path) and provenance._git_commit() == "unknown"
    assert commit_of(tmp_path / "project") == provenance._git_commit(), "control: its own repository"
