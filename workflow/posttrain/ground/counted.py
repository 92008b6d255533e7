"""Reduce a module's syntax tree to the code that could change a result.

Removed are
- docstrings, and the annotations of arguments, results and variables;
- `if TYPE_CHECKING:`, and imports from typing and collections.abc that only annotations use;
- the words of messages: literal text in the arguments of `say`, of the errors in `ground.errors`, of Python's own
  exceptions, of `warnings.warn`, of `print(..., file=sys.stderr)`, and after `assert ...,`.

Expressions within a message count, as they run. So do the fields of a class, which pydantic, dataclasses and named
tuples read from annotations; the annotations of a function whose decorator may read them; and the words of any other
exception: the data card contains those of `RowError`.
"""

import ast
import builtins
from collections.abc import Iterator

from posttrain.ground.syntax import begins_with_docstring

ERRORS = "posttrain.ground.errors"
EXCEPTIONS = {name for name, value in vars(builtins).items()
              if isinstance(value, type) and issubclass(value, Exception) and not name.startswith("Stop")}  # fmt: skip
SPEAKERS = {*EXCEPTIONS, "print", "posttrain.ground.progress.say", "warnings.warn"}
HARMLESS = {"functools.cache", "contextlib.contextmanager", "property", "staticmethod", "classmethod"}  # decorators
MEANT = {*SPEAKERS, *HARMLESS, "typing.TYPE_CHECKING", "sys.stderr"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LITERAL = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.UnaryOp, ast.BinOp, ast.Name,
           ast.operator, ast.unaryop, ast.expr_context)  # fmt: skip


def counted(tree: ast.Module) -> ast.Module:
    """The tree of a module (changed in place), without code that cannot change a result."""
    tree = _Counted(meanings(tree)).visit(tree)
    tree.body = tree.body[begins_with_docstring(tree, tree.body) :]
    names = set(mentions(tree))
    for node in ast.walk(tree):
        for body in (value for _, value in ast.iter_fields(node) if isinstance(value, list)):
            body[:] = [item for item in body if not (isinstance(item, ast.ImportFrom) and _for_types(item, names))]
    return tree


def _for_types(node: ast.ImportFrom, names: set[str]) -> bool:
    """Whether an import has only names for annotations. Removes names that are not among `names`."""
    if node.module in ("typing", "collections.abc") and not node.level:
        node.names = [alias for alias in node.names if (alias.asname or alias.name) in names]
    return not node.names


def meanings(tree: ast.Module) -> dict[str, str]:
    """Name or name.attribute in a module -> its meaning, one of MEANT or of the errors, where it is bound only once."""
    spellings = {name: name for name in MEANT if "." not in name}
    bound: set[str] = set()
    if _imports_all(tree):
        return {}
    for node in ast.walk(tree):
        bound.update(_binds(node))
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else []:
            name, origin = alias.asname or alias.name, getattr(node, "module", None)
            whole = f"{origin}.{alias.name}" if origin else alias.name
            here = {full: f"{name}{full.removeprefix(whole)}" for full in MEANT if f"{full}.".startswith(f"{whole}.")}
            if origin == ERRORS and alias.name[0].isupper():
                here = {whole: name}
            spellings |= {spelling: full for full, spelling in here.items()}
            bound.update([] if here else [name])
    return {spelling: full for spelling, full in spellings.items() if spelling.partition(".")[0] not in bound}


def _imports_all(tree: ast.Module) -> bool:
    """Whether the module has a `from ... import *`, which may bind any name."""
    return any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree))


def _binds(node: ast.AST) -> Iterator[str]:
    """The names that a node binds, except by imports."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
        yield node.name


class _Counted(ast.NodeTransformer):
    """Removes annotations and the words of messages."""

    def __init__(self, meaning: dict[str, str]):
        self.meaning = meaning  # of the module's names
        self.holder: type[ast.AST] = ast.Module  # class of the node whose statements are visited

    def visit_FunctionDef(self, node):
        if _is_plain(node, self.meaning):
            for argument in _arguments(node):
                argument.annotation = _kept(argument.annotation)
            node.returns = _kept(node.returns)
        return self._within(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node):
        return self._within(node)

    def _within(self, node):
        outside, self.holder = self.holder, type(node)
        node = self.generic_visit(node)
        self.holder = outside
        return node

    def visit_AnnAssign(self, node):
        self.generic_visit(node)
        if self.holder is ast.ClassDef or _kept(node.annotation):
            return node
        if node.value:
            return ast.Assign(targets=[node.target], value=node.value)
        node.annotation = None  # in a function the bare name still makes a variable local
        return None if self.holder is ast.Module else node

    def visit_If(self, node):
        node = self.generic_visit(node)
        return node.orelse if self.meaning.get(_dotted(node.test)) == "typing.TYPE_CHECKING" else node

    def visit_Assert(self, node):
        node.msg = node.msg and _wordless(node.msg)
        return self.generic_visit(node)

    def visit_Call(self, node):
        called = self.meaning.get(_dotted(node.func), "")
        if (called in SPEAKERS or called.startswith(ERRORS)) and (called != "print" or self._to_stderr(node)):
            node.args = [_wordless(argument) for argument in node.args]
        return self.generic_visit(node)

    def _to_stderr(self, call: ast.Call) -> bool:
        files = [keyword.value for keyword in call.keywords if keyword.arg == "file"]
        return [self.meaning.get(_dotted(file)) for file in files] == ["sys.stderr"]


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    every = function.args
    return list(filter(None, [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]))


def _is_plain(function: ast.FunctionDef | ast.AsyncFunctionDef, meaning: dict[str, str]) -> bool:
    """Whether all decorators of a function are harmless: they do not read its annotations or register it."""
    return all(meaning.get(_dotted(decorator)) in HARMLESS for decorator in function.decorator_list)


def _kept(annotation: ast.expr | None) -> ast.expr | None:
    """The annotation if its evaluation has an effect, else None."""
    acts = (ast.Call, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
    return annotation if annotation and any(isinstance(node, acts) for node in ast.walk(annotation)) else None


def _dotted(node: ast.expr) -> str:
    """`name` or `name.attribute`; "" for anything else."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            return f"{name}.{attribute}"
    return ""


def _wordless(node: ast.expr) -> ast.expr:
    """The expression of a message without literal text that can only become part of the message."""
    match node:
        case ast.Constant(value=str()):
            return ast.JoinedStr(values=[])
        case ast.JoinedStr():
            node.values = [_wordless(value) for value in node.values if isinstance(value, ast.FormattedValue)]
        case ast.FormattedValue() | ast.Starred():
            node.value = _wordless(node.value)
        case ast.IfExp():
            node.body, node.orelse = _wordless(node.body), _wordless(node.orelse)
        case ast.BoolOp():
            node.values[-1] = _wordless(node.values[-1])
        case ast.BinOp(op=ast.Add()):
            node.left, node.right = _wordless(node.left), _wordless(node.right)
        case ast.GeneratorExp() | ast.ListComp():
            node.elt = _wordless(node.elt)
        case ast.List() | ast.Tuple():
            node.elts = [_wordless(element) for element in node.elts]
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str()) as separator, attr="join") as join):
            join.value = _wordless(separator)
            node.args = [_wordless(argument) for argument in node.args]
    return node


def parts(tree: ast.Module) -> dict[str, list[ast.stmt]]:
    """Name -> statements of each definition that has no effect at import: functions and literal values that are bound
    once. The rest of the module is under "".
    """
    meaning = meanings(tree)
    bound = [name for node in tree.body for name in _bound_by(node)]
    if _imports_all(tree):
        return {"": tree.body}
    statements: dict[str, list[ast.stmt]] = {"": []}
    for node in tree.body:
        name = _idle(node, meaning)
        statements.setdefault(name if bound.count(name) == 1 else "", []).append(node)
    return statements


def _bound_by(node: ast.stmt) -> Iterator[str]:
    """The names that a statement binds in its module."""
    for inner in [node] if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else ast.walk(node):
        yield from _binds(inner)
        if isinstance(inner, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in inner.names)


def _idle(node: ast.stmt, meaning: dict[str, str]) -> str:
    """The name that a statement defines, if it has no other effect; else ""."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            annotated = node.returns or any(argument.annotation for argument in _arguments(node))  # those with effects
            plain = _is_plain(node, meaning) and all(map(_literal, defaults)) and not annotated
            return name if plain and not name.startswith("__") else ""  # Python itself calls `__getattr__`
        case ast.Assign(targets=[ast.Name(id=name)]) if _literal(node.value):
            return name if not name.startswith("__") or name == "__version__" else ""
    return ""


def _literal(value: ast.expr) -> bool:
    return all(isinstance(node, LITERAL) for node in ast.walk(value))


def mentions(tree: ast.AST) -> Iterator[str]:
    """Every name by which a definition could be used: identifiers, attributes, texts that are names, and the original
    names of imports with an alias. An import without an alias is used by its own name."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                yield name
            case ast.Constant(value=str() as name) if name.isidentifier():
                yield name
            case ast.alias(name=name, asname=str()):
                yield name
            case ast.Global(names=names):
                yield from names
