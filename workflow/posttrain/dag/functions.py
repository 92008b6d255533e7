"""The hand-written functions that a config names: the fingerprints of their files, and mistakes in their names."""

import re
from collections.abc import Iterator

from posttrain.config.sections import Section, declared
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


def named_in(experiment: Experiment) -> dict[str, dict[str, str | None]]:
    """Stage -> its keys for hand-written functions and the fingerprints of their files; None where a name is wrong.

    A stage's function is passed on to the stages that its field names (`also`). The default gold function is the
    built-in world's, where the experiment has the world.
    """
    filled: dict[str, dict[str, str | None]] = {}
    for stage, key, also in CALLERS:
        if (section := getattr(experiment, stage)) is None:
            continue
        default = GOLD_OF_WORLD if key == "gold_function" and experiment.prepare.world else None
        if named := getattr(section, key) or default:
            code = None if list(_mistakes_of("", named)) else fingerprint(function_file(named))
            for other in (stage, *also):
                filled.setdefault(other, {}).update({key: named, FUNCTIONS[key]: code})
    return filled


def mistakes(where: str, section: Section) -> Iterator[tuple[str, str]]:
    """Mistakes in a section: its functions must exist; keys that the workflow fills in must be left out."""
    written = [code for key, code in FUNCTIONS.items() if code in section.__class__.model_fields]
    written += [key for _, key, passed_on_to in CALLERS if where in passed_on_to]
    for key in written:
        if key in section.model_fields_set:
            yield f"{where}.{key}", "is written by the workflow; leave it out"
    for key in FUNCTIONS.keys() - set(written):
        if named := getattr(section, key, None):
            yield from _mistakes_of(f"{where}.{key}", named)


def _mistakes_of(where: str, named: str) -> Iterator[tuple[str, str]]:
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
