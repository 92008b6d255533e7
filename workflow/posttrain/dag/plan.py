"""The plan of a campaign: its experiments, the owner of each artifact, and what each artifact depends on."""

import hashlib
import re
from collections.abc import Iterator
from functools import cache

from posttrain.config import grid
from posttrain.config.sections import Campaign, Section, declared, section_class, slice_of
from posttrain.config.sources import hub_items, own_files
from posttrain.config.stages import ALIGNED, BUILDERS, FETCHERS, JUDGES, POLICIES, REPORTED, STAGES, Experiment, source
from posttrain.dag.artifacts import REPORT, Artifact, at, flat
from posttrain.dag.parameters import arguments, planned_code
from posttrain.ground.errors import UserError
from posttrain.ground.identity import canonical

# Folders of results/; no experiment may have one of these names.
RESERVED = ("fetch", "report", "logs", "wandb", "compute")


class Plan:
    """The experiments of a campaign, their sections, and the artifacts that they make and share."""

    def __init__(
        self,
        campaign: Campaign,
        experiments: dict[str, Experiment],
        configfile: str = "",
        code: dict[str, str] | None = None,
    ):
        """configfile: the campaign's, where it is not the default one. code: stage -> fingerprint."""
        self.campaign = campaign
        self.configfile = configfile
        self.experiments = dict(experiments)  # with unlisted parents, and the cells that own artifacts
        self.section = cache(self._section)
        self.has = cache(self._has)
        self.upstream = cache(self._upstream)
        self.axes: dict[str, dict[str, object]] = {}  # cell -> key -> value
        self.grids: dict[str, dict[str, set[str]]] = {}  # experiment with a grid -> axis -> stages that it changes
        self.labels: dict[str, dict[str, str]] = {}  # experiment with a grid -> axis -> its short name
        self.cells = {name: self._cells(name) for name in experiments if "@" not in name}
        self.names = [cell for name in campaign.experiments for cell in self.cells.get(name, [])]  # what is run
        self.claimed: list[Artifact] = []  # what the claims need, which the campaign need not list
        self.verifying = False  # whether the run makes only what the claims need (`snakemake verify`)
        self.code = code or planned_code(campaign.strict)
        self.owner = cache(self._owner)
        self.lineage = cache(self._lineage)
        self.inputs = cache(self._inputs)
        for cell in self.axes.copy():
            self._name_owners(cell)

    def _cells(self, name: str) -> list[str]:
        """The cells of an experiment's grid; itself where it has none."""
        axes = self.experiments[name].grid
        if not axes:
            return [name]
        labels = grid.labels(list(axes))
        cells = {grid.cell_name(name, cell, labels): cell for cell in grid.cells(axes)}
        self.axes |= cells
        self.grids[name] = {key: _changed(self.experiments[name], key) for key in axes}
        self.labels[name] = labels
        return list(cells)

    def _name_owners(self, cell: str) -> None:
        """Register the owners of a cell's artifacts: NAME with only the axes that change the artifact."""
        for stage, policy in self.made(cell):
            parts = self.parts(cell, stage, policy)
            self.experiments.setdefault(self._narrowed(cell, parts), self.experiments[cell])

    def _narrowed(self, cell: str, stages: list[str]) -> str:
        """A cell's name with only the axes that change at least one of the stages."""
        name, wanted = self.origin(cell), set(stages)
        effective = {key: value for key, value in self.axes.get(cell, {}).items() if self.grids[name][key] & wanted}
        narrowed = grid.cell_name(name, effective, self.labels.get(name, {}))
        if narrowed not in self.axes and effective:
            self.axes[narrowed] = effective
        return narrowed

    def pattern(self) -> str:
        """A regular expression for the names of experiments and of cells. It does not list the cells: that is slow."""
        names = [name for name in self.experiments if "@" not in name]
        return "|".join(re.escape(name) + ("(@[^/]+)?" if name in self.grids else "") for name in names)

    @staticmethod
    def origin(cell: str) -> str:
        """The experiment that a cell belongs to."""
        return cell.partition("@")[0]

    def parent(self, experiment: str) -> str | None:
        """The experiment that an experiment extends; where the parent has a grid, its cell with the same values."""
        above = self.experiments[self.origin(experiment)].extends
        if above is None:
            return None
        changed = self.grids.get(above, {})
        shared = {key: value for key, value in self.axes.get(experiment, {}).items() if key in changed}
        cell = grid.cell_name(above, shared, self.labels.get(above, {}))
        return cell if cell in self.experiments else above

    def _has(self, experiment: str, stage: str) -> bool:
        """Whether an experiment runs a stage."""
        if STAGES[stage].runs == "where read":
            return any(stage in STAGES[other].reads and self.has(experiment, other) for other in BUILDERS)
        if stage in JUDGES and "sft" in STAGES[stage].reads and not any(self.has(experiment, s) for s in ALIGNED):
            return False  # it compares policies that start from the SFT policy with it
        return getattr(self.experiments[experiment], stage) is not None

    def stages(self, experiment: str) -> list[str]:
        """The stages that an experiment runs once, in the order of the table."""
        return [stage for stage in BUILDERS if self.has(experiment, stage)]

    def policies(self, experiment: str) -> list[str]:
        """The policies that an experiment makes, `base` first."""
        return [policy for policy in POLICIES if self.has(experiment, policy)]

    def judgements(self, experiment: str) -> list[tuple[str, str]]:
        """(judge, policy) of every judgement that an experiment makes."""
        judges = [judge for judge in JUDGES if self.has(experiment, judge)]
        return [(judge, policy) for judge in judges for policy in self.policies(experiment)]

    def made(self, experiment: str) -> list[tuple[str, str]]:
        """(stage, policy) of every artifact of an experiment; policy: "" for stages that run once."""
        return [*((stage, "") for stage in self.stages(experiment)), *self.judgements(experiment)]

    def _section(self, experiment: str, stage: str) -> str:
        """The part of the config that a stage reads, as canonical JSON."""
        name = self.origin(experiment)
        if name != experiment and not any(stage in self.grids[name][axis] for axis in self.axes[experiment]):
            return self.section(name, stage)  # no axis of the cell changes it
        return canonical(slice_of(getattr(self.experiments[experiment], stage)))

    def reads(self, experiment: str, stage: str, policy: str = "") -> Iterator[tuple[str, str, str]]:
        """(role, stage, policy) of each artifact that a stage reads. policy: the judged one."""
        section = getattr(self.experiments[experiment], stage)
        policy = policy or getattr(section, "policy", "")
        for role in STAGES[stage].reads:
            if role == "policy":
                yield role, policy, ""
            elif role == "beside":
                if policy != "sft":
                    yield role, stage, "sft"
            elif role == "base":
                yield role, self.foundation(experiment, stage if "sft" in STAGES[stage].reads else policy or stage), ""
            elif role not in STAGES[stage].optional or self._is_read(experiment, section, role):
                yield role, source(role), ""

    def _is_read(self, experiment: str, section: Section, role: str) -> bool:
        """Whether an optional role is read: its stage runs here, and the section does not say that it does without."""
        return self.has(experiment, role) and role not in getattr(section, "without", ())

    def foundation(self, experiment: str, stage: str) -> str:
        """The stage whose weights are under a stage's adapter: after full fine-tuning `sft`, else `base`."""
        sft = self.experiments[experiment].sft
        return "sft" if sft and sft.method == "full" and "sft" in STAGES[stage].reads else "base"

    def _upstream(self, experiment: str, stage: str, policy: str = "") -> list[str]:
        """Every stage that an artifact depends on, in the order of the table."""
        direct = {part for role, part, _ in self.reads(experiment, stage, policy) if role != "beside"}
        above = direct.union(*(self.upstream(experiment, part) for part in direct))
        return [part for part in STAGES if part in above]

    def parts(self, experiment: str, stage: str, policy: str = "") -> list[str]:
        """Every stage that an artifact depends on, with its own stage last."""
        return [*self.upstream(experiment, stage, policy), stage]

    def _owner(self, experiment: str, stage: str, policy: str = "") -> str:
        """The experiment whose artifact an experiment uses: its own, or an equal one of its parent's.

        Equal means equal sections of the stage and of every stage that it depends on. The owner follows from the
        `extends:` chain and the grid, not from which experiments are listed.
        """
        parts = self.parts(experiment, stage, policy)
        if (narrowed := self._narrowed(experiment, parts)) != experiment:
            return self.owner(narrowed, stage, policy)
        parent = self.parent(experiment)
        # A parent owns the reference that its children share, though it runs no stage that reads it.
        if parent is None or any(getattr(self.experiments[parent], part) is None for part in parts):
            return experiment
        if stage in JUDGES and not self.has(parent, stage):
            return experiment
        if self.parts(parent, stage, policy) != parts:
            return experiment
        equal = all(self.section(experiment, part) == self.section(parent, part) for part in parts)
        return self.owner(parent, stage, policy) if equal else experiment

    def artifact(self, experiment: str, stage: str, policy: str = "") -> Artifact:
        """The artifact that an experiment uses for a stage or for a judgement of a policy."""
        return Artifact(self.owner(experiment, stage, policy), stage, policy)

    def folder(self, experiment: str, stage: str, policy: str = "") -> str:
        """The folder of that artifact."""
        return self.artifact(experiment, stage, policy).folder

    def of(self, experiment: str) -> list[Artifact]:
        """Every artifact that an experiment uses."""
        return [self.artifact(experiment, stage, policy) for stage, policy in self.made(experiment)]

    def artifacts(self) -> list[Artifact]:
        """Every artifact of the campaign, once, after the artifacts that it depends on."""
        artifacts = dict.fromkeys(artifact for name in self.names for artifact in self.of(name))
        judged = [artifact for artifact in artifacts if artifact.policy]
        judged.sort(key=lambda artifact: artifact.policy != "sft" or "beside" not in STAGES[artifact.stage].reads)
        return [*(artifact for artifact in artifacts if not artifact.policy), *judged, REPORT]

    def reported(self) -> list[Artifact]:
        """The artifacts that the report reads."""
        return [artifact for artifact in self.artifacts() if artifact.stage in REPORTED]

    def folders(self) -> list[str]:
        """The folders of all artifacts, those that only claims need and what these depend on among them."""
        claimed = dict.fromkeys(folder for artifact in self.claimed for folder in self.above(artifact))
        return [*dict.fromkeys([*claimed, *(artifact.folder for artifact in self.artifacts())])]

    def above(self, artifact: Artifact) -> list[str]:
        """The folders of the artifacts that an artifact depends on, in the order of the table, with its own last."""
        name, stage, policy = artifact
        beside = [role_policy for _, _, role_policy in self.reads(name, stage, policy) if role_policy]
        judged = [self.folder(name, stage, other) for other in beside]
        return [*(self.folder(name, part) for part in self.upstream(name, stage, policy)), *judged, artifact.folder]

    def _inputs(self, experiment: str, stage: str, policy: str = "") -> dict[str, str | list[str]]:
        """The inputs of an artifact by role: manifests, and the user's own files."""
        if stage == "report":
            shown = self.claimed if self.verifying else self.reported()
            return {"evaluations": [artifact.manifest for artifact in shown]}
        inputs: dict[str, str | list[str]] = {
            role: self.artifact(experiment, part, judged).manifest
            for role, part, judged in self.reads(experiment, stage, policy)
        }
        if stage in FETCHERS:
            inputs["fetched"] = self.fetched(experiment, stage)
        if files := self.local_files(experiment, stage):
            inputs["files"] = files
        return inputs

    def arguments(self, experiment: str, stage: str, policy: str = "") -> str:
        """The arguments of a stage's command; Snakemake reruns the stage when they change."""
        section, lineage = self.section(experiment, stage), self.lineage(experiment, stage, policy)
        return arguments(stage, [section, self.code[stage], lineage], self.inputs(experiment, stage, policy))

    def _lineage(self, experiment: str, stage: str, policy: str = "") -> str:
        """Digest of the sections and the code of everything that an artifact depends on, as 16 hex digits.

        It makes an artifact stale when settings upstream changed, even where the upstream artifact is absent. The
        report's is the same whether or not a run makes only what the claims need.
        """
        above = []
        inputs = self.inputs(experiment, stage, policy)
        if stage == "report":
            shown = dict.fromkeys([*self.reported(), *self.claimed])
            inputs = {"evaluations": [artifact.manifest for artifact in shown]}
        for role, files in inputs.items():
            for file in [] if role in ("files", "fetched") else flat({role: files}):
                part = at(file)
                section, code = self.section(part.experiment, part.stage), self.code[part.stage]
                above.append([role, part.stage, section, code, self.lineage(*part)])
        return hashlib.sha256(canonical(above).encode()).hexdigest()[:16]

    def fetched(self, experiment: str, stage: str) -> list[str]:
        """Manifests of the hub items that a stage needs."""
        items = hub_items(getattr(self.experiments[experiment], stage))
        return [Artifact("fetch", item).manifest for item in sorted(items)]

    def local_files(self, experiment: str, stage: str) -> list[str]:
        """The user's own files that a stage reads: data, a tokenizer, a chat template, a model."""
        return [str(file) for _, file in own_files(stage, getattr(self.experiments[experiment], stage))]

    def fetch_section(self, item: str) -> dict:
        """The section of `fetch` for an item, by the item's folder name: a whole model's before its tokenizer's."""
        sections = (
            section[item]
            for experiment in self.experiments.values()
            for stage in FETCHERS
            if item in (section := hub_items(getattr(experiment, stage)))
        )
        if chosen := min(sections, key=lambda section: "allow_patterns" in str(section), default=None):
            return chosen
        raise UserError(f"results/fetch/{item}: no experiment of this campaign needs it")


def _changed(experiment: Experiment, key: str) -> set[str]:
    """The stages that a dotted key changes: its section's stage, and the stages of `also` in the schema."""
    if key == "seed":
        return set(experiment._seeded)
    model: type[Section] | None = Experiment
    changed = {key.partition(".")[0]}
    for part in key.split("."):
        field = model.model_fields.get(part) if model is not None else None
        changed |= set(declared(field).get("also", ())) if field else set()
        model = section_class(field.annotation) if field else None
    return changed
