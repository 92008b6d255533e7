"""What an experiment's settings are after its parents' and the campaign's: later layers over earlier ones."""

from posttrain.config.experiment import Experiment
from posttrain.config.reader import Settings
from posttrain.config.sections import Section, conditional
from posttrain.config.validation import model_at


def ancestry(name: str, layers: dict, problems: list) -> list[Settings] | None:
    """The layers from the oldest ancestor to the experiment; None when one is missing or there is a cycle."""
    chain, names = [], []
    while name is not None:
        if name in names:
            place = layers[name].places["extends"]
            cycle = names[names.index(name) :]
            first = cycle.index(min(cycle))  # reported the same from whichever experiment it is entered
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


def merged(chain: list[Settings]) -> tuple[dict, dict[str, str]]:
    """The settings of a chain of layers and where each stands: mappings key by key, everything else whole."""
    values: dict = {}
    places: dict[str, str] = {}
    for layer in chain:
        overlay(values, layer, Experiment)
        lists = {key.partition("[")[0] for key in layer.places if "[" in key}  # an inherited list goes as a whole
        kept = {key: line for key, line in places.items() if "[" not in key or key.partition("[")[0] not in lists}
        places = kept | layer.places
    for key in ("extends", "question"):  # an experiment's own, never its parent's
        values.pop(key, None)
        if key in chain[-1]:
            values[key] = chain[-1][key]
    return values, places


def overlay(values: dict, layer: dict, model: type[Section] | None) -> None:
    """Put a layer over `values`, settings of `model`. A key that has no effect under the layer's own choice is not
    inherited: `method: prefix` in a child drops the parent's `rank`."""
    for key, conditions in conditional(model).items() if model else ():
        for other, allowed in conditions.items():
            if other in layer and layer[other] not in allowed:
                values.pop(key, None)
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            overlay(values[key], value, model_at(model, key))
        else:
            values[key] = copied(value)


def put(values: dict, key: str, value) -> None:
    """Set a dotted key of an experiment's settings, as a child's own key would."""
    for part in reversed(key.split(".")):
        value = {part: value}
    overlay(values, value, Experiment)


def copied(value):
    """A copy of nested mappings; lists and scalars are shared, since nothing changes them."""
    return {key: copied(item) for key, item in value.items()} if isinstance(value, dict) else value
