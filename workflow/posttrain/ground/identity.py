"""The identity of an artifact, a digest of its settings, code and inputs; and files named by their content."""

import hashlib
import json
from pathlib import Path

from posttrain.ground.files import write_text

DAMAGED = "damaged-manifest.json"  # the manifest of a damaged artifact is renamed to this


def canonical(value) -> str:
    """JSON with sorted keys and no spaces: equal values give equal texts."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def named(text: str) -> str:
    """The file for a text, named by the text's digest, so that its content does not change."""
    return f".snakemake/campaigns/{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def write_named(text: str) -> str:
    """Write a text to its file (`named`), and return the file's name."""
    file = Path(named(text))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
    return str(file)


def record_of(folder: Path) -> dict:
    """The `provenance.json` of an artifact; {} where it is missing or malformed."""
    try:
        record = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        whole = all(isinstance(value, str) for value in [record["stage"], *record["params"]])
        digests = [digest for files in record["inputs"].values() for digest in files.values()]
        json.loads(record["params"][0]) if record["stage"] != "report" else None
        return record if whole and len(record["params"]) == 3 and all(isinstance(d, str) for d in digests) else {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, IndexError):
        return {}


def of_params(params: list[str]) -> str:
    """Digest of the parameters that an artifact was planned or made with: its section, code and lineage."""
    return hashlib.sha256(canonical(params).encode()).hexdigest()[:16]


def identity(stage: str, section: dict, code: str, read: dict[str, dict[str, str]]) -> str:
    """Digest of a stage's settings, code, and the sha256 of its inputs by role (not their paths), as 16 hex digits.

    The folder of checkpoints has this name, so that a run does not resume from another run's state.
    """
    inputs = {role: list(files.values()) for role, files in sorted(read.items())}
    return hashlib.sha256(canonical([stage, section, code, inputs]).encode()).hexdigest()[:16]
