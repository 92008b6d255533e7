"""The two lists of pins: envs/requirements.txt is what a run needs, envs/tests.txt what only tests and linters need."""

import ast
import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from posttrain.engine import environment

REQUIRED = "# What those require"
CUDA = ("nvidia-", "cuda-", "triton")  # what a CUDA build of torch requires, in versions of its own


def pins(file: Path) -> dict[str, tuple[str, bool]]:
    """Version of each package in a list, and whether the project itself uses it (else another package requires it)."""
    listed, used = {}, True
    for line in file.read_text().splitlines():
        used = used and line != REQUIRED
        if "==" in line and not line.startswith("#"):
            name, version = line.split("==")
            assert canonicalize_name(name) not in listed, f"{name} stands twice in {file.name}"
            listed[canonicalize_name(name)] = version, used
    return listed


def roots(listed: dict[str, tuple[str, bool]]) -> set[str]:
    """The packages of a list that the project itself uses."""
    return {name for name, (_, used) in listed.items() if used}


def closure(names: Iterable[str]) -> set[str]:
    """Some packages and all that they require here, by the metadata of what is installed."""
    reached, todo = set(), [(name, frozenset()) for name in names]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in reached or name.startswith(CUDA):
            continue
        reached.add((name, extras))
        for requirement in map(Requirement, importlib.metadata.requires(name) or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in reached}


def imported(folder: Path) -> set[str]:
    """The packages from outside that the modules in a folder import, inside functions too."""
    modules = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    owners = importlib.metadata.packages_distributions()
    outside = modules - set(sys.stdlib_module_names) - {"posttrain"}
    return {canonicalize_name(owners.get(module, [module])[0]) for module in outside}


@pytest.fixture
def run(root):
    return pins(root / "envs/requirements.txt")


@pytest.fixture
def tests(root):
    return pins(root / "envs/tests.txt")


def test_each_list_holds_what_its_packages_require_and_no_more(root, run, tests):
    needed = closure(roots(run))
    assert set(run) == needed
    assert set(tests) == closure(roots(tests)) - needed, "no pin stands in both lists"
    assert "\n-r requirements.txt\n" in (root / "envs/tests.txt").read_text()
    assert "moto" not in needed and {"boto3", "werkzeug"} <= closure({"moto"}), "control: what is required is followed"


def test_the_pins_are_what_is_installed(run, tests):
    for name, (version, _) in {**run, **tests}.items():
        assert importlib.metadata.version(name).partition("+")[0] == version, name


def test_a_run_imports_nothing_that_only_tests_have(root, tmp_path, run, tests):
    assert imported(root / "workflow") <= set(run)
    (tmp_path / "module.py").write_text("def late():\n    from pytest import fixture\n    import moto.server\n")
    assert imported(tmp_path) == {"pytest", "moto"} <= set(tests), "control"


def test_the_conda_environment_holds_every_pin_itself(root, tmp_path, monkeypatch):
    """Snakemake copies its file alone, into a folder and into an image, where a list beside it is missing."""
    monkeypatch.chdir(tmp_path)
    written = Path(environment.conda_environment(root / "envs"))
    *others, packages = yaml.safe_load(written.read_text())["dependencies"]
    listed = pins(root / "envs/requirements.txt")
    assert packages["pip"] and {canonicalize_name(pin.split("==")[0]) for pin in packages["pip"]} == listed.keys()
    assert all("==" in pin for pin in packages["pip"]) and "python=3.11" in others
    before = written.stat().st_mtime_ns
    environment.conda_environment(root / "envs")
    assert written.stat().st_mtime_ns == before, "written once"
    assert "-r requirements.txt" in (root / "envs/environment.yaml").read_text(), "control: no pin stands there"
