"""Private interfaces of Snakemake and its SLURM executor are used in the pinned versions alone."""

import os
import subprocess

import pytest

from posttrain.engine import versions
from posttrain.ground.errors import UserError


def test_they_are_written_for_the_pinned_versions(root):
    pins = (root / "envs/requirements.txt").read_text().split()
    assert f"snakemake=={versions.SNAKEMAKE}" in pins
    assert f"snakemake-executor-plugin-slurm=={versions.SLURM_EXECUTOR}" in pins
    versions.check_snakemake()
    versions.check_slurm_executor()


@pytest.mark.parametrize(
    ("name", "check"),
    [("SNAKEMAKE", versions.check_snakemake), ("SLURM_EXECUTOR", versions.check_slurm_executor)],
)
def test_another_version_is_refused(monkeypatch, name, check):
    monkeypatch.setattr(versions, name, "1.2.3")
    with pytest.raises(UserError, match=r"needed is 1\.2\.3: .* python -m pip install snakemake"):
        check()


def test_snakemake_ends_before_it_plans(root, tmp_path):
    """With another version than the one that the room was written for."""
    before = "import importlib.metadata as m; own = m.version; m.version = lambda name: '1.2.3' if name == 'snakemake' "
    before += "else own(name)\n"
    (tmp_path / "sitecustomize.py").write_text(before)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    call = ["snakemake", "-n", "-q", "--cores", "1", "--directory", str(tmp_path)]
    run = subprocess.run(call, cwd=root, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert "snakemake: found version 1.2.3, needed is 9.27.1: the format of its records" in run.stderr
