"""Check a campaign: its config, the bytes of its artifacts, and that the report is its own.

posttrain check [CAMPAIGN]
posttrain verify
posttrain summary [FOLDER]
"""

from pathlib import Path

from posttrain.config.sections import Paper
from posttrain.dag import claims
from posttrain.dag.campaign import load
from posttrain.dag.frozen import summary as summary_of
from posttrain.dag.plan import Plan
from posttrain.ground.errors import UserError, gather
from posttrain.ground.identity import canonical, named
from posttrain.jobs.damage import verify_artifact
from posttrain.reporting.summary import last_lines, outdated
from posttrain.tools import ledger


def check(plan: Plan) -> str:
    """The stages of each experiment with their artifacts; reading the plan has validated the config."""
    lines = []
    for name in plan.names:
        lines.append(f"{name}: {plan.experiments[name].question}")
        lines += followed(plan.experiments[name].paper)
        lines += [f"  {stage:9} {plan.folder(name, stage)}" for stage in plan.stages(name)]
    return "\n".join([*lines, *filter(None, [claimed(plan), ledger.lacking(plan)])])


def followed(paper: Paper | None) -> list[str]:
    """The paper that an experiment follows, and where it deviates from it, in lines; none without a paper."""
    if paper is None:
        return []
    place = f", {paper.table}" * bool(paper.table)
    deviations = [f"  differs in {key}: {reason}" for key, reason in paper.deviations.items()]
    return [f"  follows {paper.title} ({paper.id}{place}), as of {paper.variant}", *deviations]


def claimed(plan: Plan) -> str:
    """How many claims the campaign has, and the command that rules on them; "" without claims."""
    stated = [claims.is_tested(plan, claim) for _, _, claim in claims.claims(plan)]
    larger = f", {stated.count(False)} of which need a larger scale than {plan.campaign.scale}" * (False in stated)
    return f"{len(stated)} claims{larger}: snakemake verify" if stated else ""


def verify(plan: Plan) -> str:
    """Compare every artifact with its manifest. Raises UserError with every file that differs."""
    planned = plan.artifacts()
    existing = [Path(artifact.manifest) for artifact in planned if artifact.exists]
    gather(verify_artifact, existing)
    return f"{len(existing)} artifacts match their manifests; {len(planned) - len(existing)} do not exist yet"


def summary(campaign: Path, folder: Path) -> str:
    """The last lines of a run. Raises UserError for the report of another plan than the campaign's."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no report; run snakemake")
    plan = load(campaign)
    if reason := outdated(folder, named(canonical(summary_of(plan))), plan.lineage("", "report")):
        raise UserError(f"{folder}: {reason}, or name its campaign: posttrain summary --campaign FILE")
    return last_lines(folder)
