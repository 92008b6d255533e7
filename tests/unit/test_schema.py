"""The generated documentation of the config is true."""

from pathlib import Path

import jsonschema
import pytest

from posttrain.config.settings import read_settings
from posttrain.dag import campaign
from posttrain.ground.errors import UserError
from posttrain.tools import schema


def test_schema_and_reference_are_up_to_date(root, tmp_path):
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "README.md").write_text((root / "config/README.md").read_text())
    schema.write(folder)
    for name in ("schema.json", "README.md"):
        same = (folder / name).read_text() == (root / "config" / name).read_text()
        assert same, f"config/{name} is out of date: run `posttrain schema`"


def test_every_key_is_described():
    assert "|  |  |\n" not in schema.reference()
    for line in schema.reference().splitlines():
        if line.startswith("| `"):
            assert line.split(" | ")[-1].strip(" |"), f"no description: {line}"


def test_our_campaigns_are_valid(root, monkeypatch):
    monkeypatch.chdir(root)
    campaigns = sorted(Path("config").glob("*.yaml"))
    assert campaigns
    for file in campaigns:
        campaign.load(file)
    with pytest.raises(UserError):
        campaign.load(campaigns[0], {"experiments": ["absent"]})


def test_the_schema_accepts_our_experiments_and_refuses_a_typo(root):
    files = sorted((root / "config/experiments").glob("*.yaml"))
    assert files
    for file in files:
        jsonschema.validate(dict(read_settings(file)), schema.schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"sft": {"stesp": 3}}, schema.schema())
