"""Check one field of a row. A RowError names the field, what was found and, where one is near, the right name."""

from difflib import get_close_matches

from posttrain.data.lines import RowError
from posttrain.data.texts import is_blank


def json_kind(value) -> str:
    """The name of a value's type in JSON."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def required(row: dict, name: str):
    """The field's value. Raises RowError, with the nearest key of the row, where it is absent or null."""
    if row.get(name) is not None:
        return row[name]
    near = get_close_matches(name, [key for key in row if isinstance(key, str) and key != name], 1, 0.75)
    hint = f"hint: did you mean {near[0]!r}" if near else f"keys found: {', '.join(map(str, row)) or 'none'}"
    raise RowError("missing_field", f"missing field {name}; {hint}")


def visible_text(value, where: str, reason: str = "empty_text") -> str:
    """The value, a string that is not blank. Raises RowError, with `reason` for a blank one."""
    if not isinstance(value, str):
        raise RowError("not_a_string", f"{where} must be a string, found {json_kind(value)}")
    if is_blank(value):
        raise RowError(reason, f"{where} empty" if reason == "empty_user" else f"{where} is empty")
    return value


def user_text(value, where: str, allow_empty_user: bool) -> str:
    """The value, the text of a user's turn; blank only where `allow_empty_user`. Raises RowError."""
    if allow_empty_user and isinstance(value, str):
        return value
    return visible_text(value, where, "empty_user")


def refuse_mixed(name: str, value, other_name: str, other) -> None:
    """Raise RowError unless both values are strings or both are lists."""
    for key, item in ((name, value), (other_name, other)):
        if not isinstance(item, str | list):
            raise RowError("not_a_string", f"{key} must be a string or a list of messages, found {json_kind(item)}")
    if type(value) is not type(other):
        raise RowError("mixed_types", f"{name} is {json_kind(value)} while {other_name} is {json_kind(other)}")
