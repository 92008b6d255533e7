"""The files of a campaign's experiments, and what each inherits by `extends`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from posttrain.config.mistakes import model_at, nearest, place_of
from posttrain.config.sections import Section, conditional, is_name
from posttrain.config.settings import OPTION, Settings, read_settings
from posttrain.config.stages import Experiment
from posttrain.dag.claims import named
from posttrain.dag.plan import RESERVED
from posttrain.ground.errors import UserError

DEEPEST = 50  # generations above an experiment: more would overflow the stack where the plan follows it


@dataclass
class Faults:
    """The mistakes of an experiment and its ancestors, of which each is told once."""

    mistakes: set[tuple[str, str]] = field(default_factory=set)  # (key, text)
    unreadable: set[str] = field(default_factory=set)  # keys that no rule may read


class Merged(NamedTuple):
    """The settings of an experiment with those that it inherits."""

    name: str
    values: dict
    places: dict[str, str]  # dotted key -> file:line
    own: Settings  # of its own file
    whole: bool  # whether every ancestor could be read; if not, what is missing may be inherited
    ancestors: list[str]  # from its parent to the oldest


def read_layers(
    names: list[str], verified: list[str], places: dict, folder: Path, problems: list
) -> dict[str, Settings | None]:
    """The settings of each listed experiment's file, of its parents' and of those that its claims name; None where it
    cannot be read. A name that is none, which validation reports, is left out.

    verified: experiments that are listed for their claims alone.
    """
    layers: dict[str, Settings | None] = {}
    claiming = {*names, *verified}
    wanted = [(name, place_of_item(places, "experiments", number)) for number, name in enumerate(names)]
    wanted += [(name, place_of_item(places, "verify", number)) for number, name in enumerate(verified)]
    while wanted:
        name, place = wanted.pop()
        if name in layers or not is_name(name):
            continue
        layers[name], file = None, folder / f"{name}.yaml"
        if name in RESERVED:
            problems.append(f"{place}: the name {name!r} is reserved ({', '.join(RESERVED)})")
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
            if name in claiming:
                wanted += [(other, f"{place_of(layer.places, key)}: {key}") for key, other in named(layer, name)]
    return layers


def place_of_item(places: dict[str, str], key: str, number: int) -> str:
    """file:line and key of an item of a list of the campaign."""
    key = f"{key}[{number}]"
    return f"{places.get(key, OPTION)}: {key}"


def oldest_first(layers: dict[str, Settings | None], root: Settings, problems: list) -> Iterator[Merged]:
    """Each readable experiment with what it inherits, after its ancestors. root: what every one starts from."""
    chains = {name: _ancestry(name, layers, problems) for name, layer in layers.items() if layer is not None}
    deep = {name: len(names) - 1 for name, (names, _) in chains.items() if len(names) > DEEPEST + 1}
    if deepest := max(deep, key=lambda name: deep[name], default=None):
        place = (layers[deepest] or root).places["extends"]
        problems.append(f"{place}: extends: {deep[deepest]} generations are above it; at most {DEEPEST}")
    for name, (names, whole) in sorted(chains.items(), key=lambda chain: len(chain[1][0])):
        if name in deep:
            continue
        chain = [layer for layer in map(layers.get, reversed(names)) if layer is not None]
        values, places = _merged([root, *chain])
        yield Merged(name, values, places, chain[-1], whole, names[1:])


def _ancestry(name: str, layers: dict, problems: list) -> tuple[list[str], bool]:
    """(the experiment and its readable ancestors, from the experiment to the oldest, whether these are all)."""
    names: list[str] = []
    above: object = name
    while above is not None:
        if above in names:
            cycle = names[names.index(above) :]
            first = cycle.index(min(cycle))  # so that the same cycle is reported once
            place = layers[cycle[first]].places["extends"]
            problems.append(f"{place}: extends: a cycle: {' -> '.join([*cycle[first:], *cycle[: first + 1]])}")
            return names, False
        if not isinstance(above, str) or layers.get(above) is None:
            return names, False
        names.append(above)
        above = layers[above].get("extends")
    return names, True


def _merged(chain: list[Settings]) -> tuple[dict, dict[str, str]]:
    """The merged settings of a chain of layers, and the place of each: mappings key by key, other values whole."""
    values: dict = {}
    places: dict[str, str] = {}
    for layer in chain:
        _overlay(values, layer, Experiment)
        lists = {key.partition("[")[0] for key in layer.places if "[" in key}  # a list replaces an inherited one whole
        inherited = {key: line for key, line in places.items() if "[" not in key or key.partition("[")[0] not in lists}
        places = inherited | layer.places
    for key in ("extends", "question", "paper", "claims"):  # not inherited
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
            values[key] = copied(value)


def put(values: dict, key: str, value) -> None:
    """Set a dotted key of an experiment's settings, as a child experiment would."""
    for part in reversed(key.split(".")):
        value = {part: value}
    _overlay(values, value, Experiment)


def copied(value):
    """A copy of nested mappings; lists and scalars are shared, as nothing changes them."""
    return {key: copied(item) for key, item in value.items()} if isinstance(value, dict) else value
