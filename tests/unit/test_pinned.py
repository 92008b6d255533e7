"""Versions of packages whose private interfaces are used: any other one is refused, in words."""

from importlib.metadata import version

import pytest

from posttrain.ground import pinned
from posttrain.ground.errors import UserError


def test_the_pinned_version_is_let_through():
    pinned.require("snakemake", version("snakemake"), "the format of its records")


@pytest.mark.parametrize(
    ("package", "found"), [("snakemake", version("snakemake")), ("snakemake-that-nobody-has", "none")]
)
def test_another_version_is_refused_with_the_command_that_mends_it(package, found):
    with pytest.raises(UserError) as error:
        pinned.require(package, "1.2.3", "the format of its records")
    assert str(error.value) == (
        f"{package}: found version {found}, needed is 1.2.3: the format of its records may differ in any other, and "
        f"runs would fail silently. Install it: python -m pip install {package}==1.2.3"
    )
