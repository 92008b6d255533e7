"""From YAML files to validated experiments, and who owns which artifact. Imports no torch.

posttrain check config/config.yaml
"""

import difflib
import os
import re
import types
import typing
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from posttrain import checks, settings
from posttrain.config import NAME, Campaign, Experiment, HubModel, Section, Source, Task
from posttrain.errors import UserError
from posttrain.identity import canonical, function_file

RESERVED = (
    "fetch",
    "report",
    "logs",
    "benchmarks",
    "wandb",
)  # folders of results/ that no experiment may be called after
# What pydantic says in Python's words, for a person who writes YAML.
PLAIN = {"bool_type": "it should be true or false", "model_type": "it should be a section of `key: value` lines"}
# Stages whose artifact is a language model, in the order of their making.
POLICIES = ("base", "sft", "ppo", "dpo", "longctx")
ALIGNED = ("reward", "ppo", "dpo")  # stages that begin with the SFT policy
UPSTREAM = {
    "prepare": (),
    "base": ("prepare",),
    "sft": ("prepare", "base"),
    "reward": ("prepare", "base", "sft"),
    "reference": ("prepare", "base", "sft"),
    "ppo": ("prepare", "base", "sft", "reward"),
    "dpo": ("prepare", "base", "sft", "reference"),
    "longctx": (),  # all of its policy's
}


class Plan:
    """The validated campaign: its experiments, their sections, and where each artifact lies."""

    def __init__(self, campaign: Campaign, experiments: dict[str, Experiment]):
        self.campaign = campaign
        self.experiments = experiments  # parents that are not listed stand here too
        self.owner = cache(self._owner)
        self.judge_owner = cache(self._judge_owner)

    def policies(self, experiment: str) -> list[str]:
        """The policies that an experiment makes, `base` first."""
        return [policy for policy in POLICIES if self.has(experiment, policy)]

    def stages(self, experiment: str) -> list[str]:
        """The stages that an experiment runs on data and models, in order."""
        return [stage for stage in UPSTREAM if self.has(experiment, "dpo" if stage == "reference" else stage)]

    def has(self, experiment: str, stage: str) -> bool:
        """Whether an experiment runs a stage."""
        return getattr(self.experiments[experiment], stage) is not None

    def section(self, experiment: str, stage: str) -> dict:
        """The slice of the config that a stage reads, as plain values."""
        return checks.slice_of(getattr(self.experiments[experiment], stage))

    def upstream(self, experiment: str, stage: str) -> list[str]:
        """Every stage that a stage's artifact is built from."""
        if stage == "longctx":
            policy = self.experiments[experiment].longctx.policy
            return [*self.upstream(experiment, policy), policy]
        return [part for part in UPSTREAM[stage] if part != "reward" or self.ppo_learns_from_model(experiment)]

    def ppo_learns_from_model(self, experiment: str) -> bool:
        """Whether PPO reads a reward model, and not a function written by hand."""
        ppo = self.experiments[experiment].ppo
        return self.has(experiment, "reward") and not (ppo and ppo.reward_function)

    def foundation(self, experiment: str, stage: str) -> str:
        """The stage whose weights a stage's adapter rests on: after full fine-tuning the SFT policy, else the base."""
        sft = self.experiments[experiment].sft
        return "sft" if sft and sft.method == "full" and stage in (*ALIGNED, "reference") else "base"

    def _owner(self, experiment: str, stage: str) -> str:
        """The experiment whose artifact an experiment uses for a stage: its own, or an equal one of its parent's.

        Equal means equal sections for the stage and for all it is built from. It depends on the `extends:` chain
        only, never on which experiments are listed.
        """
        parent = self.experiments[experiment].extends
        parts = [*self.upstream(experiment, stage), stage]
        if parent is None or not all(self.has(parent, part) for part in parts):
            return experiment
        if [*self.upstream(parent, stage), stage] != parts:
            return experiment
        equal = all(self.section(experiment, part) == self.section(parent, part) for part in parts)
        return self.owner(parent, stage) if equal else experiment

    def _judge_owner(self, experiment: str, judge: str, policy: str) -> str:
        """Like `owner`, for the evaluation, the comparison or the lengths (`judge`) of a policy."""
        parent = self.experiments[experiment].extends
        parts = [policy, *(self.compared_with(experiment) if judge == "compare" else [])]
        if parent is None or not all(self.has(parent, part) for part in [*parts, judge]):
            return experiment
        if judge == "compare" and self.compared_with(parent) != parts[1:]:
            return experiment
        same_parts = all(self.owner(experiment, part) == self.owner(parent, part) for part in parts)
        same_section = self.section(experiment, judge) == self.section(parent, judge)
        return self.judge_owner(parent, judge, policy) if same_parts and same_section else experiment

    def compared_with(self, experiment: str) -> list[str]:
        """The stages that a comparison reads beside the policy; none where there is no alignment to compare."""
        if not any(self.has(experiment, stage) for stage in ALIGNED):
            return []
        return ["sft", *(["reward"] if self.has(experiment, "reward") else [])]

    def folder(self, experiment: str, stage: str) -> str:
        """Folder of the artifact that an experiment uses for a stage."""
        return f"results/{self.owner(experiment, stage)}/{stage}"

    def judgement(self, experiment: str, judge: str, policy: str) -> str:
        """Folder of the evaluation or the comparison (`judge`) of a policy that an experiment uses."""
        return f"results/{self.judge_owner(experiment, judge, policy)}/{judge}/{policy}"

    def judgements_of(self, experiment: str) -> dict[str, str]:
        """JUDGE/POLICY -> folder, of everything that an experiment finds out about its policies."""
        judges = ["evaluate", *(["compare"] if self.compared_with(experiment) else [])]
        judges += ["lengths"] if self.has(experiment, "lengths") else []
        pairs = [(judge, policy) for judge in judges for policy in self.policies(experiment)]
        return {f"{judge}/{policy}": self.judgement(experiment, judge, policy) for judge, policy in pairs}

    def judgements(self) -> list[str]:
        """Folders of all evaluations and comparisons of the campaign, each once."""
        names = self.campaign.experiments
        return list(dict.fromkeys(folder for name in names for folder in self.judgements_of(name).values()))

    def fetched(self, experiment: str, stage: str) -> list[str]:
        """Manifests of what a stage needs from the hub."""
        return [
            f"results/fetch/{item}/manifest.json" for item in hub_items(getattr(self.experiments[experiment], stage))
        ]

    def local_files(self, experiment: str, stage: str) -> list[str]:
        """Files of the user's own that a stage reads: data, a tokenizer, a chat template, a model."""
        return [str(file) for _, file in own_files(stage, getattr(self.experiments[experiment], stage))]

    def fetch_section(self, item: str) -> dict:
        """What `fetch` is to bring, by the item's folder name."""
        for experiment in self.experiments.values():
            for stage in ("prepare", "base", "evaluate"):
                if item in (items := hub_items(getattr(experiment, stage))):
                    return items[item]
        raise UserError(f"results/fetch/{item}: no experiment of this campaign needs it")

    def families(self) -> dict[str, str]:
        """Experiment -> the first listed one that differs from it in the seed of training only."""
        first: dict[str, str] = {}
        return {name: first.setdefault(self._seedless(name), name) for name in self.campaign.experiments}

    def _seedless(self, experiment: str) -> str:
        sections = {
            stage: self.section(experiment, stage)
            for stage in Experiment.model_fields
            if isinstance(getattr(self.experiments[experiment], stage), Section)
        }
        for stage in sections.keys() - {"prepare", "evaluate", "compare", "lengths"}:
            for part in (sections[stage], sections[stage].get("scratch", {})):
                part.pop("seed", None)
        return canonical(sections)

    def summary(self) -> dict:
        """What the report must know of the campaign: its experiments, and where the artifacts of each lie."""
        families = self.families()
        return {
            "title": self.campaign.title,
            "experiments": [
                {
                    "name": name,
                    "family": families[name],
                    "question": self.experiments[name].question,
                    "seed": self.experiments[name].seed,
                    "stages": {
                        **{stage: self.folder(name, stage) for stage in self.stages(name)},
                        **self.judgements_of(name),
                    },
                }
                for name in self.campaign.experiments
            ],
        }


def own_files(stage: str, section: Section) -> list[tuple[str, Path]]:
    """(dotted key, file) of every local file that a section names; of a model's folder, what is read there."""
    found = []
    if stage == "prepare":
        for task in ("text", "long", "sft", "preference", "choices"):
            for number, source in enumerate(getattr(section, task)):
                found += [(f"{stage}.{task}[{number}].path", Path(source.path))] if source.path else []
        if section.chat_template not in (None, "default", "tokenizer"):
            found.append((f"{stage}.chat_template", Path(section.chat_template)))
        if section.tokenizer and section.tokenizer.path:
            found.append((f"{stage}.tokenizer.path", Path(section.tokenizer.path, "tokenizer.json")))
    elif stage in ("ppo", "compare") and section and section.reward_function:
        found.append((f"{stage}.reward_function", function_file(section.reward_function)))
    elif stage == "base" and section.path:
        folder = Path(section.path)
        weights = sorted(folder.glob("*.safetensors")) if os.path.isdir(folder) else []
        found += [(f"{stage}.path", file) for file in [folder / "config.json", *weights]]
    return found


def hub_items(section: Section) -> dict[str, dict]:
    """Every model, data set and lm-eval task of a section that lies on the hub: folder name -> section of `fetch`."""
    items = {}
    for key in type(section).model_fields:
        value = getattr(section, key)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Section):
                items |= _hub_item(part) or hub_items(part)
    return items


def _hub_item(part: Section) -> dict[str, dict]:
    kinds = {HubModel: ("models", "id", "id"), Source: ("datasets", "dataset", "id"), Task: ("tasks", "task", "task")}
    kind, key, called = kinds.get(type(part), ("", "", ""))
    if not kind or getattr(part, key) is None or not (part.revision or part.allow_floating):
        return {}
    name = f"{kind}--{getattr(part, key).replace('/', '--')}@{(part.revision or 'floating').replace('/', '--')}"
    entry = {called: getattr(part, key), "revision": part.revision, "allow_floating": part.allow_floating}
    return {name: {kind: [entry]}}


def load(path: str | Path, overrides: dict | None = None) -> Plan:
    """Read a campaign and its experiments (`experiments/NAME.yaml` beside it), with all parents.

    `overrides` are top-level keys that replace the file's, a section's keys one by one (Snakemake's `--config`).
    Raises UserError with every mistake at once, each with file:line, dotted key, what was found and what is allowed.
    """
    path = Path(path)
    values = settings.read(path)
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
    experiments = _experiments(layers, problems)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return Plan(campaign, experiments)


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _read_layers(names: list[str], places: dict, folder: Path, problems: list) -> dict:
    """The raw settings of every experiment that is listed or is a parent of one."""
    layers: dict[str, settings.Settings | None] = {}
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
                layers[name] = settings.read(file)
            except UserError as error:
                problems += error.problems
                continue
            parent = layers[name].get("extends")
            if isinstance(parent, str):
                wanted.append((parent, f"{layers[name].places['extends']}: extends"))
    return layers


def _names(folder: Path) -> list[str]:
    return [file.stem for file in folder.glob("*.yaml")]


def _experiments(layers: dict, problems: list) -> dict[str, Experiment]:
    experiments = {}
    for name, layer in layers.items():
        if layer is None or (chain := _chain(name, layers, problems)) is None:
            continue
        values, places = _merge(chain)
        known = len(problems)
        experiment, dropped = validated(Experiment, values, places, problems), []
        if experiment is None:
            experiment, dropped = _without_mistakes(values)
        if experiment is None:
            continue
        found = list(checks.contradictions(experiment))
        found += [(key, reason) for key, reason in checks.unused(experiment) if key in chain[-1]]
        resolved = checks.resolve(experiment)
        for stage in ("prepare", "base"):
            for key, file in own_files(stage, getattr(resolved, stage)):
                if not os.path.exists(file):
                    found.append((key, f"there is no {file} (looked for in {Path.cwd()})"))
                elif set(str(file)) & set("{}<>"):
                    found.append((key, f"{file}: Snakemake reads {{ }} < > in a path as its own; rename it"))
        found = [(key, said) for key, said in found if not any(_related(key, gone) for gone in dropped)]
        problems += [f"{_place(places, key)}: {key}: {message}" for key, message in found]
        if len(problems) == known:
            experiments[name] = resolved
    return experiments


def _related(key: str, other: str) -> bool:
    """Whether one dotted key is the other, or holds it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _chain(name: str, layers: dict, problems: list) -> list[settings.Settings] | None:
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


def _merge(chain: list[settings.Settings]) -> tuple[dict, dict[str, str]]:
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
    for key, fields in _conditional(model):
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


def _conditional(model: type[Section] | None):
    for key, field in (model.model_fields if model else {}).items():
        if condition := (field.json_schema_extra or {}).get("only_with"):
            yield key, condition


def _model_at(model: type | None, key: str) -> type[Section] | None:
    """The section class that a key of a section holds, if it holds one."""
    field = model.model_fields.get(key) if model else None
    return section_class(field.annotation) if field else None


def section_class(annotation) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list):
        return next(filter(None, map(section_class, typing.get_args(annotation))), None)
    return None


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
