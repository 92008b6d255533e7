"""Check the versions of packages whose private interfaces are patched or parsed here."""

from importlib.metadata import PackageNotFoundError, version

from posttrain.ground.errors import UserError


def require(package: str, pinned: str, used: str) -> None:
    """Raise UserError unless `package` is installed in version `pinned`.

    package: its name in the package index. used: the private parts used here, such as "the format of its records".
    """
    try:
        installed = version(package)
    except PackageNotFoundError:
        installed = "none"
    if installed != pinned:
        raise UserError(
            f"{package}: found version {installed}, needed is {pinned}: {used} may differ in any other, and runs would "
            f"fail silently. Install it: python -m pip install {package}=={pinned}"
        )
