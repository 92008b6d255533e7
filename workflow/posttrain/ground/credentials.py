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
    try:
        with open(os.environ.pop(PLACE, "")) as file:
            secrets = json.load(file)
    except OSError:  # none were hidden, or their run has ended
        return
    for name, secret in secrets.items():
        os.environ.setdefault(name, secret)
