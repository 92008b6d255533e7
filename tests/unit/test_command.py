"""The config in a Snakemake command line is read as in a file, and what cannot be read is told in a line."""

from pathlib import Path

import pytest
import yte

from posttrain.engine import command
from posttrain.ground.errors import UserError

PROFILE = Path(__file__).parents[2] / "workflow/profiles/default/config.yaml"


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("strict=true", {"strict": True}),
        ("strict=yes", {"strict": "yes"}),
        ("grid={seed: [0, 1], dpo.beta: [1e-1]}", {"grid": {"seed": [0, 1], "dpo.beta": [0.1]}}),
        ("keep_gb=0", {"keep_gb": 0}),
        ("title='5'", {"title": "5"}),
        ("title=010", {"title": "010"}),
        ("title=1_000", {"title": "1_000"}),
        ("title=a=b", {"title": "a=b"}),
        ("title=", {"title": None}),
        ("experiments=[one, two]", {"experiments": ["one", "two"]}),
    ],
)
def test_a_setting_is_read_as_in_a_file(entry, value):
    """Whatever Snakemake makes of it."""
    key = entry.partition("=")[0]
    for option in ("--config", "-C"):
        assert command.overrides(["snakemake", "-n", option, entry, "--cores", "2"], {key: "other"}) == value


def test_sections_given_twice_are_merged_and_a_profiles_settings_are_typed():
    line = ["snakemake", "--config", "wandb={mode: offline}", "wandb={project: mine}"]
    assert command.overrides(line, {"grid": {"seed": ["0", "1"]}, "keep_gb": 5}) == {
        "grid": {"seed": [0, 1]}, "keep_gb": 5, "wandb": {"mode": "offline", "project": "mine"},
    }  # fmt: skip
    assert command.overrides(["snakemake"], {}) == {}


def test_settings_that_are_no_yaml_are_all_told():
    with pytest.raises(UserError) as told:
        command.overrides(["snakemake", "--config", "grid={seed: [0", "title=!!set {a}"], {})
    assert told.value.problems[0].startswith("--config: grid: not valid YAML")
    assert "the tag" in told.value.problems[1]
    with pytest.raises(UserError, match="--config:1: nested more than 50 deep"):
        command.overrides(["snakemake", "--config", f"grid={'[' * 3000}"], {})


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, ": cannot be read: No such file or directory (looked for in "),
        ("title: café\n".encode("latin-1"), ":1: the byte 0xe9 is not UTF-8"),
        ("title: a\n".encode("utf-16"), ":1: is in UTF-16"),
        (b"experiments: [one]\ntitle: 2024-13-45\n", ":2: Snakemake cannot read 2024-13-45: month must be in 1..12"),
        (b"experiments: [one\n", ":2: not valid YAML"),
        (b"[one]\n", ":1: found a sequence"),
    ],
)
def test_a_campaign_that_snakemake_cannot_read_is_told_before_it_tries(here, monkeypatch, capsys, content, line):
    """By the profile, which Snakemake reads first. Controls: a job of a run, and a campaign that can be read."""
    file = here / "mine.yaml"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["snakemake", "--configfile", "mine.yaml", "-n"])
    with pytest.raises(SystemExit, match="2"):
        yte.process_yaml(PROFILE.read_text(), require_use_yte=True)
    assert capsys.readouterr().err.startswith(f"mine.yaml{line}")
    command.check_configfile(["snakemake", "--mode", "remote", "--configfile", "mine.yaml"])
    file.write_text("experiments: [one]\ntitle: 2024-12-24\n")
    assert yte.process_yaml(PROFILE.read_text(), require_use_yte=True)["keep-going"] is True
