"""The fingerprint of the code that a stage runs: the definitions of the package that it could use.

Comments, formatting, docstrings, annotations and messages do not count (`counted`), nor does Python's version.
Code that runs at import counts in all modules that the stage reaches by imports. A function or a literal value counts
where code that counts mentions its name, as an identifier, an attribute or a text. Where code can reach a definition
without its name, the whole module counts, or all modules that the stage reaches.
"""

import ast
import filecmp
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from posttrain.ground.counted import counted, mentions, parts
from posttrain.ground.errors import UserError
from posttrain.ground.files import write_text
from posttrain.ground.syntax import digest, spelled

PACKAGE = Path(__file__).parents[1]
# Modules that do not change what a stage computes: `config` acts through the section, the others print and report.
UNCOUNTED = ("config", "ground.errors", "ground.progress", "training.tracking")
CACHE = Path(".snakemake/fingerprints.json")  # parsed modules by the digest of their bytes
VERSION = 3  # of the cache's format
OWN = {"globals", "locals", "vars"}  # reach any definition of the module that calls them
ALL = {"eval", "exec", "__import__", "import_module", "__globals__"}  # reach any definition at all, like `sys.modules`


class Part(NamedTuple):
    """A definition of a module, or the rest of the module."""

    digest: str  # "" for no code
    names: list[str]  # names that it mentions
    imports: list[str]  # modules of the package that it imports
    whole: list[str]  # modules of which it may use any definition; "*" for all modules


def other_package(workflow: Path) -> tuple[str, str] | None:
    """(what is wrong, the command that mends it) where the package that runs is not that of a clone; else None.

    A second clone, or a worktree, in the environment of another one would run the other one's code. In a container the
    package is a copy, which must be equal. workflow: the folder of the clone's Snakefile; one without a package, which
    another Snakefile includes, has none to run.
    """
    own = Path(os.path.realpath(workflow), PACKAGE.name)
    if not own.is_dir() or own.samefile(PACKAGE):
        return None
    if not (image := os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")):
        return f"{PACKAGE} would run, not this folder's {own}", "make setup && source .venv/bin/activate"
    sources = [path.relative_to(own) for path in (*own.rglob("*.py"), *own.glob("templates/*"))]
    _, different, absent = filecmp.cmpfiles(own, PACKAGE, sources, shallow=False)
    if not different and not absent:
        return None
    names = ", ".join(map(str, sorted([*different, *absent])[:3]))
    return f"{image} holds other code than {own}: {names}", f"apptainer build --force {image} envs/posttrain.def"


def refuse_other_package(workflow: Path) -> None:
    """Raise UserError where the package that runs is not that of the clone (`other_package`)."""
    if problem := other_package(workflow):
        raise UserError("{}: {}".format(*problem))


def let_jobs_import(workflow: Path) -> None:
    """Let this process's jobs import the package of a clone, whichever clone made the environment that is active."""
    earlier = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(workflow.resolve()), *([earlier] if earlier else [])])


def code(stage: str) -> dict[str, str]:
    """Module -> digest of the definitions that a stage could use, with the templates that the module reads."""
    lines: dict[str, list[str]] = {}
    for place, content in definitions(stage).items():
        lines.setdefault(place.partition(":")[0], []).append(f"{place} {content}")
    return {module: digest("\n".join(of_module))[:16] for module, of_module in lines.items()}


@cache
def fingerprint_of(stage: str) -> str:
    """One digest for all the code of a stage, as 16 hex digits."""
    return digest(json.dumps(definitions(stage)))[:16]


@cache
def definitions(stage: str) -> dict[str, str]:
    """Digests of all code that a stage could use, by MODULE:DEFINITION, or MODULE for code that runs at import."""
    start = f"stages.{stage}"
    names, whole = {stage}, set()
    digests: dict[str, str] = {}
    waiting = {module: dict(module_parts(module)) for module in [start, *_packages_above(start)]}
    while True:
        new = [
            (module, name)
            for module, of_module in waiting.items()
            for name in of_module
            if not name or name in names or module in whole or "*" in whole
        ]
        if not new:
            return {place: content for place, content in sorted(digests.items()) if content}
        for module, name in new:
            part = waiting[module].pop(name)
            digests[f"{module}:{name}".removesuffix(":")] = part.digest
            names.update(part.names)
            whole.update(part.whole)
            for imported in part.imports:
                if imported not in waiting:
                    waiting[imported] = dict(module_parts(imported))


def uncounted(name: str) -> bool:
    """Whether a module, or the package that contains it, does not count."""
    return any(f"{name}.".startswith(f"{other}.") for other in UNCOUNTED)


def source(name: str) -> Path:
    """The file of a module, such as `stages.sft`; for a package, its `__init__`."""
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _packages_above(name: str) -> set[str]:
    """The packages that contain a module, whose `__init__` runs before it; `__init__` is the whole package's."""
    pieces = name.split(".")
    above = {"__init__", *(".".join(pieces[:end]) for end in range(1, len(pieces)))}
    return {package for package in above if source(package).is_file()}


@cache
def module_parts(name: str) -> dict[str, Part]:
    """Definition -> its part; the rest of the module is under "". Raises UserError where the module cannot be read.

    A module that names the folder `templates` reads files there; their bytes count with it.
    """
    file = source(name)
    try:
        content = file.read_bytes()
        templates = sorted(PACKAGE.glob("templates/*")) if b'"templates"' in content else []
        digests = {item.name: digest(item.read_bytes()) for item in templates if item.suffix.encode() in content}
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    key = digest(json.dumps([VERSION, name, digest(content), digests]))
    if key not in _parsed():
        try:
            _parsed()[key] = parsed(content, name, file.name == "__init__.py")
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{file}: is not a valid Python module: {error}") from None
        if digests:
            rest = _parsed()[key][""]
            _parsed()[key][""] = rest._replace(digest=digest(rest.digest + json.dumps(digests))[:16])
    _USED[key] = _parsed()[key]
    return {part: value._replace(imports=_loaded(value.imports)) for part, value in _parsed()[key].items()}


def _loaded(imports: list[str]) -> list[str]:
    """The modules that count among imported names, and the packages that contain them."""
    modules = {module for module in imports if source(module).is_file() and not uncounted(module)}
    return sorted(modules.union(*map(_packages_above, modules)))


def parsed(content: str | bytes, name: str = "", is_package: bool = False) -> dict[str, Part]:
    """The parts of a module, by its text. Raises SyntaxError and ValueError."""
    tree = counted(ast.parse(content))
    above = ["posttrain", *name.split("."), *(["__init__"] if is_package else [])]
    aliases = {alias: module for node in ast.walk(tree) for alias, module in _imports(node, above)}
    return {part: _part(statements, name, above, aliases) for part, statements in parts(tree).items()}


def _part(statements: list[ast.stmt], name: str, above: list[str], aliases: dict[str, str]) -> Part:
    """One part. above: the module's path, for relative imports. aliases: name in the module -> imported module."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    imports = [module for node in nodes for _, module in _imports(node, above)]
    names = {mention for statement in statements for mention in mentions(statement)}
    text = "".join(map(spelled, statements))
    whole = set(_whole(nodes, name, aliases))
    return Part(digest(text)[:16] if text else "", sorted(names), sorted(set(imports)), sorted(whole))


def _imports(node: ast.AST, above: list[str]) -> Iterator[tuple[str, str]]:
    """(local name, possible module of the package) of each name in an import; the local name is "" for a module that is
    imported without a name."""
    if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").partition(".")[0] == "posttrain"):
        origin = [*(above[: -node.level] if node.level else []), *filter(None, [node.module])]
        within = ".".join(origin).partition(".")[2]
        yield from [("", within)] if within else []
        yield from ((alias.asname or alias.name, f"{within}.{alias.name}".lstrip(".")) for alias in node.names)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.startswith("posttrain"):
                yield alias.asname or "posttrain", alias.name.partition(".")[2] or "__init__"


def _whole(nodes: list[ast.AST], name: str, aliases: dict[str, str]) -> Iterator[str]:
    """The modules of which the nodes may use any definition without its name; "*" for all modules."""
    only_attribute = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr != "__dict__"}
    for node in nodes:
        match node:
            case ast.Name(id=used) if used in aliases and id(node) not in only_attribute:
                yield aliases[used]  # passed on, perhaps to `getattr`
            case ast.Name(id=used) if used in OWN:
                yield name
            case ast.Name(id=used) | ast.Attribute(attr=used) if used in ALL and not (
                used in ("eval", "exec") and isinstance(node, ast.Attribute)
            ):
                yield "*"
            case ast.Attribute(value=ast.Name(id="sys"), attr="modules"):
                yield "*"
            case ast.ImportFrom(module="sys") if any(alias.name == "modules" for alias in node.names):
                yield "*"
            case ast.Import() if any(alias.name.startswith("posttrain") for alias in node.names):
                yield "*"
            case ast.ImportFrom(module="posttrain") if not all(alias.name.startswith("__") for alias in node.names):
                yield "*"  # a package, whose attributes are modules


def remember() -> None:
    """Write the cache of parsed modules, so that the next `snakemake` parses only changed ones."""
    text = json.dumps(_USED, sort_keys=True)
    if CACHE.parent.is_dir() and not (CACHE.is_file() and CACHE.read_text(encoding="utf-8") == text):
        write_text(CACHE, text)


_USED: dict[str, dict[str, Part]] = {}  # entries of `_parsed` that this process used


@cache
def _parsed() -> dict[str, dict[str, Part]]:
    """The cached modules by digest; empty where the cache cannot be read."""
    try:
        cached = json.loads(CACHE.read_text(encoding="utf-8"))
        return {key: {name: Part(*fields) for name, fields in of_module.items()} for key, of_module in cached.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
