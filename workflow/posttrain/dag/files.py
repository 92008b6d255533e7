"""Mistakes in the paths of the user's own files that an experiment names."""

import os
from pathlib import Path

from posttrain.config.sections import Prepare, Tokenizer
from posttrain.config.sources import own_files
from posttrain.config.stages import Experiment
from posttrain.dag.rules import Mistakes


def prepare_files(experiment: Experiment) -> Mistakes:
    """Data, a chat template and a tokenizer that cannot be read."""
    tokenizer = experiment.prepare.tokenizer
    files, key = own_files("prepare", experiment.prepare), "prepare.tokenizer.path"
    if tokenizer and tokenizer.path:
        yield from _folder(key, tokenizer.path, [file for named, file in files if named == key])
    for named, file in files:
        if named != key:
            yield from _file(named, file)


def base_files(experiment: Experiment) -> Mistakes:
    """The files of a given model, and of its tokenizer where `prepare` names none."""
    if folder := experiment.base.path:
        files = own_files("base", experiment.base)
        if not experiment.prepare.tokenizer:
            files += own_files("prepare", Prepare(tokenizer=Tokenizer(path=folder)))
        yield from _folder("base.path", folder, [file for _, file in files])


def evaluate_files(experiment: Experiment) -> Mistakes:
    """The user's own tasks, with what they include and their data."""
    for key, file in own_files("evaluate", experiment.evaluate):
        yield from _file(key, file)


def _folder(key: str, folder: str, files: list[Path]) -> Mistakes:
    """A model's folder that lacks some of its files, in one line."""
    absent = [file.name for file in files if not os.path.exists(file)]
    if not os.path.isdir(folder):
        yield key, f"{folder} is no folder" if os.path.exists(folder) else _absent(folder)
    elif absent:
        yield key, _absent(f"{folder}/{' and no '.join(absent)}")
    else:
        for file in files:
            yield from _file(key, file)


def _file(key: str, file: Path) -> Mistakes:
    if os.path.isdir(file):
        yield key, f"{file} is a directory, and no file in it can be read here"
    elif not os.path.exists(file):
        yield key, _absent(file)
    elif not os.path.isfile(file):
        yield key, f"{file} is no file"
    elif set(str(file)) & set("{}<>"):
        yield key, f"{file}: {{ }} < > have a special meaning in Snakemake's paths; rename it"


def _absent(path: str | Path) -> str:
    return f"there is no {path} (looked for in {Path.cwd()})"
