"""Read a YAML file of settings strictly, with the place of each key."""

import codecs
import json
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from posttrain.ground.errors import UserError


class Loader(yaml.CSafeLoader):
    """libyaml's parser with YAML 1.2's core scalars: `1e-5` is a number; `on`, `yes`, `12:30` and `010` are text."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]  # PyYAML's types call it an instance's


for tag, pattern, first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


DEEPEST = 50  # nested mappings and lists: no config needs more, and thousands would overflow the stack
OPTION = "--config"  # Snakemake's option, as the place of a key that it sets
LONGEST_NUMBER = 40  # characters
CONTROL = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|\ufeff")  # not in YAML


class Settings(dict):
    """A mapping read from a file; `places` maps each dotted key to `file:line`."""

    def __init__(self, values: dict, places: dict[str, str]):
        super().__init__(values)
        self.places = places


def read_settings(path: Path) -> Settings:
    """The settings of one file.

    Raises UserError, with file and line, where the file is missing, is not YAML or not a mapping, where a key occurs
    twice or is not text, and for anchors (inheritance is `extends:`).
    """
    text = text_of(path)
    try:
        _refuse_deep(path, text)
        root = yaml.compose(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}:1: not valid YAML: {str(error).splitlines()[0]}") from None
    if root is None:
        return Settings({}, {"": f"{path}:1"})
    if not isinstance(root, yaml.MappingNode):
        kind = getattr(root, "id", "value")  # PyYAML's types lack it
        raise UserError(f"{path}:1: found a {kind}, expected `key: value` lines")
    problems: list[str] = []
    places = {"": f"{path}:1"}
    values = _value(root, str(path), "", places, problems, set())
    if problems:
        raise UserError(*problems)
    return Settings(values, places)


def value_of_option(key: str, text: str) -> Any:
    """The value in `KEY=TEXT` of Snakemake's `--config`, read as in a file. Raises UserError where it is not YAML."""
    try:
        _refuse_deep(OPTION, text)
        node = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{OPTION}: {key}: not valid YAML: {str(error).splitlines()[0]}") from None
    problems: list[str] = []
    value = None if node is None else _value(node, OPTION, key, {}, problems, set())
    if problems:
        raise UserError(*problems)
    return value


def text_of(path: Path) -> str:
    """The text of a file. Raises UserError, with the line, where it is not UTF-8 or has a control character."""
    if path.is_char_device():
        raise UserError(f"{path}: is a device, not a file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror} (looked for in {Path.cwd()})") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}:1: is in UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte, line = content[error.start], content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: the byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
    if control := CONTROL.search(text):
        line = text.count("\n", 0, control.start()) + 1
        raise UserError(f"{path}:{line}: has the control character {control[0]!a}; delete it")
    return text


def settings_of_argument(argument: str) -> Settings:
    """The section in a command's `--config`: a file's name, or JSON, which the workflow passes."""
    if not argument.startswith("{"):
        return read_settings(Path(argument))
    try:
        return Settings(json.loads(argument), {"": "--config"})
    except ValueError as error:
        raise UserError(f"--config: is neither a file nor JSON: {error}") from None


def _refuse_deep(path: Path | str, text: str) -> None:
    """Raise UserError for nesting beyond DEEPEST."""
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise UserError(f"{path}:{_line(event)}: nested more than {DEEPEST} deep")


def _line(node) -> int:
    """The line at which a YAML node or event begins."""
    return node.start_mark.line + 1


def _value(node, path: str, key: str, places: dict, problems: list, seen: set):
    """The plain value of a YAML node; records the place of every key below it. `seen`: ids of the nodes so far."""
    line = f"{path}:{_line(node)}"
    if id(node) in seen:
        problems.append(f"{line}: {key}: anchors and aliases are not supported; use `extends:`")
        return None
    seen.add(id(node))
    if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        problems.append(f"{line}: {key}: the tag {node.tag} is not supported; write a plain value")
    if isinstance(node, yaml.SequenceNode):
        items = {f"{key}[{number}]": item for number, item in enumerate(node.value)}
        places |= {name: f"{path}:{item.start_mark.line + 1}" for name, item in items.items()}
        return [_value(item, path, name, places, problems, seen) for name, item in items.items()]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, key, places, problems, seen)
    return _scalar(node, line, key, problems)


def _mapping(node, path: str, key: str, places: dict, problems: list, seen: set) -> dict:
    values = {}
    for name, child in node.value:
        line = f"{path}:{name.start_mark.line + 1}"
        if not isinstance(name, yaml.ScalarNode):
            problems.append(f"{line}: {key or 'top level'}: a key must be a word, found a {name.id}")
            continue
        dotted = f"{key}.{name.value}" if key else name.value
        if name.value in values:
            problems.append(f"{line}: {dotted}: given twice (first in {places[dotted]}); keep one")
        places[dotted] = line
        values[name.value] = _value(child, path, dotted, places, problems, seen)
    return values


def _scalar(node, line: str, key: str, problems: list):
    resolved = Loader("").resolve(yaml.ScalarNode, node.value, (not node.style, bool(node.style)))
    if node.tag != resolved:
        problems.append(f"{line}: {key}: the tag {node.tag} is not supported; write a plain value")
        return None
    kind = node.tag.rpartition(":")[2]
    if kind == "bool":
        return node.value.lower() == "true"
    if kind == "null":
        return None
    if kind in ("int", "float"):
        if len(node.value) > LONGEST_NUMBER:
            problems.append(f"{line}: {key}: a number of {len(node.value)} digits")
            return None
        return int(node.value) if kind == "int" else float(node.value)
    return node.value
