"""The fingerprint of the code that a stage runs: the definitions of the package that it could use.

Comments, formatting, docstrings, annotations and messages never count (`counted`), nor does Python's version.
Of the modules that a stage reaches by imports, what runs when they are imported counts. A function or a literal value
counts where its name is mentioned by anything that counts: as an identifier, an attribute or a text. Where a program
can come by a definition without its name, the whole module counts, or all modules that the stage reaches.
"""

import ast
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from posttrain.ground.counted import counted, mentions, parts
from posttrain.ground.errors import UserError
from posttrain.ground.syntax import digest, spelled

PACKAGE = Path(__file__).parents[1]
# What a stage computes does not depend on these: `config` acts through the section, the others speak to people.
UNCOUNTED = ("config", "ground.errors", "ground.progress", "training.tracking")
CACHE = Path(".snakemake/fingerprints.json")  # of modules already parsed, by the digest of their bytes
VERSION = 3  # of what is kept there
OWN = {"globals", "locals", "vars"}  # reach any definition of the module that calls them
ALL = {"eval", "exec", "__import__", "import_module", "__globals__"}  # reach any definition at all, like `sys.modules`


class Part(NamedTuple):
    """A definition of a module, or what is left of the module without them."""

    digest: str  # "" for nothing
    names: list[str]  # that it mentions
    imports: list[str]  # modules of the package that it loads
    whole: list[str]  # modules of which it may use anything; "*" for all


def code(stage: str) -> dict[str, str]:
    """Module -> digest of what a stage could use of it, with the templates that it reads."""
    lines: dict[str, list[str]] = {}
    for place, content in definitions(stage).items():
        lines.setdefault(place.partition(":")[0], []).append(f"{place} {content}")
    return {module: digest("\n".join(said))[:16] for module, said in lines.items()}


@cache
def fingerprint_of(stage: str) -> str:
    """One digest for all the code of a stage, as 16 hex digits."""
    return digest(json.dumps(definitions(stage)))[:16]


@cache
def definitions(stage: str) -> dict[str, str]:
    """MODULE:DEFINITION, or MODULE for what runs when it is imported -> digest, of all that a stage could use."""
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
    """Whether a module, or the room that it stands in, never counts."""
    return any(f"{name}.".startswith(f"{other}.") for other in UNCOUNTED)


def source(name: str) -> Path:
    """The file of a module of the package, named from within it: `stages.sft`; of a package its `__init__`."""
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _packages_above(name: str) -> set[str]:
    """The packages that a module lies in, whose `__init__` runs before it; `__init__` is the whole package's."""
    pieces = name.split(".")
    above = {"__init__", *(".".join(pieces[:end]) for end in range(1, len(pieces)))}
    return {package for package in above if source(package).is_file()}


@cache
def module_parts(name: str) -> dict[str, Part]:
    """Definition -> what counts of it; the rest of the module is under "". Raises UserError where it cannot be read.

    A module that names the folder `templates` reads its files, whose bytes count with it.
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
            raise UserError(f"{file}: is no Python module that can be read: {error}") from None
        if digests:
            rest = _parsed()[key][""]
            _parsed()[key][""] = rest._replace(digest=digest(rest.digest + json.dumps(digests))[:16])
    _USED[key] = _parsed()[key]
    return {part: value._replace(imports=_loaded(value.imports)) for part, value in _parsed()[key].items()}


def _loaded(imports: list[str]) -> list[str]:
    """The modules that count, and the packages that they lie in, among what was imported: names of either."""
    modules = {module for module in imports if source(module).is_file() and not uncounted(module)}
    return sorted(modules.union(*map(_packages_above, modules)))


def parsed(content: str | bytes, name: str = "", is_package: bool = False) -> dict[str, Part]:
    """The parts of a module's text. Raises SyntaxError and ValueError."""
    tree = counted(ast.parse(content))
    above = ["posttrain", *name.split("."), *(["__init__"] if is_package else [])]
    aliases = {alias: module for node in ast.walk(tree) for alias, module in _imports(node, above)}
    return {part: _part(statements, name, above, aliases) for part, statements in parts(tree).items()}


def _part(statements: list[ast.stmt], name: str, above: list[str], aliases: dict[str, str]) -> Part:
    """above: the module's path, of which relative imports go up. aliases: name in the module -> what it stands for."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    imports = [module for node in nodes for _, module in _imports(node, above)]
    names = {mention for statement in statements for mention in mentions(statement)}
    text = "".join(map(spelled, statements))
    whole = set(_whole(nodes, name, aliases))
    return Part(digest(text)[:16] if text else "", sorted(names), sorted(set(imports)), sorted(whole))


def _imports(node: ast.AST, above: list[str]) -> Iterator[tuple[str, str]]:
    """(name there, what may be a module of the package, named from within it), of an import; ("", ...) for what is
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
    """The modules of which the nodes may use any definition, without its name; "*" for all that are reached."""
    only_attribute = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr != "__dict__"}
    for node in nodes:
        match node:
            case ast.Name(id=used) if used in aliases and id(node) not in only_attribute:
                yield aliases[used]  # handed on, to `getattr` perhaps
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
                yield "*"  # a room, whose attributes are modules


def remember() -> None:
    """Keep what was parsed, so that the next `snakemake` need not parse what did not change."""
    text = json.dumps(_USED, sort_keys=True)
    if CACHE.parent.is_dir() and not (CACHE.is_file() and CACHE.read_text(encoding="utf-8") == text):
        CACHE.with_suffix(".new").write_text(text, encoding="utf-8")
        CACHE.with_suffix(".new").replace(CACHE)


_USED: dict[str, dict[str, Part]] = {}  # of `_parsed`, what this process asked for


@cache
def _parsed() -> dict[str, dict[str, Part]]:
    """What was kept, by the digest of all that it was made from; empty where it cannot be read."""
    try:
        kept = json.loads(CACHE.read_text(encoding="utf-8"))
        return {key: {name: Part(*fields) for name, fields in of_module.items()} for key, of_module in kept.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
