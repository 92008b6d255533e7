"""Read a campaign's YAML files into a plan of validated experiments. Imports no torch.

posttrain check config/config.yaml
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.config import grid
from posttrain.config.mistakes import checked, place_of, valid_part, validated
from posttrain.config.sections import Campaign, Longctx, Optimisation, Section, Sft, Tokenizer, trains_on_whole
from posttrain.config.settings import OPTION, Settings, read_settings
from posttrain.config.stages import ALIGNED, STAGES, Experiment
from posttrain.dag import axes, claims, functions
from posttrain.dag.checks import FOUNDATIONS, RULES, UNUSED
from posttrain.dag.layers import Faults, Merged, copied, oldest_first, put, read_layers
from posttrain.dag.plan import Plan
from posttrain.dag.rules import ANYWHERE, Broken, broken, is_unreadable
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
    names, verified = (_names(values.get(key)) for key in ("experiments", "verify"))
    if len({*names, *verified}) < len(names + verified):
        key = "experiments" if len(set(names)) < len(names) else "verify"
        problems.append(f"{values.places[key]}: {key}: names an experiment twice")
    layers = read_layers(names, verified, values.places, path.parent / "experiments", problems)
    grid_places = {key: line for key, line in values.places.items() if f"{key}.".startswith("grid.")}
    root = Settings({"grid": values.get("grid")}, {"": str(path)} | grid_places)
    experiments = _experiments(layers, root, problems)
    if campaign is None or problems:
        raise UserError(*dict.fromkeys(problems))
    relative = os.path.relpath(path)  # Snakemake makes it absolute; another clone has it elsewhere
    configfile = str(path) if relative.startswith("..") else relative
    plan = Plan(campaign, experiments, "" if configfile == DEFAULT else configfile)
    if wrong := [*claims.mistakes(plan)]:
        places = {name: layer.places for name, layer in layers.items() if layer is not None}
        raise UserError(*(f"{place_of(places[name], key)}: {key}: {text}" for name, key, text in wrong))
    plan.claimed = claims.needs(plan)
    return plan


def _names(listed) -> list[str]:
    """The texts of a list; validation reports everything else."""
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def _overridden(values: Settings, overrides: dict) -> Settings:
    """A campaign's settings, with those of Snakemake's `--config` in place of the file's."""
    for key, value in overrides.items():
        sections = isinstance(value, dict) and isinstance(values.get(key), dict)
        kept = {place: line for place, line in values.places.items() if sections or not _is_below(place, key)}
        values.places = kept | _places(value, key)
        values[key] = values[key] | value if sections else value
    return values


def _is_below(key: str, other: str) -> bool:
    """Whether a dotted key is another one or below it."""
    return re.split(r"[.\[]", key)[0] == other


def _places(value, key: str) -> dict[str, str]:
    """The place of an overridden key and of every key below it."""
    places = {key: OPTION}
    for name, item in value.items() if isinstance(value, dict) else ():
        places |= _places(item, f"{key}.{name}")
    return places


def _experiments(layers: dict[str, Settings | None], root: Settings, problems: list) -> dict[str, Experiment]:
    """The experiments and the cells of their grids, by name.

    root: the settings that every experiment starts from: the campaign's grid.
    """
    experiments: dict[str, dict[str, Experiment | None]] = {name: {} for name in layers}
    faults: dict[str, Faults] = {}
    cells = 0
    for merged in oldest_first(layers, root, problems):
        above = [faults[name] for name in merged.ancestors if name in faults]
        faults[merged.name] = Faults(
            {mistake for other in above for mistake in other.mistakes},
            {key for other in above for key in other.unreadable},
        )
        wanted = axes.axes(merged, faults[merged.name], problems)
        cells += (more := axes.number(wanted))
        if cells > axes.MOST:
            axes.refuse_many(merged, more, cells, faults[merged.name], problems)
            cells, wanted = cells - more, {}
        experiment = _resolved(merged, faults[merged.name], problems)
        experiments[merged.name][merged.name] = experiment
        if wanted and experiment:
            experiments[merged.name] |= _cells(merged, wanted, faults[merged.name], problems)
    return {name: experiment for group in experiments.values() for name, experiment in group.items() if experiment}


def _cells(merged: Merged, wanted: dict[str, list], faults: Faults, problems: list) -> dict[str, Experiment | None]:
    """The cells of an experiment's grid, by name. A section that no axis changes is validated once for all cells."""
    experiment = Experiment.model_validate(merged.values)
    unchanged = merged.values.keys() - {key.partition(".")[0] for key in wanted}
    shared = {key: part for key, part in experiment if isinstance(part, Section) and key in unchanged}
    labels, cells = grid.labels(list(wanted)), {}
    for cell in grid.cells(wanted):
        own = {key: value for key, value in merged.values.items() if key not in shared and key != "claims"}
        settings = copied(own) | shared
        for key, value in cell.items():
            put(settings, key, value)
        cells[grid.cell_name(merged.name, cell, labels)] = _resolved(
            merged._replace(values=settings), faults, problems, tuple(wanted)
        )
    return cells


def _resolved(merged: Merged, faults: Faults, problems: list, cell: tuple[str, ...] = ()) -> Experiment | None:
    """The experiment with its defaults filled in, or None after adding every mistake in it to `problems`.

    faults: those of the experiment and its ancestors, to which these are added. cell: the axes, where the settings are
    those of a grid's cell.
    """
    before = len(problems)
    experiment, is_valid = _checked(merged, faults, problems)
    for rule in _broken(experiment, merged, faults, cell) if experiment else ():
        if (rule.key, rule.text) not in faults.mistakes:
            faults.mistakes.add((rule.key, rule.text))
            problems.append(_line_of(rule, merged, cell))
    return resolve(experiment) if experiment and is_valid and len(problems) == before else None


def _checked(merged: Merged, faults: Faults, problems: list) -> tuple[Experiment | None, bool]:
    """(the experiment without its wrong keys, whether it has none); None where what it inherits is not known."""
    inherited = faults.unreadable.copy()
    experiment, mistakes = checked(Experiment, merged.values)
    if mistakes:
        experiment, unreadable = valid_part(Experiment, merged.values, mistakes)
        unknown = (key for key, text in mistakes.items() if text.startswith("unknown key"))
        faults.unreadable |= unreadable | {ANYWHERE + key.rpartition(".")[2] for key in unknown}  # it may be misplaced
    whole = merged.whole and "extends" not in faults.unreadable
    for key, text in mistakes.items():
        is_certain = (key, text) not in faults.mistakes and whole and not is_unreadable(key, inherited)
        if text != "missing" or is_certain:
            problems.append(f"{place_of(merged.places, key)}: {key}: {text}")
            faults.mistakes.add((key, text))
    return experiment if whole else None, not mistakes


def _broken(experiment: Experiment, merged: Merged, faults: Faults, cell: tuple[str, ...]) -> Iterator[Broken]:
    """The rules that an experiment breaks. That a setting has no effect is one for its own file's settings, not for
    inherited ones; nor is it one for a cell whose axis makes it so."""
    foundations = [*broken(FOUNDATIONS, experiment, faults.unreadable)]
    yield from foundations
    yield from broken(RULES, experiment, faults.unreadable | {rule.key for rule in foundations})
    chosen = merged.own.places.keys() | cell
    for rule in broken(UNUSED, experiment, faults.unreadable):
        if rule.key in chosen and not {*cell} & {*rule.read}:
            yield rule


def _line_of(rule: Broken, merged: Merged, cell: tuple[str, ...]) -> str:
    """The line about a rule that an experiment breaks. In a cell the cause is an axis, and in a child what its own file
    sets: the last of these that the rule read is named first."""
    key, places, own = rule.key, merged.places, merged.own.places
    if key in cell:
        return f"{place_of(places, f'grid.{key}')}: grid.{key}: {rule.text}"
    near = place_of(places, key)
    causes = [f"grid.{read}" for read in reversed(rule.read) if read in cell]
    if not causes and near not in own.values():
        causes = [read for read in reversed(rule.read) if read in own]
    if causes:
        return f"{place_of(places, causes[0])}: {causes[0]}: with this, {key}: {rule.text} ({near})"
    return f"{near}: {key}: {rule.text}"


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
    named = functions.named_in(experiment)
    whole: list[tuple[str, dict]] = [(name, {"method": "full"}) for name in on_whole(experiment)]
    scored = [("compare", experiment.grpo.for_compare)] if experiment.grpo else []
    for stage, filled in [*named.items(), *whole, *scored]:
        update[stage] = update.get(stage, getattr(experiment, stage)).model_copy(update=filled)
    resolved = experiment.model_copy(update=update)
    resolved._seeded = frozenset(seeded)
    return resolved


def on_whole(experiment: Experiment) -> list[str]:
    """The stages that compute with the SFT policy's whole weights, unquantised, since policies are trained on them."""
    sft = experiment.sft
    trained = {name for name in ALIGNED if trains_on_whole(sft, getattr(experiment, name))}
    readers = {name for name, stage in STAGES.items() if "reference" in stage.reads}
    return ["reference"] * bool(trained & readers) + ["compare"] * bool(trained)


def _trained(section: Optimisation, experiment: Experiment) -> Section:
    """The section of a stage that trains, with its seed, its longest row, and the arithmetic on weights in NF4; that on
    a given model without `base.dtype` follows when the model is here."""
    update: dict[str, Any] = {"seed": experiment.seed if section.seed is None else section.seed}
    base = experiment.base
    if isinstance(section, Sft) and section.method == "qlora":
        update["compute"] = section.compute or base.dtype or ("float32" if base.scratch else None)
    if "max_length" in type(section).model_fields:
        update["max_length"] = getattr(section, "max_length") or experiment.longest_row  # noqa: B009  # in some only
    if isinstance(section, Longctx) and section.tuning == "full":
        update["optimizer"] = section.optimizer or "adamw"
    return section.model_copy(update=update)
