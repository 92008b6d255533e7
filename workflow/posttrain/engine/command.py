"""Read the config in a Snakemake command line as YAML 1.2, before Snakemake itself reads it as YAML 1.1.

snakemake --config strict=true grid='{seed: [0, 1]}'
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from posttrain.config.settings import read_settings, value_of_option
from posttrain.ground.errors import UserError, gather


def overrides(command: list[str], parsed: dict) -> dict[str, Any]:
    """The settings of `--config` by key. A section that is given twice is merged. Snakemake would leave a number within
    a value as text, and `true` too.

    command: Snakemake's command line. parsed: the settings as Snakemake reads them; those of a profile, which are not
    in the command line, are taken from here.
    """
    entries = [entry.partition("=")[::2] for entry in _options(command).config]
    of_profile = [(key, value) for key, value in parsed.items() if key not in dict(entries)]
    values: dict[str, Any] = {}
    for key, value in gather(lambda entry: (entry[0], _typed(*entry)), [*of_profile, *entries]):
        merged = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = values[key] | value if merged else value
    return values


def _typed(key: str, value) -> Any:
    """A setting whose texts are read as YAML 1.2."""
    if isinstance(value, dict):
        return {name: _typed(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, list):
        return [_typed(key, item) for item in value]
    return value_of_option(key, value) if isinstance(value, str) else value


def check_configfile(command: list[str]) -> None:
    """End this process with the reason where Snakemake cannot read a file of `--configfile`: it would end with a
    traceback. A job of a run, which has `--mode`, goes by the plan of its run, whatever became of the file."""
    if "--mode" in command:
        return
    try:
        gather(_refuse_unreadable, [Path(file) for file in _options(command).configfile])
    except UserError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        sys.exit(2)


def is_target(command: list[str], target: str) -> bool:
    """Whether a Snakemake command line names a target; a job of a run, which has `--mode`, is not asked."""
    return target in command[1:] and "--mode" not in command


def _options(command: list[str]) -> argparse.Namespace:
    """`--config` and `--configfile` of a command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-C", nargs="*", default=[])
    parser.add_argument("--configfile", "--configfiles", nargs="+", default=[])
    return parser.parse_known_args(command[1:])[0]


def _refuse_unreadable(file: Path) -> None:
    """Raise UserError for a file that holds no settings, or a value that is no date though YAML 1.1 reads it as one."""
    read_settings(file)
    loader = yaml.SafeLoader(file.read_text(encoding="utf-8-sig"))
    for scalar in _scalars(loader.get_single_node()):
        try:
            loader.construct_object(scalar)
        except ValueError as error:
            place = f"{file}:{scalar.start_mark.line + 1}"
            raise UserError(f"{place}: Snakemake cannot read {scalar.value}: {error}; put it in quotes") from None


def _scalars(node: Any) -> Iterator[yaml.ScalarNode]:
    """The keys and plain values of a YAML document."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif node is not None:
        for part in node.value:
            for inner in part if isinstance(part, tuple) else [part]:  # a mapping's are pairs of key and value
                yield from _scalars(inner)
