"""Generate the config's documentation from its classes: a JSON schema for editors and a table of every key.

posttrain schema
"""

import json
import typing
from pathlib import Path

from posttrain.config import sections
from posttrain.config.sections import Campaign, section_class
from posttrain.config.stages import BUILDERS, JUDGES, STAGES, Experiment, upstream
from posttrain.ground import code
from posttrain.ground.files import write_json

MARK = "<!-- Below: written by `posttrain schema` from workflow/posttrain/config/sections.py; do not edit. -->"


def write(folder: Path) -> None:
    """Write `schema.json` (an experiment's; the campaign's under `$defs`) and the key reference in `README.md`."""
    write_json(folder / "schema.json", schema())
    readme = folder / "README.md"
    written = readme.read_text(encoding="utf-8").partition(MARK)[0]
    readme.write_text(f"{written}{MARK}\n{reference()}", encoding="utf-8")


def schema() -> dict:
    """JSON schema of an experiment's file; no key is required, since a child inherits its parent's."""
    whole = Experiment.model_json_schema()
    whole.pop("required", None)
    for part in whole["$defs"].values():
        part.pop("required", None)
    whole["$defs"]["Campaign"] = Campaign.model_json_schema()
    return json.loads(json.dumps(whole))


def reference() -> str:
    """A table for each section: key, type, default, meaning."""
    parts = []
    for title, model in (
        ("The campaign (`config.yaml`)", Campaign),
        ("An experiment (`experiments/NAME.yaml`)", Experiment),
    ):
        parts += [f"\n## {title}\n", *section("", model)]
    return "\n".join([*parts, *code_table()]) + "\n"


def reruns(stage: str) -> str:
    """A sentence that lists the stages that a key of a stage's section reruns."""
    if stage in JUDGES:
        return f"A key here reruns `{stage}` of every policy, then `report`."
    below = [f"`{other}`" for other in BUILDERS if stage in upstream(other)]
    below += [
        f"`{other}` where it reads one of these"
        for other in BUILDERS
        if "policy" in STAGES[other].reads and stage not in {other, *upstream(other)}
    ]
    everything = ", ".join([*below, "the judges of these policies", "`report`"])
    return f"A key here reruns `{stage}`, then {everything}."


def code_table() -> list[str]:
    """The section on code: a table of the stages that an edit of a module reruns."""
    stages = [*STAGES, "report"]
    reached = {stage: code.code(stage) for stage in stages}
    lines = [
        "\n## The code\n",
        "A stage is identified by its section, its inputs and the code that it could use. An edit of a function reruns",
        "those of its module's stages that mention the function; an edit of code that runs at import reruns all of",
        "them. The stages that depend on them follow. Comments, docstrings, annotations, the words of messages and",
        "formatting rerun nothing, nor does a module that is not listed here.\n",
        "| module | stages |",
        "|---|---|",
    ]
    for module in sorted({module for modules in reached.values() for module in modules}):
        lines.append(f"| `{module}` | {', '.join(f'`{stage}`' for stage in stages if module in reached[stage])} |")
    return lines


def section(prefix: str, model: type[sections.Section]) -> list[str]:
    """The table of a section, followed by the tables of the sections within it."""
    stage = prefix[:-1]
    lines = [
        f"{(model.__doc__ or '').strip()}\n",
        *([f"{reruns(stage)}\n"] if stage in STAGES else []),
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    nested = []
    for key, field in model.model_fields.items():
        meaning = " ".join((field.description or "").split())
        if conditions := sections.declared(field).get("only_with"):
            only = "; ".join(f"`{other}: {' / '.join(values)}`" for other, values in conditions.items())
            meaning += f" Only with {only}."
        if further := sections.declared(field).get("also"):
            meaning += f" Reruns {' and '.join(f'`{other}`' for other in further)} too."
        lines.append(f"| `{prefix}{key}` | {kind(field)} | {default(field)} | {meaning.replace('|', chr(92) + '|')} |")
        inner = section_class(field.annotation)
        if inner:
            listed = "[]" if "list" in str(field.annotation) else ""
            nested += ["", f"### `{prefix}{key}`\n", *section(f"{prefix}{key}{listed}.", inner)]
    return lines + nested


def kind(field) -> str:
    """Type and bounds of a key as text."""
    inner = section_class(field.annotation)
    text = str(field.annotation)
    if "dict" in text:
        return "`key: [values]` lines"
    if inner:
        return "list of sections" if "list" in text else "section"
    for name, words in (
        ("Literal", ""),
        ("bool", "true / false"),
        ("int", "integer"),
        ("float", "number"),
        ("str", "text"),
    ):
        if name in text or getattr(field.annotation, "__name__", "") == name:
            if name == "Literal":
                listed = "list of text, or " if "list" in text else ""
                listed = "list of " if typing.get_origin(field.annotation) is list else listed
                return listed + " / ".join(f"`{value}`" for value in literals(field.annotation))
            return ("list of " if "list" in text else "") + words + bounds(field)
    return "text"


def literals(annotation) -> list[str]:
    """All literal values of a type, in unions too."""
    values = []
    for part in typing.get_args(annotation):
        values += [part] if isinstance(part, str) else literals(part)
    return values


def bounds(field) -> str:
    """Bounds of a number, as "≥ 1"."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}
    metadata = list(field.metadata)
    for part in typing.get_args(field.annotation):
        for item in typing.get_args(part)[1:] if hasattr(part, "__metadata__") else []:
            metadata += getattr(item, "metadata", [item])
    texts = [
        f"{sign} {getattr(rule, name):g}" for rule in metadata for name, sign in signs.items() if hasattr(rule, name)
    ]
    return f" {', '.join(texts)}" if texts else ""


def default(field) -> str:
    """The default of a key as text; "" for none, and a mark for a required key."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, sections.Section) or value in ("", []):
        return ""
    return f"`{json.dumps(value)}`"
