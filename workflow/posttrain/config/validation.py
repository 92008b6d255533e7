"""Validate settings against a section's class, and explain each mistake: file, line, key, value and what is allowed."""

import difflib
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import ValidationError

from posttrain.config.sections import Section, section_class

Model = TypeVar("Model", bound=Section)

# Messages in terms of YAML that replace pydantic's, which are in terms of Python.
PLAIN = {"bool_type": "it should be true or false", "model_type": "it should be a section of `key: value` lines"}
ROUNDS = 8  # of removing mistakes: a section that lost a required key is removed in the next round


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
