"""What other programs read of the project, beside pyproject.toml: the citation, the catalog's file, GitHub's CI."""

import tomllib

import pytest
import yaml


@pytest.fixture
def project(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def test_the_citation_agrees_with_the_package(root, project):
    """The four required keys of Citation File Format 1.2.0, and what pyproject.toml and LICENSE say too."""
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"].startswith(project["name"])
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    (author,) = citation["authors"]
    license_text = (root / "LICENSE").read_text()
    assert author["name"] in license_text and f"{project['license']} License" in license_text
    assert f"## {project['version']} " in (root / "CHANGELOG.md").read_text()


def test_the_catalog_finds_what_standardised_usage_needs(root):
    usage = yaml.safe_load((root / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"}
    assert set(usage["mandatory-flags"]) == {"desc", "flags"}
    assert set(usage["software-stack-deployment"]) == {"conda", "apptainer", "apptainer+conda"}
    assert usage["report"] is True
    assert (root / "config/README.md").is_file() and (root / "workflow/Snakefile").is_file()
    assert list((root / "workflow/rules").glob("*.smk"))
    assert not (root / "Snakefile").exists(), "Snakemake would read that one"


def test_ci_is_one_command_everywhere(root, project):
    """GitHub's CI calls `.ci/run`, which calls README's test command, on the Python that the package asks for."""
    job = yaml.safe_load((root / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    setup = next(step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python"))
    assert project["requires-python"] == f">={setup['python-version']}"
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[-1] == ".ci/run" and "sudo" not in commands[-1]
    assert (root / ".ci/run").read_text().rstrip().endswith("\nmake test")
    assert "\nmake test " in (root / "README.md").read_text()
