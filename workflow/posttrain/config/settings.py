"""Read a YAML file of settings strictly, and check it against its section's class.

Each mistake is explained: file, line, key, value and what is allowed.
"""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import ValidationError

from posttrain.config.sections import Section, section_class
from posttrain.ground.errors import UserError

Model = TypeVar("Model", bound=Section)


class Loader(yaml.CSafeLoader):
    """libyaml's parser with YAML 1.2's core scalars: `1e-5` is a number; `on`, `yes`, `12:30` and `010` are text."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]  # PyYAML's types call it an instance's


for tag, pattern, first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


DEEPEST = 50  # nested mappings and lists: no config needs more, and thousands would overflow the stack
LONGEST_NUMBER = 40  # characters

# Messages in terms of YAML that replace pydantic's, which are in terms of Python.
PLAIN = {"bool_type": "it should be true or false", "model_type": "it should be a section of `key: value` lines"}
ROUNDS = 8  # of removing mistakes: a section that lost a required key is removed in the next round


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
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_deep(path, text)
        root = yaml.compose(text, Loader=Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
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


def settings_of_argument(argument: str) -> Settings:
    """The section in a command's `--config`: a file's name, or JSON, which the workflow passes."""
    if not argument.startswith("{"):
        return read_settings(Path(argument))
    try:
        return Settings(json.loads(argument), {"": "--config"})
    except ValueError as error:
        raise UserError(f"--config: is neither a file nor JSON: {error}") from None


def _refuse_deep(path: Path, text: str) -> None:
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


def validated(model: type[Model], values: dict, places: dict, problems: list) -> Model | None:
    """The section, or None after adding every mistake in it to `problems`. places: dotted key -> file:line."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        for mistake in error.errors(include_url=False):
            problems.append(_explain(model, mistake, places))
    return None


def without_mistakes(model: type[Model], values: dict) -> tuple[Model | None, list[str]]:
    """The section without its mistakes, and the dotted keys that were removed. Contradictions in the rest can then be
    reported too. Changes `values`. The section is None where nothing valid is left."""
    dropped: list[str] = []
    for _ in range(ROUNDS):
        try:
            return model.model_validate(values), dropped
        except ValidationError as error:
            for mistake in error.errors(include_url=False):
                path = mistake["loc"][:-1] if mistake["type"] == "missing" else mistake["loc"]
                if not (key := _drop(values, list(path))):
                    return None, dropped
                dropped.append(key)
    return None, dropped


def _drop(values: dict, path: list) -> str:
    """Delete the key at a path, or the key of the list that the path leads into; returns it dotted, "" if none."""
    holder, place = values, []
    for part in path:
        if not isinstance(holder, dict) or part not in holder:
            break
        place.append((holder, part))
        holder = holder[part]
    if not place:
        return ""
    owner, key = place[-1]
    del owner[key]
    return ".".join(str(part) for _, part in place)


def _explain(model: type[Section], mistake: Any, places: dict) -> str:
    """One line for a person: file:line, dotted key, what was found, what is allowed, nearest known key."""
    *above, last = mistake["loc"]
    path = [part for part in above if isinstance(part, int) or _is_key(part)]
    if isinstance(last, int) or _is_key(last) or mistake["type"] == "extra_forbidden":
        path.append(last)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    place = place_of(places, key)
    if mistake["type"] == "extra_forbidden":
        keys = list(_section_at(model, path[:-1]).model_fields)
        return f"{place}: {key}: unknown key{nearest(str(path[-1]), keys)}; known here: {', '.join(keys)}"
    if mistake["type"] == "missing":
        return f"{place}: {key}: missing"
    value = mistake["input"]
    shown = f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)
    message = PLAIN.get(mistake["type"]) or mistake["msg"][0].lower() + mistake["msg"][1:]
    return f"{place}: {key}: found {shown}, {message.replace('input should', 'it should')}{_hint(mistake)}"


def _hint(mistake: dict) -> str:
    """A hint at the allowed value nearest to a wrong one, where pydantic lists the allowed values."""
    expected = mistake.get("ctx", {}).get("expected", "")
    names = [name.strip("' ") for name in expected.replace(" or ", ", ").split(",")]
    return nearest(str(mistake["input"]), names)


def _is_key(part: str) -> bool:
    """Whether a part of pydantic's path is a key, not the name of a type in a union."""
    return part.isidentifier() or not any(mark in part for mark in "[(-")


def _section_at(model: type[Section], path: list) -> type[Section]:
    """The class of the section at a path within another section."""
    for part in path:
        if isinstance(part, str):
            model = model_at(model, part) or model
    return model


def model_at(model: type[Section] | None, key: str) -> type[Section] | None:
    """The class of the section that a key of a section holds; None for a plain value."""
    field = model.model_fields.get(key) if model else None
    return section_class(field.annotation) if field else None


def place_of(places: dict[str, str], key: str) -> str:
    """file:line of a key, or of the nearest key above it."""
    while key and key not in places:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return places.get(key, "?")


def nearest(word: str, allowed: list[str]) -> str:
    """A hint at the allowed word that is nearest to a wrong one; "" where none is near."""
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_of(where: str, section: Section, *keys: str) -> Iterator[tuple[str, str]]:
    """Exactly one of some keys must be set."""
    present = [key for key in keys if getattr(section, key) is not None]
    if len(present) != 1:
        hint = "; set an inherited one to null" if present else ""
        yield where, f"exactly one of {', '.join(keys)} must be set, found {' and '.join(present) or 'none'}{hint}"
