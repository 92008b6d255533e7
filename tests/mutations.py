"""Single mistakes in valid campaigns, chosen from a seed.

Whether a value is allowed is decided by the JSON schema that `posttrain schema` generates, not by the code under test.
"""

import copy
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jsonschema
import yaml
from valid_campaigns import SITUATIONS

from posttrain.cluster import sites
from posttrain.config.sections import Campaign
from posttrain.config.stages import Experiment

OVERRIDES = "--config"  # stands for Snakemake's option of this name, beside the names of files
SITE = "site.yaml"
CHILDREN = ("experiments/two.yaml", "experiments/small.yaml")  # of which none inherits


class Mistake(NamedTuple):
    """One mistake in the files of a campaign."""

    kind: str
    files: dict[str, str | bytes]  # with the mistake; `OVERRIDES` holds settings
    key: str  # dotted; "" for one of the whole file
    file: str
    line: int  # 0: in any line
    forbidden: bool = True  # False: it may also be accepted
    several: bool = False  # whether it may break several rules


def dumped(settings: dict) -> str:
    """Settings as YAML, each key in a line of its own."""
    return yaml.dump(settings, Dumper=yaml.CSafeDumper, sort_keys=False, default_flow_style=False, width=10**6)


def lines(text: str) -> dict[str, int]:
    """The line of every dotted key of a YAML text."""
    places: dict[str, int] = {}

    def walk(node, key: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for name, child in node.value:
                dotted = f"{key}.{name.value}" if key else name.value
                places.setdefault(dotted, name.start_mark.line + 1)
                walk(child, dotted)
        elif isinstance(node, yaml.SequenceNode):
            for number, child in enumerate(node.value):
                places[f"{key}[{number}]"] = child.start_mark.line + 1
                walk(child, f"{key}[{number}]")

    walk(yaml.compose(text, Loader=yaml.CSafeLoader), "")
    return places


Part = tuple[dict | list, str | int, str]  # the holder of a key, the key, and its dotted name


def parts(holder: dict | list, prefix: str = "") -> Iterator[Part]:
    """Every key and every item of settings, at all depths."""
    for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        dotted = f"{prefix}[{key}]" if isinstance(key, int) else f"{prefix}.{key}".lstrip(".")
        yield holder, key, dotted
        if isinstance(value, dict | list):
            yield from parts(value, dotted)


SCHEMAS = {"config.yaml": Campaign, OVERRIDES: Campaign, SITE: sites.Site}


def schema_of(file: str) -> dict:
    """The JSON schema of a file's settings. No key is required in an experiment, which may inherit it."""
    schema = SCHEMAS.get(file, Experiment).model_json_schema()
    if file not in SCHEMAS:
        schema.pop("required", None)
    return schema


VALIDATORS = {name: jsonschema.Draft202012Validator(schema_of(name)) for name in (*SCHEMAS, "experiment")}


def is_forbidden(file: str, settings: dict) -> bool:
    """Whether the reference forbids a file's settings: unknown keys, types, bounds, words. Python's true is 1 and its
    1.0 is a whole number, which they are not here."""
    validator = VALIDATORS.get(file, VALIDATORS["experiment"])
    return not validator.is_valid(settings)


class Fuzzer:
    """Makes single mistakes in the situations."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def mistake(self, kind: str | None = None) -> Mistake:
        """A mistake of a kind, or of any."""
        while True:
            name = kind or self.random.choice(sorted(KINDS))
            situation = copy.deepcopy(self.random.choice(SITUATIONS))
            if (made := KINDS[name](self, situation)) is not None:
                return made._replace(kind=name)

    def file(self, situation: dict, experiments: bool = False) -> str:
        """One of the files; experiments: an experiment's."""
        return self.random.choice([name for name in situation if not experiments or "/" in name])

    def part(self, situation: dict, wanted: Callable[[Part], bool] = lambda part: True) -> tuple[str, Part] | None:
        """A key or an item of one of the files."""
        file = self.file(situation)
        found = [part for part in parts(situation[file]) if wanted(part)]
        return (file, self.random.choice(found)) if found else None

    def said(self, situation: dict, file: str, key: str, **more) -> Mistake:
        """The mistake of a situation whose settings hold it."""
        forbidden = is_forbidden(file, situation[file])
        files = {name: dumped(settings) for name, settings in situation.items()}
        line = lines(files[file]).get(key, 0)
        return Mistake("", files, key, file, line, **({"forbidden": forbidden, "several": not forbidden} | more))


def is_key(part: Part) -> bool:
    """Whether a part is a key of a section, not an item of a list, and no name of the user's own."""
    return isinstance(part[1], str) and not part[2].startswith(("grid.", "stages."))


VALUES = [True, False, 5, 0, -1, 1.5, "word", "", "5", "1.5", "true", [1], [], ["a", "b"], {"a": 1}, {}, [[1]], None]


def wrong_type(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """Another value in place of one."""
    file, (holder, key, dotted) = fuzzer.part(situation, lambda part: part[0][part[1]] is not None)
    holder[key] = fuzzer.random.choice([value for value in VALUES if type(value) is not type(holder[key])])
    return fuzzer.said(situation, file, dotted)


NUMBERS = [0, -1, 1, 2**31, 10**30, 10**39, 1e308, 1e-300, -0.5, 1.0, 1.0000001, 99.9]


def out_of_range(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """Another number in place of one."""

    def is_number(part: Part) -> bool:
        return type(part[0][part[1]]) in (int, float)

    if (chosen := fuzzer.part(situation, is_number)) is None:
        return None
    file, (holder, key, dotted) = chosen
    numbers = [number for number in NUMBERS if type(number) is type(holder[key])]
    holder[key] = fuzzer.random.choice(numbers)
    return fuzzer.said(situation, file, dotted)


def renamed(holder: dict, key: str, other: str) -> None:
    """Give a key another name, at its place."""
    items = [(other if name == key else name, value) for name, value in holder.items()]
    holder.clear()
    holder.update(items)


def misspelled_key(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A letter of a key lost, doubled, exchanged, or in another case."""
    file, (holder, key, dotted) = fuzzer.part(situation, is_key)
    at = fuzzer.random.randrange(len(key))
    before, letter, after = key[:at], key[at], key[at + 1 :]
    exchanged = before + after[:1] + letter + after[1:]
    spellings = [before + after, before + 2 * letter + after, exchanged, key.upper(), key.capitalize(), key + "s"]
    other = fuzzer.random.choice([*spellings, key.replace("_", "-")])
    if other in holder or not other or other == "null":
        return None
    renamed(holder, key, other)
    return fuzzer.said(situation, file, dotted.removesuffix(key) + other)


def unknown_key(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A key that nothing has, beside others."""
    file, (holder, key, dotted) = fuzzer.part(situation, is_key)
    others = ["zebra", "lr", "Learning Rate", "0", "é", "x.y", "__class__", "model_config", "task_"]
    other = fuzzer.random.choice(others)
    holder[other] = fuzzer.random.choice(VALUES)
    return fuzzer.said(situation, file, dotted.removesuffix(key) + other)


def missing_brackets(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """The first item of a list in place of the list."""
    if (chosen := fuzzer.part(situation, lambda part: isinstance(part[0][part[1]], list))) is None:
        return None
    file, (holder, key, dotted) = chosen
    holder[key] = holder[key][0]
    return fuzzer.said(situation, file, dotted)


def added_brackets(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A list of a value in place of the value."""
    file, (holder, key, dotted) = fuzzer.part(situation, lambda part: not isinstance(part[0][part[1]], list))
    holder[key] = [holder[key]]
    return fuzzer.said(situation, file, dotted)


def removed_key(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A key less. It may break a rule of several stages, as without `sft`."""
    file, (holder, key, _) = fuzzer.part(situation)
    del holder[key]
    return fuzzer.said(situation, file, "", several=True)


def look_alike(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """What YAML 1.1 reads otherwise: words for true, octal and other numbers, times and dates."""
    words = "on off yes no y On 0x10 0o7 0b1 010 1_000 12:30 2024-01-01 +5 .5 5. 1e3 1e400 .inf .nan ~ '5' 'true'"
    scalar = fuzzer.part(situation, lambda part: not isinstance(part[0][part[1]], dict | list))
    file, (holder, key, dotted) = scalar
    word = fuzzer.random.choice(words.split())
    holder[key] = "PLACEHOLDER"
    text = dumped(situation[file])
    numbers = {"5.": 5.0, ".5": 0.5, "+5": 5, "1e3": 1e3, "1e400": float("inf"), "~": None}
    holder[key] = numbers.get(word, word.strip("'"))
    mistake = fuzzer.said(situation, file, dotted)
    forbidden = mistake.forbidden or word == "1e400"
    return mistake._replace(files=mistake.files | {file: text.replace("PLACEHOLDER", word)}, forbidden=forbidden)


def key_twice(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A line with a key and its value, twice."""
    chosen = fuzzer.part(situation, lambda part: is_key(part) and not isinstance(part[0][part[1]], dict | list))
    if chosen is None:
        return None
    file, (_, _, dotted) = chosen
    mistake = fuzzer.said(situation, file, dotted, forbidden=True, several=False)
    written = mistake.files[file].splitlines()
    line = lines(mistake.files[file])[dotted]
    again = re.sub(r"^( *)- ", r"\1  ", written[line - 1])  # in the same item of a list
    text = "\n".join([*written[:line], again, *written[line:]]) + "\n"
    return mistake._replace(files=mistake.files | {file: text}, line=line + 1)


def without_effect(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A key that the reference marks `Only with` another value of another key."""
    file = fuzzer.file(situation, experiments=True)
    if "extends" in situation[file]:
        return None
    for stage, section in [("sft", "Sft"), ("longctx", "Longctx"), ("base.scratch", "Scratch")]:
        fields = VALIDATORS["experiment"].schema["$defs"][section]["properties"]
        conditions = {key: field["only_with"] for key, field in fields.items() if "only_with" in field}
        holder = situation[file]
        for word in stage.split("."):
            holder = (holder or {}).get(word)
        if not holder:
            continue
        wrong = [
            key for key, only in conditions.items()
            if key not in holder and any(holder.get(other, fields[other]["default"]) not in allowed
                                         for other, allowed in only.items())
        ]  # fmt: skip
        if wrong:
            key = fuzzer.random.choice(wrong)
            values = {"target_modules": "all-linear", "compute": "float32", "optimizer": "adamw"}
            holder[key] = values.get(key, fields[key].get("default"))
            return fuzzer.said(situation, file, f"{stage}.{key}", forbidden=True, several=False)
    return None


def bad_path(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A path without its file, or with what is no file."""
    names = ("path", "reward_function", "chat_template", "tokenizer")
    chosen = fuzzer.part(situation, lambda part: part[1] in names and isinstance(part[0][part[1]], str))
    if chosen is None:
        return None
    file, (holder, key, dotted) = chosen
    paths = ["gone", "", "/dev", "a\0b", "/dev/null", "/dev/zero", "folder", "x" * 5000, "{x}", "gone.py:f", "a\nb"]
    holder[key] = fuzzer.random.choice([*paths, "sft.jsonl/x"])
    return fuzzer.said(situation, file, dotted, forbidden=True, several=False)


def extends(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A parent that is not there, or an experiment that is its own ancestor."""
    file = fuzzer.file(situation, experiments=True)
    own = Path(file).stem
    others = [Path(name).stem for name in situation if "/" in name]
    values = ["gone", own, others[-1], "../one", "One", "", [own], 5, "report", {"a": 1}, f"{own}.yaml"]
    value = fuzzer.random.choice(values)
    if value in others and value != own and situation[f"experiments/{value}.yaml"].get("extends") != own:
        return None
    situation[file]["extends"] = value
    return fuzzer.said(situation, file, "extends", forbidden=True, several=False)._replace(
        line=0 if value in others else lines(dumped(situation[file]))["extends"]
    )


def grid(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """An axis with an unknown key, without values, with a wrong value, or beside its own key."""
    file = fuzzer.file(situation)
    if file == SITE:
        return None
    axis, values = fuzzer.random.choice(
        [("sft.zebra", [1, 2]), ("zebra", [1]), ("sft.steps", ["many"]), ("sft.steps", [10, -1]), ("sft.steps", 5),
         ("sft.steps", []), ("sft.steps", [10, 10]), ("seed", [1, 1.5]), ("sft", [{"steps": 5}]), ("extends", ["one"]),
         ("Seed", [1]), ("base.zebra.layers", [1]), ("", [1]), ("sft.", [1]), (".", [1]), ("sft.steps.x", [1]),
         ("sft.steps", {"a": 1}), ("seed", [0, True]), ("sft.batch_size", [10**30]), ("sft.method", ["qlroa"])]
    )  # fmt: skip
    situation[file]["grid"] = {axis: values}
    section, _, key = axis.partition(".")
    inside = [settings.get(section) for name, settings in situation.items() if "/" in name]
    beside = any(part is not None and (not key or (isinstance(part, dict) and key in part)) for part in inside)
    return fuzzer.said(situation, file, f"grid.{axis}", forbidden=True, several=False) if not beside else None


def beside_axis(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A key that is an axis of the same file's grid."""
    file = fuzzer.file(situation, experiments=True)
    axis, value = fuzzer.random.choice([("seed", 5), ("sft.rank", 2)])
    situation[file]["grid"] = {axis: [1, 2]}
    holder = situation[file]
    *sections, key = axis.split(".")
    for section in sections:
        holder = holder.setdefault(section, {})
    if situation["config.yaml"].get("grid") or (key == "rank" and holder.get("method") in ("full", "prefix")):
        return None
    holder[key] = value
    return fuzzer.said(situation, file, axis, forbidden=True, several=False)


def too_many_cells(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A grid with so many cells that making them takes minutes."""
    file = fuzzer.file(situation, experiments=True)
    keys = ["sft.steps", "sft.batch_size", "sft.log_steps", "sft.checkpoint_minutes", "evaluate.limit", "prepare.seed"]
    for key in keys:
        section, _, name = key.partition(".")
        (situation[file].get(section) or {}).pop(name, None)
    situation[file]["grid"] = {key: list(range(100, 140)) for key in keys}
    return fuzzer.said(situation, file, "grid", forbidden=True, several=False)


def override(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A wrong setting in Snakemake's `--config`."""
    key, value = fuzzer.random.choice(
        [("strict", "yes"), ("strict", 1), ("keep_gb", "5"), ("keep_gb", -1), ("titel", "x"), ("experiments", "one"),
         ("experiments", ["gone"]), ("experiments", []), ("wandb", "offline"), ("wandb", {"mode": "on"}),
         ("wandb", {"mod": "offline"}), ("grid", {"seed": [0, "1"]}), ("grid", {"seed": 5}), ("grid", [1]),
         ("grid", {"zebra": [1]}), ("title", 5), ("Strict", True)]
    )  # fmt: skip
    situation["config.yaml"].pop("grid", None)
    files = {name: dumped(settings) for name, settings in situation.items()}
    deeper = {"mode": "wandb.mode", "mod": "wandb.mod", "seed": "grid.seed", "zebra": "grid.zebra"}
    dotted = next((deeper[name] for name in value if name in deeper), key) if isinstance(value, dict) else key
    return Mistake("", files | {OVERRIDES: {key: value}}, dotted, OVERRIDES, 0)


def text(fuzzer: Fuzzer, situation: dict) -> Mistake | None:
    """A file that is no longer YAML, or not text."""
    file = fuzzer.file(situation)
    whole = dumped(situation[file])
    at = fuzzer.random.randrange(len(whole))
    before, after = whole[:at], whole[at:]
    inserted = ["\t", "[", "}", "%", "&", '"', "\x07", "\u2028"]
    added = ["x: &a 1\n", "x: *a\n", "x: !!python/none 1\n", "? [a]\n: 1\n", f"a: {'[' * 3000}\n", "---\na: 1\n"]
    made = fuzzer.random.choice([
        *(before + character + after for character in inserted), *(whole + more for more in [*added, "<<: {a: 1}\n"]),
        before.encode() + b"\xff" + after.encode(), whole.encode("utf-16"), before, whole.replace(":", "", 1),
        whole.replace(": ", ":", 1), "", "- a\n" + whole, whole.replace("\n", "\r\n") + "a: 1\r\n", "\ufeff" + whole,
    ])  # fmt: skip
    files = {name: dumped(settings) for name, settings in situation.items()} | {file: made}
    return Mistake("", files, "", file, 0, forbidden=False, several=True)


KINDS = {function.__name__: function for function in (
    wrong_type, out_of_range, misspelled_key, unknown_key, missing_brackets, added_brackets, removed_key, look_alike,
    key_twice, without_effect, bad_path, extends, grid, beside_axis, too_many_cells, override, text,
)}  # fmt: skip
