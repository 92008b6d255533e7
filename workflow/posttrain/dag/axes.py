"""The axes of an experiment's grid: mistakes in them, before any cell is made."""

import math
from collections.abc import Iterator

from posttrain.config import grid
from posttrain.config.mistakes import checked, place_of
from posttrain.config.stages import Experiment
from posttrain.dag.layers import Faults, Merged, copied, put

MOST = 2000  # cells in a campaign: each takes about 20 KB, and 2 ms whenever the plan is made


def axes(merged: Merged, faults: Faults, problems: list) -> dict[str, list]:
    """The axes of an experiment's grid; empty where they have mistakes, which are added to `problems` and `faults`."""
    wanted = merged.values.get("grid") or {}
    is_grid = isinstance(wanted, dict) and all(isinstance(axis, list) and axis for axis in wanted.values())
    if not is_grid or not merged.whole:
        return {}  # validation reports it
    mistakes = dict(grid.mistakes(merged.name, wanted))
    for key, values in wanted.items():
        if key.partition(".")[0] in ("grid", "extends", "question", "paper", "claims"):
            mistakes[key] = "cannot be an axis"
        elif number(wanted) <= MOST and key not in mistakes:
            mistakes |= _wrong_values(merged, key, values)
    wrong = {f"grid.{key}": text for key, text in mistakes.items()} or dict(_set_twice(merged, wanted))
    new = [(key, text) for key, text in wrong.items() if (key, text) not in faults.mistakes]
    problems += [f"{place_of(merged.places, key)}: {key}: {text}" for key, text in new]
    faults.mistakes.update(new)
    return {} if wrong else wanted


def number(wanted: dict[str, list]) -> int:
    """The number of a grid's cells; 0 for no axes."""
    return math.prod(map(len, wanted.values())) if wanted else 0


def refuse_many(merged: Merged, cells: int, all_cells: int, faults: Faults, problems: list) -> None:
    """Add a line on a grid with which the campaign has more cells than MOST to `problems`."""
    together = "" if all_cells == cells else f", {all_cells} with the campaign's others"
    text = f"makes {cells} cells{together}; at most {MOST} in a campaign"
    if not any(key == "grid" for key, _ in faults.mistakes):  # an ancestor's grid, which is inherited, has too many
        problems.append(f"{place_of(merged.places, 'grid')}: grid: {text}")
    faults.mistakes.add(("grid", text))


def _wrong_values(merged: Merged, key: str, values: list) -> dict[str, str]:
    """Axis, or its value by number -> what is wrong: an unknown key, or a value that the key cannot have."""
    mistakes: dict[str, str] = {}
    for item, value in enumerate(values):
        settings = copied(merged.values)
        put(settings, key, value)
        for name, text in checked(Experiment, settings)[1].items():
            if f"{key}.".startswith(f"{name}.") and (name != key or text.startswith("unknown key")):
                mistakes[key] = text if name == key else f"{name}: {text}"
            elif name == key or name.startswith((f"{key}.", f"{key}[")):
                mistakes[f"{key}[{item}]"] = text
    return mistakes


def _set_twice(merged: Merged, wanted: dict[str, list]) -> Iterator[tuple[str, str]]:
    """Axes whose key the experiment's own file sets too, to a value or by leaving out its section."""
    own = merged.own
    for key in wanted:
        place = place_of(merged.places, f"grid.{key}")
        section = key.partition(".")[0]
        if key in own.places or (section in own and own[section] is None):
            beside = key if key in own.places else section
            yield beside, f"is an axis of the grid ({place}); leave one of them out, or set grid: {{{key}: [...]}}"
