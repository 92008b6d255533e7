"""Check settings against their section's class; explain each mistake by file, line, key, value and what is allowed."""

import difflib
import json
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import ValidationError

from posttrain.config.sections import PATTERNS, Section, declared, section_class

Model = TypeVar("Model", bound=Section)
Path = tuple[str | int, ...]  # keys of sections and numbers of list items, from the outermost

# What is allowed where pydantic finds a mistake of a type, in terms of YAML instead of Python's.
ALLOWED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a number under 1.8e308",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "`key: [values]` lines",
    "model_type": "a section of `key: value` lines",
    "string_too_short": "text of at least one character",
    "too_short": "a list of at least one item",
}
LONGEST_SHOWN = 80  # characters of a wrong value


def validated(model: type[Model], values: dict, places: dict, problems: list) -> Model | None:
    """The section, or None after adding every mistake in it to `problems`. places: dotted key -> file:line."""
    section, mistakes = checked(model, values)
    problems += [f"{place_of(places, key)}: {key}: {text}" for key, text in mistakes.items()]
    return section


def checked(model: type[Model], values: dict) -> tuple[Model | None, dict[str, str]]:
    """(the section where it is valid, dotted key -> mistake): one mistake for a key, however many types it may have,
    and none for the lack of a key that an unknown one may have meant, here or in another section."""
    try:
        return model.model_validate(values), {}
    except ValidationError as error:
        mistakes: dict[Path, list] = {}
        for mistake in error.errors(include_url=False):
            mistakes.setdefault(_path(model, mistake["loc"]), []).append(mistake)
    unknown = [path for path, (first, *_) in mistakes.items() if first["type"] == "extra_forbidden"]
    meant = {(*path[:-1], _meant(_section_at(model, path[:-1]), str(path[-1]))) for path in unknown}
    lacking = {path for path, (first, *_) in mistakes.items() if first["type"] == "missing"}
    outer = {path[:depth] for path in mistakes for depth in range(len(path))}  # what is wrong there is an item
    elsewhere = {path[-1] for path in unknown}
    there = {path for path in lacking if path in meant or (*path[:-1], "") in meant or path[-1] in elsewhere}
    wrong = [path for path in mistakes if path not in outer | there]
    return None, {dotted(path): _explained(model, path, mistakes[path]) for path in wrong}


def valid_part(model: type[Section], values: dict, mistakes: dict[str, str]) -> tuple[Any, set[str]]:
    """(the section without its wrong keys, the dotted keys that no rule may read): the wrong ones, and those that an
    unknown key may have meant, which are all unset ones where it resembles none. mistakes: those of `checked`."""
    kept: dict[str, Any] = {}
    unreadable: set[str] = set()
    for key, value in values.items():
        inner, within = model_at(model, key), _within(mistakes, key)
        if key not in model.model_fields:
            meant = _meant(model, key)
            unreadable |= {meant} if meant else model.model_fields.keys() - values.keys()
        elif key in mistakes:
            unreadable.add(key)
        elif inner and isinstance(value, dict):
            kept[key], below = valid_part(inner, value, within)
            unreadable |= {f"{key}.{name}" for name in below}
        elif inner and isinstance(value, list) and all(isinstance(item, dict) for item in value):
            parts = [valid_part(inner, item, _within(mistakes, f"{key}[{n}]")) for n, item in enumerate(value)]
            kept[key] = [part for part, _ in parts]
            unreadable |= {f"{key}[{n}].{name}" for n, (_, below) in enumerate(parts) for name in below}
        elif within:
            unreadable.add(key)
        else:
            kept[key] = value
    missing = {key for key in mistakes if key in model.model_fields and key not in values}
    return model.model_construct(**kept), unreadable | missing


def _within(mistakes: dict[str, str], key: str) -> dict[str, str]:
    """The mistakes below a key, by their names there."""
    return {
        name.removeprefix(key).removeprefix("."): mistake
        for name, mistake in mistakes.items()
        if name.startswith((f"{key}.", f"{key}["))
    }


def dotted(path: Path) -> str:
    """A path as text, such as `evaluate.tasks[0].task`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _path(model: type[Section], location: Path) -> Path:
    """The path of a mistake, without the names that pydantic gives to the types of a union."""
    path: list[str | int] = []
    annotation: Any = model
    for part in location:
        section, values = section_class(annotation), _mapped(annotation)
        if isinstance(part, int) or section or values:
            path.append(part)
        if section and isinstance(part, str):
            annotation = section.model_fields[part].annotation if part in section.model_fields else None
        elif values:
            annotation = values
    return tuple(path)


def _mapped(annotation) -> Any:
    """The type of the values of a key that holds a mapping with keys of the user's own; None for any other key."""
    options = (annotation, *typing.get_args(annotation))
    return next((typing.get_args(option)[1] for option in options if typing.get_origin(option) is dict), None)


def _explained(model: type[Section], path: Path, mistakes: list) -> str:
    """What was found at a path and what is allowed there, in one line. mistakes: pydantic's, one for each type that
    the key may have."""
    first = mistakes[0]
    if first["type"] == "missing":
        return "missing"
    if first["type"] == "extra_forbidden":
        keys = list(_section_at(model, path[:-1]).model_fields)
        return f"unknown key{nearest(str(path[-1]), keys)}; known here: {', '.join(keys)}"
    value = first["input"]
    if reason := _refused(model, path, value):
        return f"{spelled(value)} is refused: {reason}"
    expected = ", ".join(mistake.get("ctx", {}).get("expected", "") for mistake in mistakes).replace(" or ", ", ")
    hint = nearest(str(value), [name.strip("' ") for name in expected.split(",")])
    if isinstance(value, bool | int | float) and first["type"] == "string_type":
        hint = "; put it in quotes where text is meant"
    return f"found {spelled(value)}, it should be {' or '.join(map(_allowed, mistakes))}{hint}"


def _refused(model: type[Section], path: Path, value) -> str:
    """Why a key may not have a value that is known and refused; "" for any other value."""
    while isinstance(path[-1], int):  # an item of a list
        path = path[:-1]
    field = _section_at(model, path[:-1]).model_fields.get(str(path[-1]))
    reasons = declared(field).get("refused", {}) if field and isinstance(value, str) else {}
    return next((reason for name, reason in reasons.items() if value.lower().startswith(name)), "")


def _allowed(mistake: dict) -> str:
    """What is allowed where pydantic found a mistake, as it follows on "it should be"."""
    kind, context = mistake["type"], mistake.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return PATTERNS[context["pattern"]]
    if kind == "string_too_long":
        return f"text of at most {context['max_length']} characters"
    return ALLOWED.get(kind) or mistake["msg"].removeprefix("Input should be ").removeprefix("a valid ")


def spelled(value) -> str:
    """A value as YAML has it; a section or a list by its kind."""
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _meant(model: type[Section], key: str) -> str:
    """The known key that an unknown one resembles; "" for none."""
    return _nearest(key, list(model.model_fields))


def _section_at(model: type[Section], path: Path) -> type[Section]:
    """The class of the section at a path within another section."""
    annotation: Any = model
    for part in path:
        if isinstance(part, str):
            section = section_class(annotation)
            annotation = section.model_fields[part].annotation if section else _mapped(annotation)
    return section_class(annotation) or model


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
    close = _nearest(word, allowed)
    return f" (did you mean {close!r}?)" if close else ""


def _nearest(word: str, allowed: list[str]) -> str:
    """The allowed word that is nearest to a wrong one, whatever the case of its letters; "" where none is near."""
    same = {name.lower().replace("-", "_"): name for name in allowed if name}
    lowered = word.lower().replace("-", "_")
    cutoff = 0.6 if len(word) > 2 else 0.5  # two letters that are exchanged are alike by half
    close = difflib.get_close_matches(lowered, same, n=1, cutoff=cutoff)
    return same[close[0]] if close else ""


def one_of(where: str, section: Section, *keys: str) -> Iterator[tuple[str, str]]:
    """Exactly one of some keys must be set."""
    present = [key for key in keys if getattr(section, key) is not None]
    if len(present) != 1:
        hint = "; set an inherited one to null" if present else ""
        yield where, f"exactly one of {', '.join(keys)} must be set, found {' and '.join(present) or 'none'}{hint}"
