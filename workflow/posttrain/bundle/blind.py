"""Take names of people and machines and absolute paths out of a bundle, and refuse it where they or secrets remain.

Settings, records and logs are rewritten. The files of an artifact and the code are not: their checksums are what the
results rest on.
"""

import contextlib
import functools
import getpass
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from posttrain.bundle.contents import CODE, OWN, PROJECT, Part
from posttrain.ground import credentials

SHORTEST = 4  # characters of a name from which it is searched for in every file: a shorter one is part of other words
COMMON = {"root", "user", "admin", "home", "localhost", "ubuntu", "debian", "runner", "node", "none", "unknown"}
ANONYMOUS = "anonymous"

# An absolute path of two parts or more, but no URL's and no part of a relative path. In JSON a line break before it is
# written as two signs.
PATH = re.compile(r"(?:(?<=\\[nrt])|(?<=file://)|(?<![\w./~<@+-]))/(?:[\w.@+=-]+/)+([\w.@+=-]*)")
SYSTEM = re.compile(r"/(usr|bin|lib|lib64|proc|sys|dev|etc)/")  # the same on every machine

SECRETS = {
    "a token of the Hugging Face hub": rb"\bhf_[A-Za-z0-9]{30,}",
    "a key of OpenAI or Anthropic": rb"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{20,}",
    "a token of GitHub": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "a key of AWS": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a token of Slack": rb"\bxox[abpros]-[A-Za-z0-9-]{10,}",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
    "a password within a URL": rb"\b[a-z][a-z0-9+.-]*://[^/\s:@\"'<>{}]+:[^/\s:@\"'<>{}]{3,}@",
}
SECRET = re.compile(b"|".join(b"(%s)" % pattern for pattern in SECRETS.values()))


def secret_in(content: bytes, kept: Iterable[bytes]) -> str | None:
    """What kind of secret a file holds; None where it holds none. kept: secrets of this machine's environment."""
    if match := SECRET.search(content):
        return list(SECRETS)[(match.lastindex or 1) - 1]
    return "a secret of the environment" if any(value in content for value in kept) else None


def environment_secrets() -> list[bytes]:
    """The values of the environment's tokens, keys and passwords."""
    return [value.encode() for value in credentials.known().values() if len(value) >= 8]


class Names:
    """The names of people, machines and folders that a blind bundle must not hold."""

    def __init__(self, hosts: Iterable[str]):
        """hosts: machines on which artifacts were made."""
        machines = {name for host in [*hosts, platform.node()] for name in (host, host.partition(".")[0])}
        machines = {name for name in machines if name and not name.isdigit()}  # a part of an address
        self.machines = {name: f"machine-{number}" for number, name in enumerate(sorted(machines), 1)}
        self.people = sorted({name for name in people() if is_telling(name)}, key=len, reverse=True)
        self.folders = [str(folder) for folder in dict.fromkeys([Path.cwd(), PROJECT]) if len(folder.parts) > 2]
        self.home = os.path.expanduser("~")

    @functools.cached_property
    def searched(self) -> list[tuple[str, re.Pattern]]:
        """(what, a pattern) of each name that no file may hold."""
        folders = [*self.folders, *([self.home] if self.home.startswith(("/home/", "/Users/")) else [])]
        names = [name for name in [*self.machines, *self.people] if is_telling(name)]
        edges = rb"(?<![\w-])%s(?![\w-])"
        return [
            *((f"the folder {folder}", re.compile(re.escape(folder.encode()) + rb"(?![\w-])")) for folder in folders),
            *((f"the name {name}", re.compile(edges % re.escape(name.encode()))) for name in names),
        ]  # fmt: skip

    def replaced(self, text: str) -> str:
        """A text of the campaign without these names: paths below the project are relative, of others the last part is
        left."""
        for folder in self.folders:
            text = re.sub(re.escape(folder) + r"(?:/|(?![\w.-]))", "./", text)
        text = PATH.sub(lambda path: path.group() if SYSTEM.match(path.group()) else f"PATH/{path.group(1)}", text)
        for name, other in [*self.machines.items(), *((name, ANONYMOUS) for name in self.people)]:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", other, text)
        return text

    def held(self, content: bytes) -> str | None:
        """The first of the names that a file holds; None where it holds none."""
        return next((what for what, pattern in self.searched if pattern.search(content)), None)


def is_telling(name: str) -> bool:
    """Whether a name tells of someone or something: it is neither a common word nor too short to be searched for."""
    return len(name) >= SHORTEST and name.lower() not in COMMON


def people() -> Iterator[str]:
    """The names of this machine's user, and of the authors of the project's commits with their addresses."""
    with contextlib.suppress(KeyError, OSError):  # a user without an entry, as in a container
        yield getpass.getuser()
    for arguments in (["config", "user.name"], ["config", "user.email"], ["log", "--format=%an%n%ae%n%cn%n%ce"]):
        run = subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True)
        yield from dict.fromkeys(run.stdout.splitlines())


def content_of(part: Part, names: Names | None) -> bytes:
    """The bytes of a file as the bundle has them. names: None for a bundle that is not blind."""
    content = part.file.read_bytes()
    if names is None or (part.kind != OWN and part.name != "CITATION.cff"):
        return content
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return content
    return without_authors(text).encode() if part.name == "CITATION.cff" else names.replaced(text).encode()


def without_authors(citation: str) -> str:
    """CITATION.cff with one author, who is anonymous."""
    return re.sub(r"(?m)^authors:\n(?:[ \t-].*\n)+", f"authors:\n  - name: {ANONYMOUS}\n", citation)


def faults(part: Part, content: bytes, names: Names | None, secrets: list[bytes]) -> str | None:
    """Why a file cannot be in the bundle; None where it can."""
    if kind := secret_in(content, secrets):
        return f"{part.name}: holds {kind}; take it out"
    held = names.held(content) if names else None
    if held is None:
        return None
    way_out = "name files relative to the project and run the stage again" if part.kind != CODE else "take it out"
    return f"{part.name}: holds {held}; {way_out}, or bundle with --named"
