"""The commands other than stages: each function takes the parsed arguments and prints."""

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config.stages import STAGES
from posttrain.ground import accepted, credentials, progress
from posttrain.ground.errors import UserError, gather
from posttrain.ground.files import read_json, sha256, write_json

if TYPE_CHECKING:
    from posttrain.dag.plan import Plan


def load(file: str | Path) -> "Plan":
    """The plan of a campaign. Planning is imported here, since stages and `attempt` start without it."""
    from posttrain.dag import campaign

    return campaign.load(file)


def run_fetch(arguments: Namespace) -> None:
    """Download what the section names from the hub."""
    from posttrain.config.settings import settings_of_argument
    from posttrain.ground.identity import canonical
    from posttrain.stages.fetch import fetch

    progress.name = "fetch"
    credentials.reveal()
    section = dict(settings_of_argument(arguments.config))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    (arguments.output.parent / "config.yaml").write_text(canonical(section) + "\n", encoding="utf-8")
    fetch(section, arguments.output)


def run_report(arguments: Namespace) -> None:
    """Render the report; `--campaign` was written when the workflow was planned."""
    from posttrain.stages.report import report

    progress.name = "report"
    summary, folder = read_json(arguments.campaign), arguments.output.parent
    judged = sorted(
        f"{place}/manifest.json"
        for experiment in summary["experiments"]
        for stage, place in experiment["stages"].items()
        if "/" in stage
    )
    digests = {"evaluations": {file: sha256(Path(file)) for file in judged if Path(file).is_file()}}
    left_out = read_json(arguments.left_out) if arguments.left_out else {}
    edits = {"accepted": accepted.edits([*STAGES, "report"])}
    missing = report(summary | edits, folder, Path("results"), left_out)
    params = [str(arguments.campaign), arguments.code or "", arguments.lineage]
    record = {"stage": "report", "params": params, "inputs": digests} | accepted.of_code("report")
    write_json(folder / "provenance.json", record)
    if missing and not arguments.partial:
        raise UserError(*(f"{piece['name']}: {piece['reason']}" for piece in missing))


def run_summary(arguments: Namespace) -> None:
    """Print the last lines of a run. Raises UserError for the report of another plan than the campaign's."""
    from posttrain.dag.frozen import summary
    from posttrain.ground.identity import canonical, named
    from posttrain.reporting.summary import last_lines, outdated

    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder}: there is no report; run snakemake")
    plan = load(arguments.campaign)
    if reason := outdated(arguments.folder, named(canonical(summary(plan))), plan.lineage("", "report")):
        raise UserError(f"{arguments.folder}: {reason}, or name its campaign: posttrain summary --campaign FILE")
    print(last_lines(arguments.folder))


def run_check(arguments: Namespace) -> None:
    """Validate a campaign, and list the stages of each experiment with their artifacts."""
    plan = load(arguments.campaign)
    for name in plan.names:
        print(f"{name}: {plan.experiments[name].question}")
        for stage in plan.stages(name):
            print(f"  {stage:9} {plan.folder(name, stage)}")


def run_schema(arguments: Namespace) -> None:
    """Write the generated documentation of the config."""
    from posttrain.tools import schema

    schema.write(arguments.folder)


def run_export(arguments: Namespace) -> None:
    """Write a policy as a whole model with merged adapters."""
    from posttrain.tools import export

    export.export(arguments.policy, arguments.folder)


def run_status(arguments: Namespace) -> None:
    """Print the state of each stage."""
    from posttrain.tools import status

    print(status.table(load(arguments.campaign)))


def run_doctor(arguments: Namespace) -> int:
    """Print the checks of the cluster; exit code 1 where one fails."""
    from posttrain.tools import doctor

    credentials.taken()  # the probe on a compute node needs no tokens
    lines, whole = doctor.doctor(load(arguments.campaign))
    print("\n".join(lines))
    return 0 if whole else 1


def run_ledger(arguments: Namespace) -> None:
    """Write dvc.yaml."""
    from posttrain.tools import ledger

    Path("dvc.yaml").write_text(ledger.ledger(load(arguments.campaign)), encoding="utf-8")


def run_why(arguments: Namespace) -> None:
    """Print stale artifacts with the reasons, or how two experiments differ."""
    from posttrain.tools import why

    plan = load(arguments.campaign)
    print(why.compare(plan, arguments.wanted, arguments.other) if arguments.other else why.why(plan, arguments.wanted))


def run_accept(arguments: Namespace) -> None:
    """Record that an edit of some stages' code changes no result."""
    from posttrain.tools.accept import accept

    plan = load(arguments.campaign)
    print(accept(plan, arguments.stages, arguments.because, arguments.former, arguments.same))


def run_plan(arguments: Namespace) -> None:
    """Print the needs of the stages that will run. Raises UserError for those that do not fit."""
    from posttrain.tools import budget

    if arguments.gpu_memory_gb is not None:
        os.environ["POSTTRAIN_DEVICE"] = "gpu"
    whole = arguments.wanted.endswith((".yaml", ".yml"))
    plan = load(arguments.wanted if whole else arguments.campaign)
    print(budget.table(plan, arguments.all, arguments.terms) if whole else budget.one(plan, arguments.wanted))
    if arguments.gpu_memory_gb is not None:
        budget.refuse_too_large(plan, arguments.gpu_memory_gb, arguments.all)


def run_verify(arguments: Namespace) -> None:
    """Compare every artifact of a campaign with its manifest."""
    from posttrain.jobs.artifact import verify_input

    planned = load(arguments.campaign).artifacts()
    existing = [Path(artifact.manifest) for artifact in planned if artifact.exists]
    gather(verify_input, existing)
    absent = len(planned) - len(existing)
    print(f"{len(existing)} artifacts match their manifests; {absent} do not exist yet")


def run_clean(arguments: Namespace) -> None:
    """Print what no campaign needs; delete it with `--delete`."""
    from posttrain.tools import clean

    files = arguments.campaigns or sorted(Path("config").glob("*.yaml"))
    if not files:
        raise UserError("clean: there is no campaign in config/; name the campaigns whose artifacts to keep")
    print(f"kept: the artifacts of {', '.join(map(str, files))}")
    print(clean.clean([load(file) for file in files], arguments.delete))


def run_wandb_sync(arguments: Namespace) -> None:
    """Upload offline runs; the only command that connects to Weights & Biases."""
    from posttrain.training import tracking

    tracking.sync()
