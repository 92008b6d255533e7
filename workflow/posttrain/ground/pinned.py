"""Refuse another version of a package than the one whose private interface is patched or parsed here."""

from importlib.metadata import PackageNotFoundError, version

from posttrain.ground.errors import UserError


def require(package: str, pinned: str, used: str) -> None:
    """Raise UserError unless `package` is installed in version `pinned`.

    package: as a package index names it. used: what of it is private and used here, as in "the format of its records".
    """
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "none"
    if installed != pinned:
        raise UserError(
            f"{package}: found version {installed}, needed is {pinned}: {used} may differ in any other, and runs would "
            f"go wrong without a word. Install it: python -m pip install {package}=={pinned}"
        )
