"""Remove tokens and keys from the environment of jobs; only `fetch` gets them back.

They are moved to a file in memory that only this process and its children can open; jobs inherit its path.
"""

import json
import os
import re

SECRET = re.compile(r"(^|_)(TOKEN|API_KEY|ACCESS_KEY|SECRET|SECRET_KEY|PASSWORD|PASSWD)$", re.IGNORECASE)
PLACE = "POSTTRAIN_CREDENTIALS"


def taken() -> dict[str, str]:
    """Remove the tokens and keys from the environment, and return them."""
    return {name: os.environ.pop(name) for name in list(os.environ) if SECRET.search(name)}


def hide() -> None:
    """Move this process's tokens and keys to a file in memory, which its children can read until it ends."""
    if secrets := taken():
        file = os.memfd_create("credentials")
        os.write(file, json.dumps(secrets).encode())
        os.environ[PLACE] = f"/proc/{os.getpid()}/fd/{file}"


def reveal() -> None:
    """Put the hidden tokens and keys back into the environment, except those that it holds again."""
    for name, secret in _hidden(os.environ.pop(PLACE, "")).items():
        os.environ.setdefault(name, secret)


def known() -> dict[str, str]:
    """The tokens and keys of the environment, hidden ones too."""
    return _hidden(os.environ.get(PLACE, "")) | {name: os.environ[name] for name in os.environ if SECRET.search(name)}


def _hidden(file: str) -> dict[str, str]:
    """The tokens and keys in a file of `hide`; none where none were hidden, or their run has ended."""
    try:
        with open(file) as opened:
            return json.load(opened)
    except OSError:
        return {}
