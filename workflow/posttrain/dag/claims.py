"""The claims of a campaign: which artifacts each needs, and what the report needs to know to rule on it."""

import re
from collections.abc import Iterator
from typing import Any

from posttrain.config.claims import SCALES, Claim, Measured, Term
from posttrain.config.stages import JUDGES, STAGES, Experiment
from posttrain.dag.artifacts import Artifact
from posttrain.dag.plan import Plan
from posttrain.ground.identity import of_params

TERM = tuple(Term.model_fields)


class Unclear(Exception):
    """A claim names what is not there: (key within the claim, what is wrong)."""


def claims(plan: Plan) -> Iterator[tuple[str, str, Claim]]:
    """(experiment, id, claim) of every claim of the listed experiments, those of `verify` among them."""
    for name in [*plan.campaign.experiments, *plan.campaign.verify]:
        for key, claim in plan.experiments[name].claims.items():
            yield name, key, claim


def mistakes(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """(experiment, dotted key, what is wrong) of every claim that names what the plan lacks."""
    owner: dict[str, str] = {}
    for name, key, claim in claims(plan):
        if (other := owner.setdefault(key, name)) != name:
            yield name, f"claims.{key}", f"{other} has a claim of this name too"
        for part, measured in parts_of(claim):
            try:
                runs(plan, name, measured)
            except Unclear as problem:
                inner, text = problem.args
                yield name, f"claims.{key}.{part}.{inner}".rstrip("."), text
        for inner, text in unsettled(claim):
            yield name, f"claims.{key}.{inner}", text


def unsettled(claim: Claim) -> Iterator[tuple[str, str]]:
    """Contradictions within a claim: (key, what is wrong)."""
    relations = [key for key in RELATIONS if getattr(claim.expected, key) is not None]
    if len(relations) != 1:
        present = " and ".join(relations) or "none"
        yield "expected", f"exactly one of {', '.join(RELATIONS)} must be set, found {present}"
    if not claim.control.model_fields_set:
        yield "control", "is empty: say what differs from `measured`, so that the claim must not hold"


RELATIONS = ("exactly", "about", "at_least", "at_most")


def controlled(claim: Claim) -> Measured:
    """What is measured for the control: that of the claim, with the keys that the control sets."""
    changed = {key: getattr(claim.control, key) for key in claim.control.model_fields_set}
    return claim.measured.model_copy(update=changed)


def needs(plan: Plan) -> list[Artifact]:
    """The artifacts that the claims that can be tested at the campaign's scale need, once."""
    needed: dict[Artifact, None] = {}
    for name, _, claim in claims(plan):
        if is_tested(plan, claim):
            for _, measured in parts_of(claim):
                for run in runs(plan, name, measured):
                    needed |= dict.fromkeys(term["artifact"] for term in terms(run) if "artifact" in term)
    return list(needed)


def terms(run: dict) -> list[dict]:
    """The terms of one run of a measurement."""
    return run["terms"] + run.get("over", [])


def is_tested(plan: Plan, claim: Claim) -> bool:
    """Whether a claim can be tested at the campaign's scale."""
    return SCALES.index(claim.scale) <= SCALES.index(plan.campaign.scale)


def summary(plan: Plan) -> list[dict[str, Any]]:
    """Every claim as the report needs it: its words, and the numbers to read with their weights."""
    return [
        claim.model_dump(mode="json", exclude={"measured", "control"}, exclude_none=True)
        | {"id": key, "experiment": name, "question": plan.experiments[name].question}
        | {"tested": is_tested(plan, claim), "family": claim.family or claim.paper}
        | {part: _read(plan, name, measured) for part, measured in parts_of(claim)}
        for name, key, claim in claims(plan)
    ]


def parts_of(claim: Claim) -> list[tuple[str, Measured]]:
    """What is measured for a claim, and for its control."""
    return [("measured", claim.measured), ("control", controlled(claim))]


def _read(plan: Plan, name: str, measured: Measured) -> dict[str, Any]:
    """A measurement with artifacts as folders, and each folder's parameters and upstream folders in the plan."""
    of_runs = runs(plan, name, measured)
    artifacts = dict.fromkeys(term["artifact"] for run in of_runs for term in terms(run) if "artifact" in term)
    return {
        "runs": [
            {"seed": run["seed"]}
            | {part: [_shown(term) for term in run[part]] for part in ("terms", "over") if part in run}
            for run in of_runs
        ],
        "cluster": measured.cluster,
        "batch": batch(plan, next(iter(artifacts), None)),
        "planned": {artifact.folder: planned(plan, artifact) for artifact in artifacts},
        "above": {artifact.folder: plan.above(artifact) for artifact in artifacts},
    }


def planned(plan: Plan, artifact: Artifact) -> str:
    """Digest of the parameters that an artifact has in the plan: its section, code and lineage."""
    section, lineage = plan.section(artifact.experiment, artifact.stage), plan.lineage(*artifact)
    return of_params([section, plan.code[artifact.stage], lineage])


def _shown(term: dict) -> dict:
    """A term with the folder of its artifact."""
    artifact = term.get("artifact")
    return {key: value for key, value in term.items() if key != "artifact"} | (
        {"folder": artifact.folder} if artifact else {}
    )


def batch(plan: Plan, artifact: Artifact | None) -> int | None:
    """The global batch size with which a measured policy was trained; None where nothing was trained."""
    if artifact is None:
        return None
    section = getattr(plan.experiments[artifact.experiment], artifact.policy or artifact.stage)
    return getattr(getattr(section, "scratch", None) or section, "batch_size", None)


def runs(plan: Plan, home: str, measured: Measured) -> list[dict]:
    """A measurement as weighted sums, one for each training seed: [{seed, terms: [{weight, ...}], over: [...]}].

    A difference has the weights 1 and -1; a least-squares slope over x has (x - mean) / sum((x - mean)^2).
    Raises Unclear for what the plan lacks.
    """
    first = by_seed(plan, home, measured, "", measured.slope)
    parts = [("terms", 1.0, first)]
    for key, role, sign in (("minus", "terms", -1.0), ("over", "over", 1.0)):
        if other := getattr(measured, key):
            filled = {name: getattr(other, name) or getattr(measured, name) for name in TERM}
            of_other = by_seed(plan, home, Term(**filled), f"{key}.", measured.slope)
            if of_other.keys() != first.keys() and len(of_other) > 1:
                raise Unclear(f"{key}.of", f"has the seeds {listed(of_other)}, and what is measured {listed(first)}")
            shared = of_other if of_other.keys() == first.keys() else dict.fromkeys(first, *of_other.values())
            parts.append((role, sign, shared))
    result: list[dict] = []
    for seed in first:
        run: dict[str, Any] = {"seed": seed, "terms": []}
        for role, sign, seeds in parts:
            run.setdefault(role, []).extend(term | {"weight": sign * term["weight"]} for term in seeds[seed])
        result.append(run)
    return result


def listed(seeds: dict) -> str:
    """Seeds as text."""
    return ", ".join(map(str, seeds))


def by_seed(plan: Plan, home: str, term: Term, prefix: str, slope: str | None) -> dict[Any, list[dict]]:
    """Seed -> the terms of a number: one, or for a slope one for each value of the axis."""
    if term.file:
        if not term.value:
            raise Unclear(f"{prefix}value", "is missing: the dotted key of the number in the file")
        return {None: [{"weight": 1.0, "file": term.file, "value": term.value}]}
    if not term.of:
        raise Unclear(f"{prefix}of", "is missing: name an artifact, or a file")
    name, stage, policy = address(plan, home, term.of, prefix)
    seeds: dict[Any, dict[Any, dict]] = {}
    for cell in plan.cells.get(name, [name]):
        axes, parts = plan.axes.get(cell, {}), set(plan.parts(cell, stage, policy))
        changed = {axis for axis in axes.keys() - {"seed", slope} if plan.grids[plan.origin(name)][axis] & parts}
        if changed and name in plan.cells:
            raise Unclear(f"{prefix}of", f"{name} has a grid of {', '.join(sorted(changed))}: name a cell, or a slope")
        of_seed = seeds.setdefault(axes.get("seed", plan.experiments[cell].seed), {})
        of_seed[axes.get(slope or "")] = _number(plan, cell, stage, policy, term, prefix)
    return {seed: _weighted(points, slope) for seed, points in seeds.items()}


def _weighted(points: dict[Any, dict], slope: str | None) -> list[dict]:
    """The terms with their weights: 1 for a number, and those of a least-squares slope for several.

    points: value of the axis -> the number there.
    """
    if slope is None:
        return [number | {"weight": 1.0} for number in points.values()]
    if len(points) < 2 or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in points):
        raise Unclear("slope", f"{slope} is no axis of two numbers or more in the experiment's grid")
    mean = sum(points) / len(points)
    total = sum((x - mean) ** 2 for x in points)
    return [number | {"weight": (x - mean) / total} for x, number in points.items()]


def _number(plan: Plan, cell: str, stage: str, policy: str, term: Term, prefix: str) -> dict:
    """The term of one experiment: an artifact with the number's name in it, or a constant of the plan."""
    if term.depends_on:
        if term.depends_on not in STAGES:
            raise Unclear(f"{prefix}depends_on", f"there is no stage {term.depends_on}; known: {', '.join(STAGES)}")
        return {"constant": float(term.depends_on in plan.upstream(cell, stage, policy))}
    if not term.value:
        raise Unclear(f"{prefix}value", "is missing: the number's name")
    if stage in JUDGES:
        check_row(plan.experiments[cell], stage, term.value, prefix)
    return {"artifact": plan.artifact(cell, stage, policy), "value": term.value}


def check_row(experiment: Experiment, stage: str, value: str, prefix: str) -> None:
    """Raise Unclear where a judgement's table will have no such row, as far as the settings show."""
    task, _, metric = value.partition(" ")
    if not metric or " " in metric:
        raise Unclear(f"{prefix}value", f"found {value!r}; of {stage} it should be TASK METRIC")
    section = getattr(experiment, stage)
    asked = getattr(section, "tasks", None)
    if isinstance(asked, list) and stage == "evaluate":
        names = [one.task for one in asked]
        if not any(task == name or task.startswith(f"{name}_") for name in names):
            raise Unclear(f"{prefix}value", f"evaluate.tasks has no {task}; it has {', '.join(names)}")
    if stage == "compare" and task != "answers":
        raise Unclear(f"{prefix}value", f"found the task {task}; that of compare is answers")
    if stage == "lengths":
        lengths = {str(tokens) for tokens in section.tokens}
        if re.sub(r"_depth_\d+$", "", task).rpartition("_")[2] not in lengths:
            raise Unclear(f"{prefix}value", f"found the task {task}; lengths measures at {', '.join(sorted(lengths))}")


def address(plan: Plan, home: str, text: str, prefix: str) -> tuple[str, str, str]:
    """(experiment or cell, stage, policy) that the name of an artifact stands for. Raises Unclear for one that the plan
    lacks."""
    name, stage, policy = split(home, text)
    if name not in plan.experiments:
        raise Unclear(f"{prefix}of", f"there is no experiment {name}; known: {', '.join(sorted(plan.cells))}")
    if stage not in STAGES:
        raise Unclear(f"{prefix}of", f"there is no stage {stage or 'named'}; known: {', '.join(STAGES)}")
    cell = next(iter(plan.cells.get(name, [name])))
    if (stage, policy) not in plan.made(cell):
        made = ", ".join(f"{part}/{of}" if of else part for part, of in plan.made(cell))
        raise Unclear(f"{prefix}of", f"{name} makes no {stage}{f'/{policy}' if policy else ''}; it makes {made}")
    return name, stage, policy


def split(home: str, text: str) -> tuple[str, str, str]:
    """(experiment, stage, policy) in the name of an artifact: the experiment is `home` where it has none."""
    first, *rest = text.split("/")
    name, stage, policy = [*([home, first, *rest] if first in STAGES else [first, *rest]), "", ""][:3]
    return name, stage, policy


def named(layer: dict, home: str) -> Iterator[tuple[str, str]]:
    """(dotted key, experiment) of the other experiments that the claims in the settings of a file name."""
    of_all = layer.get("claims")
    for key, claim in of_all.items() if isinstance(of_all, dict) else ():
        for part in ("measured", "control") if isinstance(claim, dict) else ():
            of_part = claim.get(part)
            for inner in ("", "minus.", "over.") if isinstance(of_part, dict) else ():
                term = of_part.get(inner[:-1]) if inner else of_part
                text = term.get("of") if isinstance(term, dict) else None
                if isinstance(text, str) and (name := split(home, text)[0].partition("@")[0]) != home:
                    yield f"claims.{key}.{part}.{inner}of", name
