"""Run the stage of a finished artifact again, or a part of it, with the recorded settings, inputs and threads."""

import contextlib
import importlib
import io
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.config.stages import STAGES
from posttrain.ground import accepted
from posttrain.ground.errors import UserError
from posttrain.ground.files import read_json, sha256, verify
from posttrain.ground.identity import record_of
from posttrain.jobs import artifact, provenance
from posttrain.training.epochs import with_steps


class Recorded(NamedTuple):
    """A finished artifact, by its record."""

    folder: Path
    stage: str
    section: Any
    inputs: dict[str, Path | list[Path]]  # role -> manifest; several of the role `fetched`
    record: dict  # provenance.json
    metrics: dict

    @property
    def function(self) -> Callable:
        """The function of its stage."""
        return getattr(importlib.import_module(f"posttrain.stages.{self.stage}"), self.stage)


def load(folder: Path) -> Recorded:
    """An artifact by its record. Raises UserError where its stage cannot be run again: with the record or an input
    gone, an input changed, or several processes."""
    record = record_of(folder)
    if record.get("stage") not in STAGES:
        raise UserError(
            f"{folder / 'provenance.json'}: is gone, damaged or of no stage, so that nothing can be run again"
        )
    stage, read = record["stage"], record["inputs"]
    if problems := list(other_inputs(read)):
        raise UserError(*problems)
    if (count := record.get("shape", {}).get("processes", 1)) > 1:
        raise UserError(f"{folder}: was made by {count} processes, and what one process repeats has other last digits")
    paths: dict[str, Path | list[Path]] = {
        role: [*map(Path, files)] if role == "fetched" else Path(*files)
        for role, files in read.items()
        if role != "files"
    }
    data = Path(*read.get("data", ())) if "data" in read else None
    section = with_steps(artifact.section_of(stage, record["params"][0]), data)
    return Recorded(folder, stage, section, paths, record, read_json(folder / "metrics.json"))


def other_inputs(read: dict[str, dict[str, str]]) -> Iterator[str]:
    """What is wrong with the inputs of a record: those that are gone, and those that have other bytes now."""
    for role, files in read.items():
        for file, digest in files.items():
            if not Path(file).is_file():
                yield f"{file}: is not here; it was read as {role}"
            elif sha256(Path(file)) != digest:
                yield f"{file}: is another one now than when it was read as {role}; take back the earlier one"
            elif role not in ("files", "fetched"):
                with contextlib.suppress(UserError):
                    verify(Path(file))
                    continue
                yield f"{file.removesuffix('/manifest.json')}: is damaged; it was read as {role}: posttrain verify"


def run(recorded: Recorded, function: Callable):
    """The result of a function, called as the stage's own was: with its section, its threads and its micro-batches."""
    shape = recorded.record["shape"]
    threads, size = shape.get("threads", 1), shape.get("micro_batch") or shape.get("batch_size")
    warnings.filterwarnings("ignore", category=FutureWarning)
    artifact.import_libraries()
    arguments = Namespace(threads=threads, micro_batch_size=size)
    with contextlib.redirect_stdout(io.StringIO()):  # trainers print their metrics
        return artifact.run_with_torch(arguments, function, recorded.section, recorded.inputs)


def otherwise(recorded: Recorded) -> list[str]:
    """What may change the last digits, and is not as when the artifact was made. Called after `run`."""
    before = flat(recorded.record["shape"])
    now = flat(provenance.shape_of(recorded.section))
    changes = [
        f"{key} {before.get(key)}, now {now.get(key)}" for key in before | now if before.get(key) != now.get(key)
    ]
    planned = recorded.record["params"][1].partition("+")[0]
    if planned != accepted.standing(recorded.stage):
        changes.append(f"the code of {recorded.stage} was edited since")
    return changes


def arithmetic(recorded: Recorded) -> str:
    """The type in which the stage computes, which decides how many digits another machine or batch changes: bfloat16
    where it says so, or where the weights under it have this type."""
    from posttrain.models.policy import dtype_of

    section = getattr(recorded.section, "scratch", None) or recorded.section
    weights = [Path(str(recorded.inputs[role])) for role in ("base", "policy") if role in recorded.inputs]
    types = {getattr(section, "precision", "float32"), *map(dtype_of, weights)}
    return "bfloat16" if "bfloat16" in types else "float32"


def flat(shape: dict) -> dict:
    """A shape without levels: the versions are keys of their own."""
    return {key: value for key, value in shape.items() if key != "versions"} | shape.get("versions", {})
