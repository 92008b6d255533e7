"""Syntax trees as text and digests; the files that hold functions of the user's own."""

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
    """A syntax tree as text, without places, docstrings and empty fields, which differ between Pythons."""
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
    """Whether a node's body does: of a module, a class or a function."""
    holders = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    first = body[0] if isinstance(node, holders) and body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def function_file(spec: str) -> Path:
    """The file that holds a function named as `file.py:function` or `package.module:function`; does not run it."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    try:
        module = importlib.util.find_spec(place)
    except (Exception, SystemExit):  # it imports the package that the module lies in, which can raise anything
        module = None
    return Path(module.origin) if module and module.origin else Path(place)


def fingerprint(file: Path) -> str:
    """Digest of the syntax tree of a file of the user's own, whose messages and annotations count: nobody can tell
    what it does with them. Raises UserError when it is no Python."""
    try:
        return _digest_of_text(file.read_bytes())
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file}: is no Python module that can be read: {error}") from None


@cache
def _digest_of_text(content: bytes) -> str:
    return digest(spelled(ast.parse(content)))
