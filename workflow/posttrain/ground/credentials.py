"""Tokens and keys leave the environment that jobs inherit; `fetch` alone gets them back.

They go into a file of this process that has no name and ends with it, and jobs inherit no more than its place.
"""

import json
import os
import re

SECRET = re.compile(r"(^|_)(TOKEN|API_KEY|ACCESS_KEY|SECRET|SECRET_KEY|PASSWORD|PASSWD)$", re.IGNORECASE)
PLACE = "POSTTRAIN_CREDENTIALS"


def taken() -> dict[str, str]:
    """The tokens and keys of the environment, which are removed from it."""
    return {name: os.environ.pop(name) for name in list(os.environ) if SECRET.search(name)}


def hide() -> None:
    """Keep this process's tokens and keys where only its own children on this machine can read them."""
    if secrets := taken():
        file = os.memfd_create("credentials")
        os.write(file, json.dumps(secrets).encode())
        os.environ[PLACE] = f"/proc/{os.getpid()}/fd/{file}"


def reveal() -> None:
    """Take them back into the environment; what the environment itself holds comes first."""
    try:
        with open(os.environ.pop(PLACE, "")) as file:
            secrets = json.load(file)
    except OSError:  # none were hidden, or their run has ended
        return
    for name, secret in secrets.items():
        os.environ.setdefault(name, secret)
