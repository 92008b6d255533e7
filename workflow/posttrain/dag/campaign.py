"""Read a campaign's YAML files into a plan of validated experiments. Imports no torch.

posttrain check config/config.yaml
"""

import os
import re
from pathlib import Path
from typing import Any

from posttrain.config import grid
from posttrain.config.sections import NAME, Campaign, Optimisation, Section, Sft, Tokenizer, conditional
from posttrain.config.settings import Settings, model_at, nearest, place_of, read_settings, validated, without_mistakes
from posttrain.config.sources import own_files
from posttrain.config.stages import STAGES, Experiment
from posttrain.dag import checks, functions
from posttrain.dag.plan import RESERVED, Plan
from posttrain.ground.errors import UserError

DEFAULT = "config/config.yaml"


def load(path: str | Path, overrides: dict | None = None) -> Plan:
    """Read a campaign and its experiments (`experiments/NAME.yaml` beside it), with all parents.

    `overrides` are top-level keys that replace the file's (Snakemake's `--config`); sections are merged key by key.
    Raises UserError with every mistake at once, each with file:line, dotted key, what was found and what is allowed.
    """
    path = Path(path)
    values = _overridden(read_settings(path), overrides or {})
    problems: list[str] = []
    campaign = validated(Campaign, values, values.places, problems)
    listed = values.get("experiments")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    if len(set(names)) < len(names):
        problems.append(f"{values.places['experiments']}: experiments: names an experiment twice")
    layers = _read_layers(names, values.places, path.parent / "experiments", problems)
    grid_places = {key: line for key, line in values.places.items() if f"{key}.".startswith("grid.")}
    root = Settings({"grid": values.get("grid")}, {"": str(path)} | grid_places)
    experiments = _experiments(layers, root, problems)
    if campaign is None or problems:
        raise UserError(*dict.fromkeys(problems))
    relative = os.path.relpath(path)  # Snakemake makes it absolute; another clone has it elsewhere
    configfile = str(path) if relative.startswith("..") else relative
    return Plan(campaign, experiments, "" if configfile == DEFAULT else configfile)


def _overridden(values: Settings, overrides: dict) -> Settings:
    """A campaign's settings, with those of Snakemake's `--config` in place of the file's."""
    for key, value in overrides.items():
        sections = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = values[key] | value if sections else value
        places = {place: line for place, line in values.places.items() if re.split(r"[.\[]", place)[0] != key}
        values.places = places | {key: "--config"}
    return values


def _read_layers(names: list[str], places: dict, folder: Path, problems: list) -> dict:
    """The raw settings of every listed experiment and of its parents."""
    layers: dict[str, Settings | None] = {}
    wanted = [(name, places.get(f"experiments[{number}]", "--config")) for number, name in enumerate(names)]
    while wanted:
        name, place = wanted.pop()
        if name in layers:
            continue
        layers[name], file = None, folder / f"{name}.yaml"
        if not re.fullmatch(NAME, name):
            problems.append(f"{place}: experiment {name!r}: a name is lower-case letters, digits, - and _ (at most 63)")
        elif name in RESERVED:
            problems.append(f"{place}: experiment {name!r}: this name is reserved ({', '.join(RESERVED)})")
        elif not file.is_file():
            hint = nearest(name, [other.stem for other in folder.glob("*.yaml")])
            problems.append(f"{place}: experiment {name!r}: there is no {file}{hint}")
        else:
            try:
                layer = layers[name] = read_settings(file)
            except UserError as error:
                problems += error.problems
                continue
            if isinstance(parent := layer.get("extends"), str):
                wanted.append((parent, f"{layer.places['extends']}: extends"))
    return layers


def _experiments(layers: dict, root: Settings, problems: list) -> dict[str, Experiment]:
    """The experiments and the cells of their grids, by name.

    root: the settings that every experiment starts from: the campaign's grid.
    """
    experiments: dict[str, Experiment | None] = {}
    for name, layer in layers.items():
        if layer is None or (chain := _ancestry(name, layers, problems)) is None:
            continue
        values, places = _merged([root, *chain])
        axes = _axes(name, values, places, layer, problems)
        experiments[name] = _resolved(values, places, layer, problems)
        if axes and experiments[name]:
            experiments |= _cells(name, axes, values, places, layer, problems)
    return {name: experiment for name, experiment in experiments.items() if experiment}


def _cells(
    name: str, axes: dict, values: dict, places: dict, layer: Settings, problems: list
) -> dict[str, Experiment | None]:
    """The cells of an experiment's grid, by name. A section that no axis changes is validated once for all cells."""
    places = places | {key: place_of(places, f"grid.{key}") for key in axes}
    experiment = validated(Experiment, values, places, [])
    unchanged = values.keys() - {key.partition(".")[0] for key in axes}
    shared = {key: part for key, part in experiment or () if isinstance(part, Section) and key in unchanged}
    labels, cells = grid.labels(list(axes)), {}
    for cell in grid.cells(axes):
        settings = _copied({key: value for key, value in values.items() if key not in shared}) | shared
        for key, value in cell.items():
            _put(settings, key, value)
        cells[grid.cell_name(name, cell, labels)] = _resolved(settings, places, layer, problems)
    return cells


def _axes(name: str, values: dict, places: dict, layer: Settings, problems: list) -> dict[str, list]:
    """The axes of an experiment's grid; empty where they have mistakes, which are added to `problems`."""
    axes, before = values.get("grid") or {}, len(problems)
    if not (isinstance(axes, dict) and all(isinstance(axis, list) and axis for axis in axes.values())):
        return {}  # validation reports it
    layer_axes = layer.get("grid")
    inherited = axes.keys() - (layer_axes if isinstance(layer_axes, dict) else {}).keys()
    for key in axes:
        place = place_of(places, f"grid.{key}")
        if key in inherited and key in layer.places:
            problems.append(f"{layer.places[key]}: {key}: is an axis of the grid ({place}); set grid: {{{key}: [...]}}")
        if key.partition(".")[0] in ("grid", "extends", "question"):
            problems.append(f"{place}: grid.{key}: cannot be an axis")
    for key, mistake in grid.mistakes(name, axes):
        problems.append(f"{place_of(places, f'grid.{key}')}: grid.{key}: {mistake}")
    return axes if len(problems) == before else {}


def _resolved(values: dict, places: dict, layer: Settings, problems: list) -> Experiment | None:
    """The experiment with its defaults filled in, or None after adding every mistake in it to `problems`.

    layer: the experiment's own file; a stage must read each of its sections. Inherited sections may be unread.
    """
    before = len(problems)
    experiment = validated(Experiment, values, places, problems)
    dropped: list[str] = []
    if experiment is None:
        experiment, dropped = without_mistakes(Experiment, values)
    if experiment is None:
        return None
    mistakes = list(checks.contradictions(experiment))
    mistakes += [(key, reason) for key, reason in checks.unused(experiment) if key in layer]
    resolved = resolve(experiment)
    mistakes += _files(resolved)
    mistakes = [(key, mistake) for key, mistake in mistakes if not any(_related(key, other) for other in dropped)]
    problems += [f"{place_of(places, key)}: {key}: {mistake}" for key, mistake in mistakes]
    return resolved if len(problems) == before else None


def resolve(experiment: Experiment) -> Experiment:
    """The experiment with the defaults filled in that follow from other sections."""
    base, prepare, seeded = experiment.base, experiment.prepare, []
    tokenizer = prepare.tokenizer or Tokenizer(path=base.path, hub=base.hub, vocab_size=1024 if base.scratch else None)
    update: dict[str, Section] = {
        "prepare": prepare.model_copy(update={"max_tokens": experiment.longest_row, "tokenizer": tokenizer})
    }
    if base.scratch and base.scratch.seed is None:
        update["base"] = base.model_copy(update={"scratch": base.scratch.model_copy(update={"seed": experiment.seed})})
        seeded.append("base")
    for stage in STAGES:
        section = getattr(experiment, stage)
        if isinstance(section, Optimisation):
            seeded += [stage] if section.seed is None else []
            update[stage] = _trained(section, experiment)
    for stage, filled in functions.named_in(experiment).items():
        update[stage] = update.get(stage, getattr(experiment, stage)).model_copy(update=filled)
    resolved = experiment.model_copy(update=update)
    resolved._seeded = frozenset(seeded)
    return resolved


def _trained(section: Optimisation, experiment: Experiment) -> Section:
    """The section of a stage that trains, with its seed, its longest row, and the arithmetic on weights in NF4; that on
    a given model without `base.dtype` follows when the model is here."""
    update: dict[str, Any] = {"seed": experiment.seed if section.seed is None else section.seed}
    base = experiment.base
    if isinstance(section, Sft) and section.method == "qlora":
        update["compute"] = section.compute or base.dtype or ("float32" if base.scratch else None)
    if "max_length" in type(section).model_fields:
        update["max_length"] = getattr(section, "max_length") or experiment.longest_row  # noqa: B009  # in some only
    return section.model_copy(update=update)


def _files(experiment: Experiment) -> list[tuple[str, str]]:
    """(dotted key, mistake) for each of the user's own files that does not exist or whose path Snakemake cannot use."""
    mistakes = []
    for stage in STAGES:
        for key, file in own_files(stage, getattr(experiment, stage)):
            if os.path.isdir(file):
                mistakes.append((key, f"{file} is a directory, and no file in it can be read here"))
            elif not os.path.exists(file):
                mistakes.append((key, f"there is no {file} (looked for in {Path.cwd()})"))
            elif set(str(file)) & set("{}<>"):
                mistakes.append((key, f"{file}: {{ }} < > have a special meaning in Snakemake's paths; rename it"))
    return mistakes


def _related(key: str, other: str) -> bool:
    """Whether two dotted keys are equal or one holds the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _ancestry(name: str, layers: dict, problems: list) -> list[Settings] | None:
    """The layers from the oldest ancestor to the experiment; None where one is missing or there is a cycle."""
    chain: list[Settings] = []
    names: list[str] = []
    while name is not None:
        if name in names:
            place = layers[name].places["extends"]
            cycle = names[names.index(name) :]
            first = cycle.index(min(cycle))  # so that the same cycle is reported once
            problems.append(f"{place}: extends: a cycle: {' -> '.join([*cycle[first:], *cycle[: first + 1]])}")
            return None
        if layers.get(name) is None:
            return None
        names.append(name)
        chain.insert(0, layers[name])
        name = layers[name].get("extends")
        if not isinstance(name, str | None):
            return chain  # validation reports the type
    return chain


def _merged(chain: list[Settings]) -> tuple[dict, dict[str, str]]:
    """The merged settings of a chain of layers, and the place of each: mappings key by key, other values whole."""
    values: dict = {}
    places: dict[str, str] = {}
    for layer in chain:
        _overlay(values, layer, Experiment)
        lists = {key.partition("[")[0] for key in layer.places if "[" in key}  # a list replaces an inherited one whole
        inherited = {key: line for key, line in places.items() if "[" not in key or key.partition("[")[0] not in lists}
        places = inherited | layer.places
    for key in ("extends", "question"):  # not inherited
        values.pop(key, None)
        if key in chain[-1]:
            values[key] = chain[-1][key]
    return values, places


def _overlay(values: dict, layer: dict, model: type[Section] | None) -> None:
    """Merge a layer into `values`, settings of `model`. A key that has no effect with the layer's settings is not
    inherited: `method: prefix` in a child drops the parent's `rank`."""
    for key, conditions in conditional(model).items() if model else ():
        for other, allowed in conditions.items():
            if other in layer and layer[other] not in allowed:
                values.pop(key, None)
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _overlay(values[key], value, model_at(model, key))
        else:
            values[key] = _copied(value)


def _put(values: dict, key: str, value) -> None:
    """Set a dotted key of an experiment's settings, as a child experiment would."""
    for part in reversed(key.split(".")):
        value = {part: value}
    _overlay(values, value, Experiment)


def _copied(value):
    """A copy of nested mappings; lists and scalars are shared, as nothing changes them."""
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value
