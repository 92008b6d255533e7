"""Generate the config's documentation from its classes: a JSON schema for editors and a table of every key.

posttrain schema
"""

import json
import re
from pathlib import Path

from posttrain.config.sections import LARGEST, Campaign
from posttrain.config.stages import BUILDERS, JUDGES, REPORTED, STAGES, Experiment, upstream
from posttrain.ground import code
from posttrain.ground.files import write_json

MARK = "<!-- Below: written by `posttrain schema` from workflow/posttrain/config/sections.py; do not edit. -->"

# Of a JSON schema: a bound's sign, and a type's name in the reference.
SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "multipleOf": "multiple of"}
TYPES = {"boolean": "true / false", "integer": "integer", "number": "number", "string": "text", "null": "",
         "array": "[values]"}  # fmt: skip


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
    return whole


def reference() -> str:
    """A table for each section: key, type, default, meaning."""
    parts = []
    for title, model in (
        ("The campaign (`config.yaml`)", Campaign.model_json_schema()),
        ("An experiment (`experiments/NAME.yaml`)", Experiment.model_json_schema()),
    ):
        parts += [f"\n## {title}\n", *section("", model, model["$defs"])]
    return "\n".join([*parts, *code_table()]) + "\n"


def reruns(stage: str) -> str:
    """A sentence that lists the stages that a key of a stage's section reruns."""
    if stage in REPORTED:
        of_all = " of every policy" if stage in JUDGES else ""
        return f"A key here reruns `{stage}`{of_all}, then `report`."
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


def section(prefix: str, model: dict, parts: dict[str, dict]) -> list[str]:
    """The table of a section, followed by the tables of the sections within it.

    model: its JSON schema; parts: the schemas of all sections by name.
    """
    stage = prefix[:-1]
    lines = [
        f"{model['description']}\n",
        *([f"{reruns(stage)}\n"] if stage in STAGES else []),
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    nested = []
    for key, field in model["properties"].items():
        default = "**required**" if key in model.get("required", []) else default_of(field)
        lines.append(f"| `{prefix}{key}` | {kind(field)} | {default} | {meaning(field)} |")
        if inner := re.search(r"#/\$defs/(\w+)", json.dumps(field)):
            item = "[]" if kind(field).startswith("list") else ".ID" if "patternProperties" in field else ""
            nested += ["", f"### `{prefix}{key}`\n", *section(f"{prefix}{key}{item}.", parts[inner[1]], parts)]
    return lines + nested


def meaning(field: dict) -> str:
    """The meaning of a key, with the values of other keys that it needs and the further stages that it reruns."""
    text = " ".join(field.get("description", "").split())
    if conditions := field.get("only_with"):
        needed = {other: " / ".join(value or "null" for value in values) for other, values in conditions.items()}
        only = "; ".join(f"`{other}: {values}`" for other, values in needed.items())
        text += f" Only with {only}."
    if further := field.get("also"):
        text += f" Reruns {' and '.join(f'`{other}`' for other in further)} too."
    return text.replace("|", "\\|")


def kind(field: dict) -> str:
    """Type and bounds of a key as text; "" for null, which stands for an unset key. That no number is over LARGEST is
    said once, above the tables."""
    if "anyOf" in field:
        return ", or ".join(filter(None, map(kind, field["anyOf"])))
    if "$ref" in field:
        return "section"
    if values := field.get("enum", [field["const"]] if "const" in field else []):
        return " / ".join(f"`{value}`" for value in values)
    if field["type"] == "object":
        inner = field.get("additionalProperties") or next(iter(field["patternProperties"].values()))
        return f"`key: {TYPES['array'] if inner.get('type') == 'array' else kind(inner)}` lines"
    if field["type"] == "array":
        return f"list of {kind(field['items'])}" + ("s" if "$ref" in field["items"] else "")
    bounds = [f"{sign} {field[rule]:g}" for rule, sign in SIGNS.items() if abs(field.get(rule, LARGEST)) < LARGEST]
    return f"{TYPES[field['type']]} {', '.join(bounds)}".rstrip()


def default_of(field: dict) -> str:
    """The default of a key as text; "" for none and for a section's."""
    value = field.get("default")
    return "" if value in (None, "", []) or "$ref" in field else f"`{json.dumps(value)}`"
