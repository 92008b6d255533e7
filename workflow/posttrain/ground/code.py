"""The fingerprint of the code that a stage runs: syntax trees of the package's modules that it reaches by imports.

Comments, docstrings and formatting never count, and Python's version does not either.
"""

import ast
import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path

from posttrain.ground.errors import UserError

PACKAGE = Path(__file__).parents[1]
# What a stage computes does not depend on these: `config` acts through the section, the others speak to people.
UNCOUNTED = ("config", "ground.errors", "ground.progress", "training.tracking")
KNOWN = Path(".snakemake/fingerprints.json")  # of files already read, by the digest of their bytes
VERSION = 2  # of this module's own spelling of a tree
EMPTY = ""  # stands for a module without any code, which need not be named


def code(stage: str) -> dict[str, str]:
    """Module (or template) -> digest, of everything of the package that a stage's module reaches."""
    reached, wanted = {}, [f"stages.{stage}"]
    while wanted:
        name = wanted.pop()
        if name not in reached and not uncounted(name):
            reached[name], imports = module(name)
            wanted += [*imports, *_holders(name)]
    return {name: found for name, found in sorted(reached.items()) if found != EMPTY}


def uncounted(name: str) -> bool:
    """Whether a module, or the room that it stands in, never counts."""
    return any(f"{name}.".startswith(f"{other}.") for other in UNCOUNTED)


@cache
def fingerprint_of(stage: str) -> str:
    """One digest for all the code of a stage, as 16 hex digits."""
    return digest(json.dumps(code(stage)))[:16]


@cache
def module(name: str) -> tuple[str, list[str]]:
    """Digest of a module of the package, and the modules of the package that it imports, wherever in it.

    A module that names the folder `templates` reads its files, whose bytes count with it.
    """
    try:
        content = source(name).read_bytes()
    except OSError as error:
        raise UserError(f"{source(name)}: cannot be read: {error.strerror}") from None
    templates = b"".join(digest(template.read_bytes()).encode() for template in _templates(content))
    key = digest(b"%d%b%b" % (VERSION, content, templates))
    if key not in _known():
        try:
            _known()[key] = [digest_of(content), sorted(set(_imports(ast.parse(content), name)))]
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{source(name)}: is no Python module that can be read: {error}") from None
    found, imports = _known()[key]
    return found, [other for other in imports if source(other).is_file()]


def digest_of(content: bytes) -> str:
    """Digest of a module's text, with that of the templates as they are now, where it reads them."""
    tree = spelled(ast.parse(content))
    templates = [digest(template.read_bytes()) for template in _templates(content)]
    return EMPTY if tree == "Module()" else digest(tree + "".join(templates))[:16]


def _templates(content: bytes) -> list[Path]:
    """The templates of the kinds that a module reads: it names their folder and how their names end."""
    files = sorted(PACKAGE.glob("templates/*")) if b'"templates"' in content else []
    return [file for file in files if file.suffix.encode() in content]


def source(name: str) -> Path:
    """The file of a module of the package, named from within it: `stages.sft`; of a package its `__init__`."""
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _holders(name: str) -> list[str]:
    """The packages that a module lies in, whose `__init__` runs before it; `__init__` is the whole package's."""
    parts = name.split(".")
    return ["__init__", *(".".join(parts[:end]) for end in range(1, len(parts)))]


@cache
def _known() -> dict:
    try:
        found = json.loads(KNOWN.read_text(encoding="utf-8"))
        return {key: [known, list(imports)] for key, (known, imports) in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def remember() -> None:
    """Keep what was read, so that the next `snakemake` need not parse what did not change."""
    text = json.dumps(_known())
    if KNOWN.parent.is_dir() and not (KNOWN.is_file() and KNOWN.read_text(encoding="utf-8") == text):
        KNOWN.with_suffix(".new").write_text(text, encoding="utf-8")
        KNOWN.with_suffix(".new").replace(KNOWN)


def _imports(tree: ast.Module, name: str):
    """Names that may be modules of the package: what the module `name` imports from it, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] == "posttrain"):
            above = ["posttrain", *name.split(".")][: -node.level] if node.level else []
            within = ".".join([*above, *filter(None, [node.module])]).partition(".")[2]
            yield from filter(None, [within])
            yield from (f"{within}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (n.name.partition(".")[2] for n in node.names if n.name.startswith("posttrain."))


def function_file(named: str) -> Path:
    """The file that holds a function named as `file.py:function` or `package.module:function`; does not run it."""
    place = named.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    try:
        found = importlib.util.find_spec(place)
    except (Exception, SystemExit):  # it imports the package that the module lies in, which can raise anything
        found = None
    return Path(found.origin) if found and found.origin else Path(place)


def fingerprint(file: Path) -> str:
    """Digest of the syntax tree of a file of the user's own. Raises UserError when it is no Python."""
    try:
        return _fingerprint_of_text(file.read_bytes())
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file}: is no Python module that can be read: {error}") from None


@cache
def _fingerprint_of_text(content: bytes) -> str:
    return digest(spelled(ast.parse(content)))


def functions(content: str | bytes) -> dict[str, str]:
    """Top-level definition -> digest of its tree; what stands between definitions is `(module)`."""
    tree, found = ast.parse(content), {}
    rest = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = digest(spelled(node))
        else:
            rest.append(spelled(node))
    return found | {"(module)": digest("".join(rest))}


def spelled(node) -> str:
    """A syntax tree as text, without places, docstrings and empty fields, which differ between Pythons."""
    if isinstance(node, list):
        return f"[{','.join(map(spelled, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and _is_docstring(node, value):
            value = value[1:]
        if value not in (None, []) and name not in ("ctx", "kind", "type_comment"):
            fields.append(f"{name}={spelled(value)}")
        elif isinstance(node, ast.Constant) and name == "value":
            fields.append("value=None")
    return f"{type(node).__name__}({','.join(fields)})"


def _is_docstring(node, body) -> bool:
    holders = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    first = body[0] if isinstance(node, holders) and body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def digest(content: str | bytes) -> str:
    """sha256 as hex."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
