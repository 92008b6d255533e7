"""A plan as text, for the jobs of a run, which may start after an edit of the config, and for the report."""

import json
from functools import cache

from posttrain.config import grid
from posttrain.config.sections import Campaign
from posttrain.config.stages import STAGES, Experiment
from posttrain.dag import claims
from posttrain.dag.plan import Plan
from posttrain.ground.identity import canonical


def freeze(plan: Plan) -> str:
    """The plan as JSON, from which a job rebuilds the plan of its run. Claims are the report's alone."""
    experiments = {
        name: experiment.model_dump(mode="json", exclude={"claims"}) for name, experiment in plan.experiments.items()
    }
    campaign = plan.campaign.model_dump(mode="json")
    seeded = {name: sorted(experiment._seeded) for name, experiment in plan.experiments.items()}
    whole = {"campaign": campaign, "experiments": experiments, "seeded": seeded}
    return canonical(whole | {"configfile": plan.configfile, "code": plan.code})


def thaw(text: str) -> Plan:
    """The plan in the JSON text of `freeze`."""
    frozen = json.loads(text)
    experiments = {name: Experiment.model_validate(values) for name, values in frozen["experiments"].items()}
    for name, experiment in experiments.items():
        experiment._seeded = frozenset(frozen["seeded"][name])
    return Plan(Campaign.model_validate(frozen["campaign"]), experiments, frozen["configfile"], frozen["code"])


def summary(plan: Plan) -> dict:
    """What the report needs to know of the campaign: its experiments and the folders of their artifacts."""
    family = families(plan)
    return {
        "title": plan.campaign.title,
        "configfile": plan.configfile,
        "claims": claims.summary(plan),
        "owners": {name: _without_seed(plan, name) for name in plan.axes if name not in family},
        "experiments": [
            {
                "name": name,
                "family": family[name],
                "question": plan.experiments[name].question,
                **({"paper": paper.model_dump()} if (paper := plan.experiments[name].paper) else {}),
                "seed": plan.experiments[name].seed,
                "stages": {"/".join(filter(None, artifact[1:])): artifact.folder for artifact in plan.of(name)},
            }
            for name in plan.names
        ],
    }


def families(plan: Plan) -> dict[str, str]:
    """Experiment -> name, without its seed, of the first listed experiment that differs in the training seed only."""
    first: dict[str, str] = {}
    return {name: first.setdefault(_seedless(plan, name), _without_seed(plan, name)) for name in plan.names}


def _without_seed(plan: Plan, cell: str) -> str:
    """The name of a cell without its seed."""
    name = plan.origin(cell)
    axes = {key: value for key, value in plan.axes.get(cell, {}).items() if key != "seed"}
    return grid.cell_name(name, axes, plan.labels.get(name, {}))


def _seedless(plan: Plan, experiment: str) -> str:
    """The sections of an experiment without the training seeds; other seeds, which choose rows, stay."""
    settings = plan.experiments[experiment]
    sections = {name: plan.section(experiment, name) for name in STAGES if getattr(settings, name)}
    return canonical({name: _unseeded(text) if STAGES[name].trains else text for name, text in sections.items()})


@cache
def _unseeded(section: str) -> str:
    """A training section without its seed."""
    values = json.loads(section)
    for part in (values, values.get("scratch", {})):
        part.pop("seed", None)
    return canonical(values)
