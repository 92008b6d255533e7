"""The validated campaign: its experiments, who owns which artifact, and where each lies. Imports no torch."""

import hashlib
import json
import re
import shlex
from functools import cache
from pathlib import Path

from posttrain.config import grid
from posttrain.config.sections import Campaign, Experiment, Section, section_class
from posttrain.config.sources import hub_items, own_files
from posttrain.dag import checks
from posttrain.ground.code import fingerprint_of
from posttrain.ground.errors import UserError
from posttrain.ground.files import sha256
from posttrain.ground.identity import canonical

# Folders of results/ that no experiment may be called after.
RESERVED = ("fetch", "report", "logs", "wandb")
# Stages whose artifact is a language model, in the order of their making.
POLICIES = ("base", "sft", "ppo", "dpo", "longctx")
JUDGES = ("evaluate", "compare", "lengths")  # stages that find something out about every policy
LOCK = Path("envs/requirements.txt")
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

    def __init__(
        self,
        campaign: Campaign,
        experiments: dict[str, Experiment],
        configfile: str = "",
        code: dict[str, str] | None = None,
    ):
        self.campaign = campaign
        self.configfile = configfile  # of the campaign, where it is not the default's
        self.experiments = dict(experiments)  # parents that are not listed stand here too, and the owners among cells
        self.section = cache(self._section)
        self.axes: dict[str, dict[str, object]] = {}  # cell -> key -> value
        self.grids: dict[str, dict[str, set[str]]] = {}  # experiment with a grid -> axis -> stages that it changes
        self.short: dict[str, dict[str, str]] = {}  # experiment with a grid -> axis -> its short name
        cells = {name: self._cells(name) for name in experiments if "@" not in name}
        # What is run: the experiments that are listed, or their cells.
        self.names = [cell for name in campaign.experiments for cell in cells.get(name, [])]
        self.code = code or planned_code(campaign.strict)  # stage -> fingerprint of what it runs
        self.owner = cache(self._owner)
        self.judge_owner = cache(self._judge_owner)
        self.lineage = cache(self._lineage)
        self.inputs = cache(self._inputs)
        self.judgements_of = cache(self._judgements_of)
        for cell in self.axes.copy():
            self._name_owners(cell)

    def _cells(self, name: str) -> list[str]:
        """The cells of an experiment's grid; itself where it has none."""
        axes = self.experiments[name].grid
        if not axes:
            return [name]
        short = grid.labels(list(axes))
        cells = {grid.cell_name(name, cell, short): cell for cell in grid.cells(axes)}
        self.axes |= cells
        self.grids[name] = {key: _changed(self.experiments[name], key) for key in axes}
        self.short[name] = short
        return list(cells)

    def _name_owners(self, cell: str) -> None:
        """Make known the names under which a cell's artifacts lie: NAME with the axes alone that a stage depends on."""
        parts = [[*self.upstream(cell, stage), stage] for stage in self.stages(cell)]
        for judge, policy in self._judged(cell):
            parts.append(self._judged_parts(cell, judge, policy))
        for stages in parts:
            self.experiments.setdefault(self._narrowed(cell, stages), self.experiments[cell])

    def _narrowed(self, cell: str, stages: list[str]) -> str:
        """A cell's name with the axes alone that change one of some stages."""
        name, axes = self.origin(cell), self.axes.get(cell, {})
        changed = self.grids.get(name, {})
        left = {key: value for key, value in axes.items() if changed[key] & set(stages)}
        narrowed = grid.cell_name(name, left, self.short.get(name, {}))
        if narrowed not in self.axes and left:
            self.axes[narrowed] = left
        return narrowed

    def pattern(self) -> str:
        """A regular expression for the names of experiments, and for any cell of a grid: a thousand names are slow."""
        names = [name for name in self.experiments if "@" not in name]
        return "|".join(re.escape(name) + ("(@[^/]+)?" if name in self.grids else "") for name in names)

    @staticmethod
    def origin(cell: str) -> str:
        """The experiment that a cell is one of."""
        return cell.partition("@")[0]

    def parent(self, experiment: str) -> str | None:
        """The experiment, or of one with a grid the cell with the same values, that an experiment starts from."""
        above = self.experiments[self.origin(experiment)].extends
        if above is None:
            return None
        changed = self.grids.get(above, {})
        shared = {key: value for key, value in self.axes.get(experiment, {}).items() if key in changed}
        cell = grid.cell_name(above, shared, self.short.get(above, {}))
        return cell if cell in self.experiments else above

    def freeze(self) -> str:
        """The campaign as JSON, from which a job makes the plan that its run was started with."""
        experiments = {name: experiment.model_dump(mode="json") for name, experiment in self.experiments.items()}
        campaign = self.campaign.model_dump(mode="json")
        seeded = {name: sorted(experiment._seeded) for name, experiment in self.experiments.items()}
        whole = {"campaign": campaign, "experiments": experiments, "seeded": seeded}
        return canonical(whole | {"configfile": self.configfile, "code": self.code})

    def policies(self, experiment: str) -> list[str]:
        """The policies that an experiment makes, `base` first."""
        return [policy for policy in POLICIES if self.has(experiment, policy)]

    def stages(self, experiment: str) -> list[str]:
        """The stages that an experiment runs on data and models, in order."""
        return [stage for stage in UPSTREAM if self.has(experiment, "dpo" if stage == "reference" else stage)]

    def has(self, experiment: str, stage: str) -> bool:
        """Whether an experiment runs a stage."""
        return getattr(self.experiments[experiment], stage) is not None

    def _section(self, experiment: str, stage: str) -> str:
        """The slice of the config that a stage reads, as JSON in its one spelling."""
        name = self.origin(experiment)
        if name != experiment and not any(stage in self.grids[name][axis] for axis in self.axes[experiment]):
            return self.section(name, stage)  # no axis of the cell changes it
        return canonical(checks.slice_of(getattr(self.experiments[experiment], stage)))

    def _lineage(self, experiment: str, stage: str, policy: str = "") -> str:
        """Digest of the sections and the code of all that an artifact is built on, as 16 hex digits.

        By it an artifact is stale when something that it descends from has other settings, even if that is not there.
        """
        above = []
        for role, files in self.inputs(experiment, stage, policy).items():
            for file in [] if role in ("files", "fetched") else flat({role: files}):
                _, owner, part, *judged = file.split("/")[:-1]
                below = self.lineage(owner, part, *judged)
                above.append([role, part, self.section(owner, part), self.code[part], below])
        return hashlib.sha256(canonical(above).encode()).hexdigest()[:16]

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
        parts = [*self.upstream(experiment, stage), stage]
        if (narrowed := self._narrowed(experiment, parts)) != experiment:
            return self.owner(narrowed, stage)
        parent = self.parent(experiment)
        if parent is None or not all(self.has(parent, part) for part in parts):
            return experiment
        if [*self.upstream(parent, stage), stage] != parts:
            return experiment
        equal = all(self.section(experiment, part) == self.section(parent, part) for part in parts)
        return self.owner(parent, stage) if equal else experiment

    def _judge_owner(self, experiment: str, judge: str, policy: str) -> str:
        """Like `owner`, for the evaluation, the comparison or the lengths (`judge`) of a policy."""
        if (narrowed := self._narrowed(experiment, self._judged_parts(experiment, judge, policy))) != experiment:
            return self.judge_owner(narrowed, judge, policy)
        parent = self.parent(experiment)
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

    def _inputs(self, experiment: str, stage: str, policy: str = "") -> dict[str, str | list[str]]:
        """What a stage, or the judgement (`stage`) of a policy, is built on, by role: manifests, and files."""

        def made(part: str) -> str:
            return f"{self.folder(experiment, part)}/manifest.json"

        if stage == "report":
            return {"evaluations": [f"{folder}/manifest.json" for folder in self.judgements()]}
        found = {} if stage == "prepare" else {"data": made("prepare")}
        if stage in ("prepare", "base", "evaluate"):
            found["fetched"] = self.fetched(experiment, stage)
        if stage in ("prepare", "base"):
            return found | {"files": self.local_files(experiment, stage)}
        if stage == "longctx":
            policy = self.experiments[experiment].longctx.policy
        if stage in (*ALIGNED, "reference", "compare"):
            found |= {"base": made(self.foundation(experiment, "reward")), "sft": made("sft")}
        else:
            found["base"] = made(self.foundation(experiment, policy or stage))
        if policy:
            found["policy"] = made(policy)
        if stage == "dpo":
            found["reference"] = made("reference")
        learned = self.has(experiment, "reward") if stage == "compare" else self.ppo_learns_from_model(experiment)
        if stage in ("ppo", "compare") and learned:
            found["reward"] = made("reward")
        if stage == "compare" and policy != "sft":
            found["beside"] = f"{self.judgement(experiment, 'compare', 'sft')}/manifest.json"
        return found

    def arguments(self, experiment: str, stage: str, policy: str = "") -> str:
        """What the command of a stage is given; Snakemake runs it again when this changes."""
        section, lineage = self.section(experiment, stage), self.lineage(experiment, stage, policy)
        return arguments([section, self.code[stage], lineage], self.inputs(experiment, stage, policy))

    def folder(self, experiment: str, stage: str) -> str:
        """Folder of the artifact that an experiment uses for a stage."""
        return f"results/{self.owner(experiment, stage)}/{stage}"

    def judgement(self, experiment: str, judge: str, policy: str) -> str:
        """Folder of the evaluation or the comparison (`judge`) of a policy that an experiment uses."""
        return f"results/{self.judge_owner(experiment, judge, policy)}/{judge}/{policy}"

    def _judgements_of(self, experiment: str) -> dict[str, str]:
        """JUDGE/POLICY -> folder, of everything that an experiment finds out about its policies."""
        pairs = self._judged(experiment)
        return {f"{judge}/{policy}": self.judgement(experiment, judge, policy) for judge, policy in pairs}

    def _judged(self, experiment: str) -> list[tuple[str, str]]:
        """(judge, policy) of everything that an experiment finds out."""
        judges = ["evaluate", *(["compare"] if self.compared_with(experiment) else [])]
        judges += ["lengths"] if self.has(experiment, "lengths") else []
        return [(judge, policy) for judge in judges for policy in self.policies(experiment)]

    def _judged_parts(self, experiment: str, judge: str, policy: str) -> list[str]:
        """Every stage that a judgement depends on, itself among them."""
        made = [policy, *(self.compared_with(experiment) if judge == "compare" else [])]
        return [judge, *made, *(part for stage in made for part in self.upstream(experiment, stage))]

    def judgements(self) -> list[str]:
        """Folders of all evaluations and comparisons of the campaign, each once."""
        return list(dict.fromkeys(folder for name in self.names for folder in self.judgements_of(name).values()))

    def folders(self) -> list[str]:
        """Folders of everything that the campaign makes, each once, what is built on after what it is built on."""
        stages = [self.folder(name, stage) for name in self.names for stage in self.stages(name)]
        judged = sorted(self.judgements(), key=lambda folder: not folder.endswith("/compare/sft"))
        return [*dict.fromkeys([*stages, *judged]), "results/report"]

    def fetched(self, experiment: str, stage: str) -> list[str]:
        """Manifests of what a stage needs from the hub."""
        items = hub_items(getattr(self.experiments[experiment], stage))
        return [f"results/fetch/{item}/manifest.json" for item in sorted(items)]

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
        return {name: first.setdefault(self._seedless(name), self._without_seed(name)) for name in self.names}

    def _without_seed(self, cell: str) -> str:
        """The name of a cell without its seed."""
        name = self.origin(cell)
        axes = {key: value for key, value in self.axes.get(cell, {}).items() if key != "seed"}
        return grid.cell_name(name, axes, self.short.get(name, {}))

    def _seedless(self, experiment: str) -> str:
        values = self.experiments[experiment]
        held = [stage for stage, value in values if isinstance(value, Section)]
        judged = ("prepare", *JUDGES)  # whose seeds choose rows and questions
        sections = {stage: self.section(experiment, stage) for stage in held}
        return canonical({stage: text if stage in judged else _unseeded(text) for stage, text in sections.items()})

    def summary(self) -> dict:
        """What the report must know of the campaign: its experiments, and where the artifacts of each lie."""
        families = self.families()
        return {
            "title": self.campaign.title,
            "configfile": self.configfile,
            "owners": {name: self._without_seed(name) for name in self.axes if name not in families},
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
                for name in self.names
            ],
        }


@cache
def _unseeded(section: str) -> str:
    """A training section without its seed."""
    values = json.loads(section)
    for part in (values, values.get("scratch", {})):
        part.pop("seed", None)
    return canonical(values)


def _changed(experiment: Experiment, key: str) -> set[str]:
    """The stages whose settings follow from a dotted key: its section's, and those that the schema declares."""
    if key == "seed":
        return set(experiment._seeded)
    model, changed = Experiment, {key.partition(".")[0]}
    for part in key.split("."):
        field = model.model_fields.get(part) if model else None
        changed |= set((field.json_schema_extra or {}).get("also", ())) if field else set()
        model = section_class(field.annotation) if field else None
    return changed


def thaw(text: str) -> Plan:
    """The plan that `freeze` wrote down."""
    frozen = json.loads(text)
    experiments = {name: Experiment.model_validate(values) for name, values in frozen["experiments"].items()}
    for name, experiment in experiments.items():
        experiment._seeded = frozenset(frozen["seeded"][name])
    return Plan(Campaign.model_validate(frozen["campaign"]), experiments, frozen["configfile"], frozen["code"])


def planned_code(strict: bool) -> dict[str, str]:
    """Stage -> fingerprint of its code; where `strict`, followed by that of the pinned versions."""
    if strict and not LOCK.is_file():
        raise UserError(f"strict: there is no {LOCK}, whose versions are to count")
    lock = f"+{sha256(LOCK)[:8]}" if strict else ""
    return {stage: fingerprint_of(stage) + lock for stage in [*UPSTREAM, *JUDGES, "report"]}


def arguments(params: list[str], inputs: dict) -> str:
    """What the command of a stage is given: `--config SECTION --code FINGERPRINT --lineage DIGEST --data MANIFEST ...`.

    params: the section, the fingerprint of the code, the lineage. inputs: files by role; the user's own files are named
    in the section.
    """
    section, code, lineage = params
    text = f"--config {shlex.quote(section)} --code {code} --lineage {lineage}"
    for role in sorted(inputs):
        if (files := flat({role: inputs[role]})) and role != "files":
            text += f" --{role} {' '.join(files)}"
    return text


def flat(inputs: dict) -> list:
    """All files of a stage's inputs."""
    return [file for files in inputs.values() for file in ([files] if isinstance(files, str | Path) else files)]
