"""From YAML files to validated experiments, and who owns which artifact. Imports no torch.

posttrain check config/config.yaml
"""

import difflib
import os
import re
from pathlib import Path

from pydantic import ValidationError

from posttrain.config import grid, reader
from posttrain.config.experiment import Campaign, Experiment
from posttrain.config.sections import NAME, Section, conditional, section_class
from posttrain.config.sources import own_files
from posttrain.dag import checks
from posttrain.dag.plan import RESERVED, Plan
from posttrain.ground.errors import UserError

DEFAULT = "config/config.yaml"
# What pydantic says in Python's words, for a person who writes YAML.
PLAIN = {"bool_type": "it should be true or false", "model_type": "it should be a section of `key: value` lines"}


def load(path: str | Path, overrides: dict | None = None) -> Plan:
    """Read a campaign and its experiments (`experiments/NAME.yaml` beside it), with all parents.

    `overrides` are top-level keys that replace the file's, a section's keys one by one (Snakemake's `--config`).
    Raises UserError with every mistake at once, each with file:line, dotted key, what was found and what is allowed.
    """
    path = Path(path)
    values = reader.read(path)
    for key, value in (overrides or {}).items():
        sections = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = values[key] | value if sections else value
        places = {place: line for place, line in values.places.items() if re.split(r"[.\[]", place)[0] != key}
        values.places = places | {key: "--config"}
    problems: list[str] = []
    campaign = validated(Campaign, values, values.places, problems)
    names = [name for name in _list(values.get("experiments")) if isinstance(name, str)]
    if len(set(names)) < len(names):
        problems.append(f"{values.places['experiments']}: experiments: names an experiment twice")
    layers = _read_layers(names, values.places, path.parent / "experiments", problems)
    grown = {key: line for key, line in values.places.items() if f"{key}.".startswith("grid.")}
    root = reader.Settings({"grid": values.get("grid")}, {"": str(path)} | grown)
    experiments = _experiments(layers, root, problems)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    within = os.path.relpath(path)  # Snakemake makes it absolute; another clone has it elsewhere
    named = str(path) if within.startswith("..") else within
    return Plan(campaign, experiments, "" if named == DEFAULT else named)


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _read_layers(names: list[str], places: dict, folder: Path, problems: list) -> dict:
    """The raw settings of every experiment that is listed or is a parent of one."""
    layers: dict[str, reader.Settings | None] = {}
    wanted = [(name, places.get(f"experiments[{number}]", "--config")) for number, name in enumerate(names)]
    while wanted:
        name, place = wanted.pop()
        if name in layers:
            continue
        layers[name] = None
        if not re.fullmatch(NAME, name):
            problems.append(f"{place}: experiment {name!r}: a name is lower-case letters, digits, - and _ (at most 63)")
        elif name in RESERVED:
            problems.append(f"{place}: experiment {name!r}: this name is reserved ({', '.join(RESERVED)})")
        elif not (file := folder / f"{name}.yaml").is_file():
            problems.append(f"{place}: experiment {name!r}: there is no {file}{_nearest(name, _names(folder))}")
        else:
            try:
                layers[name] = reader.read(file)
            except UserError as error:
                problems += error.problems
                continue
            parent = layers[name].get("extends")
            if isinstance(parent, str):
                wanted.append((parent, f"{layers[name].places['extends']}: extends"))
    return layers


def _names(folder: Path) -> list[str]:
    return [file.stem for file in folder.glob("*.yaml")]


def _experiments(layers: dict, root: reader.Settings, problems: list) -> dict[str, Experiment]:
    """The experiments by name, and the cells of those that have a grid by theirs.

    root: what every experiment starts from, the grid of the campaign.
    """
    experiments = {}
    for name, layer in layers.items():
        if layer is None or (chain := _chain(name, layers, problems)) is None:
            continue
        values, places = _merge([root, *chain])
        axes = _axes(name, values, places, layer, problems)
        made = {name: _built(values, places, layer, problems)}
        short = grid.labels(list(axes))
        around = places | {key: _place(places, f"grid.{key}") for key in axes}
        read = validated(Experiment, values, places, []) if made[name] else None
        alike = {key: section for key, section in read or () if isinstance(section, Section) and key in values}
        for key in axes:  # the sections that no axis changes are read once for all cells
            alike.pop(key.partition(".")[0], None)
        for cell in grid.cells(axes) if read else []:
            copied = _copy({key: value for key, value in values.items() if key not in alike}) | alike
            for key, value in cell.items():
                _put(copied, key, value)
            made[grid.cell_name(name, cell, short)] = _built(copied, around, layer, problems)
        experiments |= {name: experiment for name, experiment in made.items() if experiment}
    return experiments


def _axes(name: str, values: dict, places: dict, layer: reader.Settings, problems: list) -> dict[str, list]:
    """The axes of an experiment's grid; none after adding what is wrong with them to `problems`."""
    axes, known = values.get("grid") or {}, len(problems)
    if not (isinstance(axes, dict) and all(isinstance(held, list) and held for held in axes.values())):
        return {}  # validation says so
    own = layer.get("grid") if isinstance(layer.get("grid"), dict) else {}
    for key in axes:
        if key not in own and key in layer.places:
            where = _place(places, f"grid.{key}")
            problems.append(f"{layer.places[key]}: {key}: is an axis of the grid ({where}); set grid: {{{key}: [...]}}")
        if key.partition(".")[0] in ("grid", "extends", "question"):
            problems.append(f"{_place(places, f'grid.{key}')}: grid.{key}: cannot be an axis")
    for key, said in grid.mistakes(name, axes):
        problems.append(f"{_place(places, f'grid.{key}')}: grid.{key}: {said}")
    return axes if len(problems) == known else {}


def _put(values: dict, key: str, value) -> None:
    """Set a dotted key of nested mappings. What the value makes useless is forgotten, as for a child's own key."""
    head, _, rest = key.partition(".")
    layer: dict = {}
    inner = layer
    while rest:
        inner[head], (head, _, rest) = {}, rest.partition(".")
        inner = next(iter(inner.values()))
    inner[head] = value
    _overlay(values, layer, Experiment)


def _built(values: dict, places: dict, layer: reader.Settings, problems: list) -> Experiment | None:
    """The experiment with its defaults filled in, or None after adding every mistake in it to `problems`."""
    known = len(problems)
    experiment, dropped = validated(Experiment, values, places, problems), []
    if experiment is None:
        experiment, dropped = _without_mistakes(values)
    if experiment is None:
        return None
    found = list(checks.contradictions(experiment))
    found += [(key, reason) for key, reason in checks.unused(experiment) if key in layer]
    resolved = checks.resolve(experiment)
    for stage in ("prepare", "base"):
        for key, file in own_files(stage, getattr(resolved, stage)):
            if not os.path.exists(file):
                found.append((key, f"there is no {file} (looked for in {Path.cwd()})"))
            elif set(str(file)) & set("{}<>"):
                found.append((key, f"{file}: Snakemake reads {{ }} < > in a path as its own; rename it"))
    found = [(key, said) for key, said in found if not any(_related(key, gone) for gone in dropped)]
    problems += [f"{_place(places, key)}: {key}: {message}" for key, message in found]
    return resolved if len(problems) == known else None


def _related(key: str, other: str) -> bool:
    """Whether one dotted key is the other, or holds it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _chain(name: str, layers: dict, problems: list) -> list[reader.Settings] | None:
    """The layers from the oldest ancestor to the experiment; None when one is missing or there is a cycle."""
    chain, names = [], []
    while name is not None:
        if name in names:
            place = layers[name].places["extends"]
            cycle = names[names.index(name) :]
            first = cycle.index(min(cycle))  # told the same from wherever it is entered
            problems.append(f"{place}: extends: a cycle: {' -> '.join([*cycle[first:], *cycle[: first + 1]])}")
            return None
        if layers.get(name) is None:
            return None
        names.append(name)
        chain.insert(0, layers[name])
        name = layers[name].get("extends")
        if not isinstance(name, str | None):
            return chain  # the type error is reported by validation
    return chain


def _merge(chain: list[reader.Settings]) -> tuple[dict, dict[str, str]]:
    """Later layers over earlier ones: mappings key by key, everything else whole."""
    values: dict = {}
    places: dict[str, str] = {}
    for layer in chain:
        _overlay(values, layer, Experiment)
        lists = {key.partition("[")[0] for key in layer.places if "[" in key}  # an inherited list goes as a whole
        kept = {key: line for key, line in places.items() if "[" not in key or key.partition("[")[0] not in lists}
        places = kept | layer.places
    values.pop("extends", None)
    if "extends" in chain[-1]:
        values["extends"] = chain[-1]["extends"]
    values.pop("question", None) if "question" not in chain[-1] else None
    return values, places


def _overlay(values: dict, layer: dict, model: type[Section] | None) -> None:
    """Put a layer over `values`. A key that the layer's own choice makes useless is not inherited:
    `method: prefix` in a child forgets the parent's `rank`."""
    for key, fields in conditional(model).items() if model else ():
        for other, allowed in fields.items():
            if other in layer and layer[other] not in allowed:
                values.pop(key, None)
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _overlay(values[key], value, _model_at(model, key))
        else:
            values[key] = _copy(value)


def _copy(value):
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _model_at(model: type | None, key: str) -> type[Section] | None:
    """The section class that a key of a section holds, if it holds one."""
    field = model.model_fields.get(key) if model else None
    return section_class(field.annotation) if field else None


def validated(model: type[Section], values: dict, places: dict, problems: list):
    """The section, or None after adding every mistake in it to `problems`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        for mistake in error.errors(include_url=False):
            problems.append(_explain(model, mistake, places))
    return None


def _without_mistakes(values: dict) -> tuple[Experiment | None, list[str]]:
    """The experiment less what is wrong in it, so that its contradictions are told in the same breath; and the dotted
    keys that were left out, of which nothing more can be said."""
    dropped: list[str] = []
    for _ in range(8):  # a section without a key that it must have goes in the next round
        try:
            return Experiment.model_validate(values), dropped
        except ValidationError as error:
            for mistake in error.errors(include_url=False):
                path = mistake["loc"][:-1] if mistake["type"] == "missing" else mistake["loc"]
                if not (gone := _drop(values, list(path))):
                    return None, dropped
                dropped.append(gone)
    return None, dropped


def _drop(values: dict, path: list) -> str:
    """Delete a key, or the key that holds the list that a mistake is in; returns it dotted, "" where there is none."""
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


def _explain(model: type[Section], mistake: dict, places: dict) -> str:
    """One line for a person: file:line, dotted key, what was found, what is allowed, nearest known key."""
    *above, last = mistake["loc"]
    path = [part for part in above if isinstance(part, int) or _is_key(part)]
    if isinstance(last, int) or _is_key(last) or mistake["type"] == "extra_forbidden":
        path.append(last)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    place = _place(places, key)
    if mistake["type"] == "extra_forbidden":
        known = list(_section_at(model, path[:-1]).model_fields)
        return f"{place}: {key}: unknown key{_nearest(str(path[-1]), known)}; known here: {', '.join(known)}"
    if mistake["type"] == "missing":
        return f"{place}: {key}: missing"
    found = mistake["input"]
    shown = f"a {type(found).__name__}" if isinstance(found, dict | list) else repr(found)
    message = PLAIN.get(mistake["type"]) or mistake["msg"][0].lower() + mistake["msg"][1:]
    return f"{place}: {key}: found {shown}, {message.replace('input should', 'it should')}{_hint(mistake)}"


def _hint(mistake: dict) -> str:
    expected = mistake.get("ctx", {}).get("expected", "")
    names = [name.strip("' ") for name in expected.replace(" or ", ", ").split(",")]
    return _nearest(str(mistake["input"]), names)


def _is_key(part: str) -> bool:
    return part.isidentifier() or not any(mark in part for mark in "[(-")


def _section_at(model: type[Section], path: list) -> type[Section]:
    for part in path:
        if isinstance(part, str):
            model = _model_at(model, part) or model
    return model


def _place(places: dict[str, str], key: str) -> str:
    """file:line of a key, or of the nearest key above it."""
    while key and key not in places:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return places.get(key, "?")


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
