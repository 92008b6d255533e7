"""The user's own tasks in lm-eval's YAML: what a file defines, and which files and functions it reads."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from posttrain.config.sections import Evaluate, Source, Task
from posttrain.config.settings import text_of
from posttrain.ground.errors import UserError

LOADERS = {"json", "csv", "parquet", "text", "arrow", "pandas", "xml"}  # a task's dataset_path for local data files
DATA_KEYS = {"dataset_path", "dataset_name", "dataset_kwargs"}
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


class Called(str):
    """A function that a file names by `!function`, as `FILE.py:NAME`; `MODULE:NAME` where there is no such file."""


class Loader(yaml.CSafeLoader):
    """lm-eval's YAML, whose functions are named, not imported."""

    folder: Path

    def called(self, node: yaml.ScalarNode) -> Called:
        """The function that a node names, relative to the file's folder."""
        module, _, name = str(self.construct_scalar(node)).rpartition(".")
        file = Path(os.path.normpath(self.folder / f"{module.replace('.', '/')}.py"))
        return Called(f"{file if file.is_file() else module}:{name}")


Loader.add_constructor("!function", Loader.called)


class Own(NamedTuple):
    """A task, or a group of tasks, of the user's own."""

    values: dict[str, Any]  # with those of the files that it includes
    lines: dict[str, str]  # key -> FILE:LINE
    files: list[Path]  # the file, and those that it includes

    @property
    def names(self) -> list[str]:
        """The names by which it can be asked for: its own, and its tags."""
        own, tags = self.values.get("group") or self.values.get("task"), self.values.get("tag") or []
        return [str(name) for name in (own, *(tags if isinstance(tags, list) else [tags]))]

    @property
    def members(self) -> list[str] | None:
        """The names of a group's members; None for a task."""
        if "group" not in self.values:
            return None
        listed = self.values.get("task") or []
        return [
            str(item.get("group") or item.get("task")) if isinstance(item, dict) else str(item)
            for item in (listed if isinstance(listed, list) else [listed])
        ]

    @property
    def dataset(self) -> str | None:
        """The data set on the hub that a task reads; None for local data, and for a group."""
        path = self.values.get("dataset_path")
        here = self.members is not None or not isinstance(path, str) or path in LOADERS or os.path.exists(path)
        return None if here else path

    @property
    def generation(self) -> dict[str, Any] | None:
        """The settings of generation of a task; None for one that generates nothing, and for a group."""
        if self.members is not None or self.values.get("output_type", "generate_until") != "generate_until":
            return None
        kwargs = self.values.get("generation_kwargs")
        return kwargs if isinstance(kwargs, dict) else {}


def read(file: str) -> Own:
    """What a file defines. Raises UserError, with file and line, where it, or a file that it includes, cannot be
    read."""
    own = _merged(Path(file), [])
    if not isinstance(own.values.get("group") or own.values.get("task"), str):
        raise UserError(f"{file}:1: defines no task: give `task: NAME`, or `group: NAME` and its `task: [NAMES]`")
    return own


def _merged(path: Path, above: list[Path]) -> Own:
    """A file's keys over those of the files that it includes."""
    if path.resolve() in above:
        raise UserError(f"{path}: is included twice, which lm-eval refuses")
    above.append(path.resolve())
    values, lines = _keys(path)
    merged: dict[str, Any] = {}
    places: dict[str, str] = {}
    files = [path]
    included = values.pop("include", [])
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise UserError(f"{lines['include']}: include: found {name!r}, it should be the name of a file")
        other = _merged(Path(os.path.normpath(path.parent / name)), above)
        merged |= other.values
        places |= other.lines
        files += other.files
    return Own(merged | values, places | lines, files)


def _keys(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(key -> value, key -> FILE:LINE) of one file."""
    loader = Loader(text_of(path))
    loader.folder = path.parent
    try:
        root = loader.get_single_node()
        values = loader.construct_document(root) if root else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}:1: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: found a {type(values).__name__}, expected `key: value` lines")
    return values, {str(key.value): f"{path}:{key.start_mark.line + 1}" for key, _ in root.value} if root else {}


def calls(value) -> Iterator[Called]:
    """The functions that a value names, at any depth."""
    if isinstance(value, Called):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from calls(inner)


def allowed(section: Evaluate) -> set[str]:
    """The functions that a section allows, spelled as `Called`."""
    split = (named.rpartition(":") for named in section.task_functions or [])
    return {f"{os.path.normpath(file)}:{name}" for file, _, name in split}


def data_files(own: Own) -> list[Path]:
    """The local files with a task's data: those that a pattern matches, or the pattern where none does; of a folder
    all."""
    path, kwargs = own.values.get("dataset_path"), own.values.get("dataset_kwargs")
    kwargs = kwargs if isinstance(kwargs, dict) else {}
    if own.members is not None or own.dataset or not isinstance(path, str):
        return []
    if path not in LOADERS:
        return _below(path)
    patterns = [text for text in _texts(kwargs.get("data_files")) if "://" not in text]
    found = [sorted(glob.glob(pattern, recursive=True)) or [pattern] for pattern in patterns]
    folder = kwargs.get("data_dir")
    return [*(Path(file) for files in found for file in files), *(_below(folder) if isinstance(folder, str) else [])]


def _below(folder: str) -> list[Path]:
    """The files in a folder and below; the folder itself where it holds none, so that this is told."""
    listed = [file for file in Path(folder).rglob("*") if file.is_file() and not file.name.startswith(".")]
    return sorted(listed) or [Path(folder)]


def _texts(value) -> Iterator[str]:
    """The texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def inputs(file: str) -> list[Path]:
    """The files that a file of a task reads: itself, what it includes, its local data; itself where it is wrong."""
    try:
        own = read(file)
    except UserError:
        return [Path(file)]
    return [*own.files, *data_files(own)]


def all_own(section: Evaluate) -> list[Own]:
    """The user's own tasks and groups of a section; none of a file that is wrong."""
    found = []
    for file in section.task_files or []:
        try:
            found.append(read(file))
        except UserError:
            continue
    return found


def all_read(section: Evaluate) -> bool:
    """Whether each of the user's own files defines a task: else, what a name stands for is in doubt."""
    return len(all_own(section)) == len(section.task_files or [])


def own_of(name: str, known: list[Own]) -> list[Own]:
    """The user's own tasks and groups that a name stands for: itself, a group's members, the tasks of a tag."""
    named = [own for own in known if name in own.names]
    others = [own for own in known if name not in own.names]
    return named + [inner for own in named for member in own.members or [] for inner in own_of(member, others)]


def data_sets(section: Evaluate, task: Any) -> list[Source] | None:
    """The data sets on the hub that an own task reads, at the revision that `tasks` gives; None for anything else."""
    if not isinstance(task, Task) or not (own := own_of(task.task, all_own(section))):
        return None
    names = dict.fromkeys(one.dataset for one in own if one.dataset)
    return [Source(dataset=name, revision=task.revision, allow_floating=task.allow_floating) for name in names]
