"""Syntax trees as text and digests; the files of the user's own functions."""

import ast
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from posttrain.ground.errors import UserError


def digest(content: str | bytes) -> str:
    """sha256 as 64 hex digits."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def spelled(node) -> str:
    """A syntax tree as text, without line numbers, docstrings, and empty fields, which differ between Pythons."""
    if isinstance(node, list):
        return f"[{','.join(map(spelled, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and begins_with_docstring(node, value):
            value = value[1:]
        if value not in (None, []) and name not in ("ctx", "kind", "type_comment"):
            fields.append(f"{name}={spelled(value)}")
        elif isinstance(node, ast.Constant) and name == "value":
            fields.append("value=None")
    return f"{type(node).__name__}({','.join(fields)})"


def begins_with_docstring(node, body) -> bool:
    """Whether the body of a module, a class or a function begins with a docstring."""
    holders = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    first = body[0] if isinstance(node, holders) and body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def function_file(spec: str) -> Path:
    """The file of a function named `file.py:function` or `package.module:function`; does not import the function."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    try:
        module = importlib.util.find_spec(place)
    except (Exception, SystemExit):  # find_spec imports the containing package, which can raise anything
        module = None
    return Path(module.origin) if module and module.origin else Path(place)


def fingerprint(file: Path) -> str:
    """Digest of the syntax tree of a user's own file. Messages and annotations count, since their use is unknown.

    Raises UserError where the file is not valid Python.
    """
    try:
        return _digest_of_text(file.read_bytes())
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file}: is not a valid Python module: {error}") from None


@cache
def _digest_of_text(content: bytes) -> str:
    return digest(spelled(ast.parse(content)))
