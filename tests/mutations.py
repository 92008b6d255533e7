"""Single mistakes in valid campaigns, chosen from a seed, and what `posttrain check` says about each.

python tests/mutations.py --seed 0 --count 1000

Whether a value is allowed is decided by the JSON schema that `posttrain schema` generates, not by the code under test.
"""

import argparse
import contextlib
import copy
import os
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jsonschema
import yaml

from posttrain.cluster import sites
from posttrain.config.sections import Campaign
from posttrain.config.stages import Experiment
from posttrain.dag import campaign
from posttrain.ground.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OVERRIDES = "--config"  # stands for Snakemake's option of this name, beside the names of files
SITE = "site.yaml"

# Valid campaigns, which together have most keys of the reference. File -> its settings.
SCRATCH = """
config.yaml:
  title: Mutations
  experiments: [one, two]
  keep_gb: 5.0
  strict: false
  wandb: {mode: offline, project: mine}
experiments/one.yaml:
  question: Does it?
  seed: 1
  prepare:
    seed: 3
    world: {documents: 500, questions: 200, test_questions: 50, pairs: 80, long: {context: 64, factor: 4}}
    sft: [{path: rows.jsonl, format: messages, use: train}]
    preference: [{path: rows.jsonl, separator: ' '}]
    test_fraction: 0.2
    group_key: id
    tokenizer: {vocab_size: 400}
    chat_template: default
    date: '2024-07-26'
    max_tokens: 60
    long_rows: cut
    max_line_mb: 4.0
    allow_empty_user: true
  base:
    scratch:
      positions: rope
      hidden_size: 128
      layers: 2
      heads: 4
      intermediate_size: 128
      rope_theta: 100.0
      context: 64
      locality: 1.5
      optimizer: muon
      learned: 0.4
      learning_rate: 0.006
      schedule: cosine
      warmup_steps: 40
      beta2: 0.95
      steps: 500
      batch_size: 16
      micro_batch_size: 8
    dtype: float32
  sft:
    method: qlora
    rank: 8
    alpha: 16.0
    dropout: 0.1
    target_modules: [q_proj, k_proj]
    double_quantization: false
    compute: float32
    packing: true
    max_length: 60
    steps: 30
    warmup_steps: 3
    gradient_checkpointing: true
    log_steps: 5
  reward: {rank: 16, centering: 0.02, labels: chosen, steps: 20, warmup_steps: 2, target_modules: all-linear}
  reference: {batch_size: 32, precision: float32}
  ppo:
    rank: 8
    kl_target: 2.0
    kl_horizon: 5000
    kl_coefficient: 0.1
    minibatches: 2
    batch_size: 32
    steps: 20
    snapshot_steps: 4
    value_warmup: 1
    rails: {max_kl: 30.0, min_eos_rate: 0.2}
    prompts: preference
  dpo: {loss: [sigmoid, sft], loss_weights: [1.0, 0.5], beta: 0.2, steps: 15, warmup_steps: 1}
  kto: {rows: preference, loss: kto, desirable_weight: 1.5, steps: 15}
  longctx: {method: linear, factor: 4.0, tuning: lora, rank: 4, steps: 20, policy: base}
  evaluate: {tasks: [{task: world}, {task: passkey_64, shots: 2}], batch_size: auto, limit: 50}
  compare: {prompts: 40, max_new_tokens: 20, best_of: 4}
  lengths: {tokens: [32, 64], documents: 8, stride: 0.5}
experiments/two.yaml:
  question: And that?
  extends: one
  grid: {seed: [0, 1], dpo.beta: [0.1, 0.3]}
  sft: {rank: 4, warmup_steps: 2}
  ppo: {steps: 10}
"""
GIVEN = f"""
config.yaml:
  experiments: [given, small]
  grid: {{seed: [0, 1, 2]}}
experiments/given.yaml:
  question: Of a model that was made elsewhere?
  prepare:
    sft: [{{path: rows.jsonl}}, {{dataset: some/rows, revision: {COMMIT}, subset: main, rows: train}}]
    kto: [{{path: rows.jsonl, format: kto}}]
    choices: [{{path: rows.jsonl}}]
    test_fraction: 0.1
    chat_template: tokenizer
    end_of_turn: <end>
    conversations: split
  base: {{path: model}}
  sft: {{method: lora, target_modules: [q_proj], steps: 20, eval_steps: 5, checkpoint_steps: 5}}
  kto: {{steps: 10, undesirable_weight: 2.0}}
  evaluate: {{tasks: [{{task: choices}}, {{task: gsm8k, revision: {COMMIT}}}], max_length: 64, merge: true}}
experiments/small.yaml:
  question: Of its prefix?
  extends: given
  sft: {{method: prefix, virtual_tokens: 8}}
  kto: null
"""
HUB = f"""
config.yaml:
  experiments: [hub]
experiments/hub.yaml:
  prepare:
    preference: [{{path: rows.jsonl}}]
    sft: [{{path: rows.jsonl, use: split}}]
    tokenizer: {{hub: {{id: some/tokenizer, revision: {COMMIT}}}}}
  base: {{hub: {{id: some/model, revision: main, allow_floating: true}}}}
  sft: {{method: full, steps: 10, batch_size: 4, max_grad_norm: 0.5}}
  ppo: {{reward_function: 'score.py:score', steps: 8, value_warmup: 2, temperature: 0.7}}
site.yaml:
  partition: gpu
  gpu_memory_gb: 40.0
  modules: [cuda]
  max_runtime: 600
  jobs: 8
  cpu_only: false
  stages: {{sft: {{gpu: 4, nodes: 2, mem_mb: 8000, runtime: 60, shard: true}}}}
"""
SITUATIONS = [yaml.safe_load(text) for text in (SCRATCH, GIVEN, HUB)]

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
    holder[key] = fuzzer.random.choice([*paths, "rows.jsonl/x"])
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


def messages(folder: Path, mistake: Mistake) -> list[str] | None:
    """What `posttrain check` says about a campaign in a folder, or its site; None where it accepts them. Any other
    exception is a traceback for the user."""
    for name, content in mistake.files.items():
        if name != OVERRIDES:
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    problems = []
    for read in (
        lambda: campaign.load(folder / "config.yaml", mistake.files.get(OVERRIDES)),
        lambda: sites.read(folder / SITE),
    ):
        try:
            read()
        except UserError as error:
            problems += error.problems
    for name in mistake.files:
        (folder / name).unlink(missing_ok=True)
    return problems or None


RAW = re.compile(r"found (True|False|None)\b|\^\[|Traceback|pydantic|\bdict\b|NoneType|\binput\b|\binstance\b")


def judged(folder: Path, mistake: Mistake) -> tuple[str, list[str]]:
    """("" or what is wrong with the answer to a mistake, the answer)."""
    try:
        said = messages(folder, mistake)
    except Exception:
        return "traceback", traceback.format_exc().splitlines()
    if said is None:
        return ("accepted" if mistake.forbidden else ""), []
    if len(said) > 1 and not mistake.several:
        return "further messages", said
    if any(RAW.search(message) for message in said):
        return "words of Python", said
    where = OVERRIDES if mistake.file == OVERRIDES else f"{folder / mistake.file}:{mistake.line or ''}"
    start = re.escape(f"{where}: {mistake.key}" if mistake.line or mistake.file == OVERRIDES else where)
    item = rf"|{re.escape(str(folder / mistake.file))}:\d+: {re.escape(mistake.key)}\["  # an item is in another line
    if mistake.key and mistake.forbidden and not any(re.match(start + item, message) for message in said):
        return "wrong place", [f"expected: {start}", *said]
    innocent = [folder / name for name in mistake.files if name != mistake.file and mistake.file in CHILDREN]
    if any(message.startswith(f"{file}:") for file in innocent for message in said):
        return "wrong file", said
    if not all(re.match(rf"{OVERRIDES}|{re.escape(str(folder))}/\S+:\d+: ", message) for message in said):
        return "no place", said
    return "", said


@contextlib.contextmanager
def project(folder: Path) -> Iterator[Path]:
    """A working directory with the files that the situations name."""
    (folder / "folder").mkdir()
    (folder / "model").mkdir()
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "score.py").write_text("def score(prompt, reply, answer):\n    return 0.0\n")
    (folder / "model/config.json").write_text('{"model_type": "llama", "max_position_embeddings": 512}')
    (folder / "model/tokenizer.json").write_text("{}")
    (folder / "model/model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with contextlib.chdir(folder):
        yield folder


def survey(seed: int, count: int, kind: str | None = None) -> list[tuple[Mistake, str, list[str]]]:
    """Mistakes, what is wrong with each answer, and the answers."""
    fuzzer = Fuzzer(seed)
    with tempfile.TemporaryDirectory() as name, project(Path(name)) as folder:
        return [(mistake, *judged(folder, mistake)) for mistake in (fuzzer.mistake(kind) for _ in range(count))]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--count", type=int, default=1000)
    options.add_argument("--kind", choices=sorted(KINDS))
    options.add_argument("--show", type=int, default=3, help="answers to show of each fault")
    arguments = options.parse_args()
    before = os.times()
    surveyed = survey(arguments.seed, arguments.count, arguments.kind)
    spent = sum(os.times()[:2]) - sum(before[:2])
    faults = Counter((fault, mistake.kind) for mistake, fault, _ in surveyed if fault)
    for (fault, kind), number in sorted(faults.items()):
        print(f"{fault:18} {kind:18} {number}")
    shown: Counter = Counter()
    for mistake, fault, said in surveyed:
        if fault and shown[fault, mistake.kind] < arguments.show:
            shown[fault, mistake.kind] += 1
            print(f"\n== {fault}: {mistake.kind} {mistake.file}:{mistake.line} {mistake.key}")
            print("\n".join(line[:300] for line in said[-12:]))
    print(f"\n{sum(faults.values())} faults in {len(surveyed)} mistakes, {spent:.1f} CPU seconds")
    print(dict(Counter(fault for _, fault, _ in surveyed)))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
