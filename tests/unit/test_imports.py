"""The contracts of `lint-imports` (pyproject.toml) hold, and each fails for an import that it forbids."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

# For each contract an import that it forbids: (importing module, imported module, start of the contract's name)
FORBIDDEN = [
    ("maths/ppo", "posttrain.dag.plan", "A room imports only the rooms below it"),
    ("stages/dpo", "posttrain.stages.base", "No stage imports another stage"),
    ("ground/errors", "posttrain.ground.files", "No imports in a circle"),
    ("stages/sft", "posttrain.jobs.slurm", "No stage knows of jobs, clusters or tools"),
    ("config/grid", "posttrain.data.rows", "The config knows no data"),
    ("resources/memory", "posttrain.cluster.sites", "Estimates of resources know no cluster"),
    ("stages/ppo", "posttrain.world.gold", "Only prepare and the checks of the config import"),
    ("tools/why", "snakemake", "The package imports no Snakemake"),
    ("dag/plan", "torch", "Reading the config and planning load no library that trains"),
]


def lint(folder: Path) -> tuple[int, str]:
    """Exit code and output of `lint-imports` for the package in a folder."""
    run = subprocess.run(
        ["lint-imports", "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "workflow")},
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.fixture
def copied(root, tmp_path) -> Path:
    """A copy of the package and its contracts that may be edited."""
    shutil.copy(root / "pyproject.toml", tmp_path)
    shutil.copytree(root / "workflow/posttrain", tmp_path / "workflow/posttrain")
    return tmp_path


def test_the_contracts_hold(root):
    code, output = lint(root)
    assert code == 0 and "KEPT" in output, output


def test_a_forbidden_import_breaks_its_contract(copied):
    """One for each contract, in one run. The import stands inside a function: those count too."""
    for module, imported, _ in FORBIDDEN:
        with open(copied / f"workflow/posttrain/{module}.py", "a") as file:
            file.write(f"\n\ndef added():\n    import {imported}\n")
    code, output = lint(copied)
    assert code == 1 and "0 kept" in output, output
    told = re.split(r"\n(?=.+\n---+\n)", output.partition("Broken contracts")[2])
    for module, imported, contract in FORBIDDEN:
        (why,) = [text for text in told if text.startswith(contract)]
        one, other = module.rpartition("/")[2], imported.rpartition(".")[2]
        assert re.search(rf"\b({one} -> .*\b{other}|{other} -> .*\b{one})\b", why), why


def test_a_new_room_must_be_given_a_place(copied):
    room = copied / "workflow/posttrain/attic"
    room.mkdir()
    (room / "__init__.py").touch()
    code, output = lint(copied)
    assert code == 1 and "attic" in output, output
