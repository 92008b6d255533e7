"""Defaults that follow from other sections: seeds, tokenizer, longest row, hand-written functions and their code."""

import re
from collections.abc import Iterator

from posttrain.config.sections import Base, Optimisation, Prepare, Section, Tokenizer, declared
from posttrain.config.settings import one_of
from posttrain.config.stages import STAGES, Experiment
from posttrain.ground.errors import UserError
from posttrain.ground.syntax import fingerprint, function_file

GOLD_OF_WORLD = "posttrain.world.gold:gold_reward"
FUNCTIONS = {"reward_function": "reward_code", "gold_function": "gold_code"}  # key -> key of the file's fingerprint

CALLERS = [  # stage, key of a function that it calls, stages to which the function is passed on
    (name, key, declared(stage.section.model_fields[key]).get("also", ()))
    for name, stage in STAGES.items()
    for key in FUNCTIONS
    if key in stage.section.model_fields
]


def longest_row(experiment: Experiment) -> int:
    """`prepare.max_tokens`, or its default, in tokens."""
    scratch = experiment.base.scratch
    return experiment.prepare.max_tokens or (scratch.context if scratch else 512)


def resolve(experiment: Experiment) -> Experiment:
    """The experiment with the defaults filled in that follow from other sections."""
    base, prepare, seeded = experiment.base, experiment.prepare, []
    tokenizer = prepare.tokenizer or Tokenizer(path=base.path, hub=base.hub, vocab_size=1024 if base.scratch else None)
    update: dict[str, Section] = {
        "prepare": prepare.model_copy(update={"max_tokens": longest_row(experiment), "tokenizer": tokenizer})
    }
    if base.scratch and base.scratch.seed is None:
        update["base"] = base.model_copy(update={"scratch": base.scratch.model_copy(update={"seed": experiment.seed})})
        seeded.append("base")
    for stage in STAGES:
        section = getattr(experiment, stage)
        if isinstance(section, Optimisation):
            seeded += [stage] if section.seed is None else []
            update[stage] = _trained(section, experiment)
    for stage, filled in _functions(experiment).items():
        update[stage] = update.get(stage, getattr(experiment, stage)).model_copy(update=filled)
    resolved = experiment.model_copy(update=update)
    resolved._seeded = frozenset(seeded)
    return resolved


def _trained(section: Optimisation, experiment: Experiment) -> Section:
    """The section of a stage that trains, with its seed and its longest row."""
    update = {"seed": experiment.seed if section.seed is None else section.seed}
    if "max_length" in type(section).model_fields:
        update["max_length"] = getattr(section, "max_length") or longest_row(experiment)  # noqa: B009  # in some only
    return section.model_copy(update=update)


def _functions(experiment: Experiment) -> dict[str, dict[str, str | None]]:
    """Stage -> its keys for hand-written functions and the fingerprints of their files.

    A stage's function is passed on to the stages that its field names (`also`). The default gold function is the
    built-in world's, where the experiment has the world.
    """
    filled: dict[str, dict[str, str | None]] = {}
    for stage, key, also in CALLERS:
        if (section := getattr(experiment, stage)) is None:
            continue
        default = GOLD_OF_WORLD if key == "gold_function" and experiment.prepare.world else None
        if named := getattr(section, key) or default:
            for other in (stage, *also):
                filled.setdefault(other, {}).update({key: named, FUNCTIONS[key]: function_code(named)})
    return filled


def function_code(named: str) -> str | None:
    """Fingerprint of the file of a function named in the config; None where the name is wrong."""
    return None if list(function_mistakes("", named)) else fingerprint(function_file(named))


def function_mistakes(where: str, named: str) -> Iterator[tuple[str, str]]:
    """Mistakes in the name of a function, which should be `file.py:function` or `package.module:function`."""
    place, _, function = named.rpartition(":")
    if not place or not function.isidentifier():
        yield where, f"found {named!r}, allowed: file.py:function or package.module:function"
        return
    file = function_file(named)
    if not file.is_file():
        yield where, f"there is no module {place!r}"
    elif not re.search(rf"^def {re.escape(function)}\(", file.read_text(encoding="utf-8", errors="replace"), re.M):
        yield where, f"{file} defines no function {function!r}"
    else:
        try:
            fingerprint(file)
        except UserError as error:
            yield where, str(error)


def unresolved(stage: str, section: Section) -> Iterator[tuple[str, str]]:
    """The keys that the workflow fills in and a hand-written section lacks."""
    where = stage
    if isinstance(section, Base):
        yield from one_of(stage, section, "path", "hub", "scratch")
        if section.scratch is None:
            return
        where, section = f"{stage}.scratch", section.scratch
    keys = ["seed", "max_length"] if isinstance(section, Optimisation) else []
    keys += ["tokenizer", "max_tokens"] if isinstance(section, Prepare) else []
    for key in keys:
        if key in type(section).model_fields and getattr(section, key) is None:
            yield f"{where}.{key}", "missing; the workflow writes it"
