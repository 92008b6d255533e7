"""The command line: every stage of the table, and the tools around them.

python -m posttrain STAGE --config results/NAME/STAGE/config.yaml ... --output results/NAME/STAGE/manifest.json
"""

import argparse
import contextlib
import json
import os
import pkgutil
import sys
from functools import partial
from pathlib import Path

from posttrain.config.stages import ROLES, STAGES
from posttrain.ground import credentials, progress
from posttrain.ground.arguments import amount, count, whole
from posttrain.ground.code import refuse_other_package
from posttrain.ground.errors import INTERRUPTED, TOO_LARGE, Interrupted, TooLarge, UserError

CAMPAIGN = "config/config.yaml"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 2 after a user's mistake (printed without a traceback), 75 after an
    interruption that the next run continues, 77 where a GPU has too little memory."""
    progress.print_any_text()
    arguments = parser().parse_args(argv)
    quiet_libraries(arguments.command)
    try:
        refuse_other_package(Path("workflow"))
        return run(arguments)
    except Interrupted as interruption:
        return end(str(interruption), INTERRUPTED)
    except TooLarge as error:
        return end(f"error: {error}", TOO_LARGE)
    except UserError as error:
        return end("\n".join(f"error: {problem}" for problem in error.problems), 2)
    except BrokenPipeError:  # `posttrain check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that cannot be written, a full disk
        if error.filename is None or error.errno is None:
            raise  # not an error of the file system
        return end(f"error: {error.filename2 or error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt:
        progress.say("interrupted; the next run continues")
        return 130


def end(message: str, code: int) -> int:
    """Print how the command ended, and write it to the file that `attempt` reads, as torchrun hides exit codes.

    Of several processes, the first to end writes the file.
    """
    progress.say(message)
    if file := os.environ.get("POSTTRAIN_OUTCOME"):
        with contextlib.suppress(OSError), open(file, "x", encoding="utf-8") as outcome:
            json.dump({"code": code, "message": message}, outcome)
    return code


def run(arguments: argparse.Namespace) -> int:
    """Run a command's function, which is imported here, so that a command starts without what the others need.

    A stage's function takes all arguments; that of another command takes its options by name, with the plan of the
    campaign where it has the option `plan`, and returns the text to print or an exit code.
    """
    options = vars(arguments)
    command, function = options["command"], pkgutil.resolve_name(f"posttrain.{options['run']}")
    if command in STAGES:
        credentials.taken()  # a stage opens no connection and needs none
        return function(arguments) or 0
    if "plan" in options:
        from posttrain.dag import campaign

        options["plan"] = campaign.load(options["plan"])
    result = function(**{name: value for name, value in options.items() if name not in ("command", "run")})
    if isinstance(result, str):
        print(result)
        return 0
    return result or 0


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = argparse.ArgumentParser(prog="posttrain", description="LLM post-training, one stage or tool at a time.")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    stage_commands(subparsers)
    workflow_commands(subparsers)
    campaign_commands(subparsers)
    result_commands(subparsers)
    reviewer_commands(subparsers)
    return top


def stage_commands(subparsers) -> None:
    """A command for each stage of the table, and `fetch`."""
    fetch = command(
        subparsers, "fetch", "bring models and data from the hub into the shared cache", "tools.shapes:run_fetch"
    )
    configured(fetch, required=False)
    shapes = f"bring a campaign's config.json and headers alone, for check and plan (default {CAMPAIGN})"
    fetch.add_argument("--shapes", nargs="?", const=CAMPAIGN, metavar="CAMPAIGN", help=shapes)
    for name, stage in STAGES.items():
        added = command(subparsers, name, stage.help, "jobs.artifact:run_stage")
        configured(added)
        if stage.fetches:
            added.add_argument("--fetched", type=Path, nargs="*", default=[], help="manifests of what fetch brought")
        for role in stage.reads:
            needed = role not in stage.optional
            added.add_argument(f"--{role}", type=Path, required=needed, help=f"manifest of {ROLES[role]}")
        execution(added)
        if stage.shards:
            added.add_argument("--shard", action="store_true", help="share the weights out among the GPUs (FSDP)")


def configured(stage: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the arguments of every stage: its settings, and the manifest that it writes."""
    stage.add_argument("--config", required=required, help="the stage's section: a file, or JSON")
    stage.add_argument("--output", type=Path, required=required, help="the manifest to write, beside the artifact")


def execution(stage: argparse.ArgumentParser) -> None:
    """Add the arguments that do not change a stage's result: threads, limits, and what the workflow planned."""
    stage.add_argument("--threads", type=count, default=1, help="CPU threads (default 1)")
    limit = "time limit of the batch job; the stage saves a checkpoint before it and exits with 75 (0: no limit)"
    stage.add_argument("--minutes", type=amount, default=0.0, help=limit)
    smaller = "smaller micro-batches, or requests at once, than the config's; the result stays the same"
    stage.add_argument("--micro-batch-size", type=count, help=smaller)
    planned(stage)
    states = os.environ.get("POSTTRAIN_SPOTCHECKS") or "0"
    stage.add_argument("--spotchecks", type=int, default=states, help="places at which a training's state is kept")
    keep = os.environ.get("POSTTRAIN_KEEP_GB") or "0"  # a string, which argparse converts as it does an argument
    stage.add_argument("--keep-gb", type=float, default=keep, help="GB of replaced artifacts to keep and reuse")


def planned(stage: argparse.ArgumentParser) -> None:
    """Add the arguments with which the workflow identifies what it planned."""
    stage.add_argument("--code", help="fingerprint of the code that the run was planned with")
    stage.add_argument("--lineage", default="", help="digest of everything that the artifact depends on")


def workflow_commands(subparsers) -> None:
    """The commands that the workflow and its jobs call."""
    attempt = command(subparsers, "attempt", "run a stage, and continue after an interruption", "jobs.attempt:attempt")
    attempt.add_argument("--gpus", type=int, default=0, help="GPUs reserved for the stage on this machine")
    rows = "most rows in memory at once, as planned for a batch size `auto` (0: as the settings say)"
    attempt.add_argument("--batch-size", type=int, default=0, help=rows)
    attempt.add_argument("arguments", nargs=argparse.REMAINDER, metavar="STAGE ...", help="a stage and its arguments")
    report = command(subparsers, "report", "table, figures and page from the records", "jobs.report:run_report")
    report.add_argument("--campaign", type=Path, required=True, help="JSON file that names the artifacts")
    report.add_argument("--output", type=Path, required=True, help="the manifest to write")
    planned(report)
    report.add_argument("--partial", action="store_true", help="render what exists; missing artifacts are no error")
    claimed = "render what the claims need, and what else exists"
    report.add_argument("--claimed", action="store_true", help=claimed)
    report.add_argument("--left-out", type=Path, help="JSON file: artifacts to leave out, each with the reason")


def campaign_commands(subparsers) -> None:
    """The commands that a person calls."""
    toy = command(subparsers, "toy", "write a recipe at small size, with random models and rows", "tools.toy:toy")
    toy.add_argument("file", type=Path, metavar="CAMPAIGN")
    toy.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    for name, text, function in (
        ("check", "validate a campaign and list its stages", "tools.check:check"),
        ("status", "list which stages are done, running or waiting", "tools.status:table"),
        ("doctor", "check that the cluster has what the campaign needs", "tools.doctor:doctor"),
        ("ledger", "write dvc.yaml, DVC's ledger of a campaign", "tools.ledger:write"),
    ):
        command(subparsers, name, text, function).add_argument("plan", nargs="?", default=CAMPAIGN, metavar="campaign")
    why = command(subparsers, "why", "list what will be rerun and why, or how two experiments differ", "tools.why:why")
    why.add_argument("wanted", nargs="?", default="", metavar="EXPERIMENT[/STAGE]")
    why.add_argument("other", nargs="?", default="", metavar="EXPERIMENT", help="compare the two experiments")
    accept = command(
        subparsers, "accept", "keep artifacts after a code edit that changes no result", "tools.accept:accept"
    )
    accept.add_argument("stages", nargs="*", metavar="STAGE", help="default: all stages whose code changed")
    accept.add_argument("--because", required=True, help="why the results do not change, in one line")
    accept.add_argument("--from", dest="former", default="", metavar="FINGERPRINT", help="the code that it counts as")
    same = "two artifacts of the stage, from the former and from the present code; accept only if their bytes are equal"
    accept.add_argument("--same", type=Path, nargs=2, metavar="FOLDER", help=same)
    plan = command(
        subparsers, "plan", "estimate parameters, memory, time and disk of the stages", "tools.budget:budget"
    )
    plan.add_argument("wanted", nargs="?", default=CAMPAIGN, metavar="CAMPAIGN | EXPERIMENT/STAGE")
    plan.add_argument("--all", dest="every", action="store_true", help="every stage, not only those that will run")
    plan.add_argument("--terms", action="store_true", help="list the terms of each stage's memory")
    plan.add_argument("--gpu-memory-gb", type=float, metavar="N", help="fail where a stage needs more memory per GPU")
    verify = command(subparsers, "verify", "compare every artifact's bytes with its manifest", "tools.check:verify")
    for tool in (why, accept, verify):
        tool.add_argument("--campaign", dest="plan", default=CAMPAIGN, metavar="CAMPAIGN", help=f"default {CAMPAIGN}")
    plan.add_argument("--campaign", default=CAMPAIGN, help=f"default {CAMPAIGN}")
    clean = command(subparsers, "clean", "list what no campaign needs, with sizes", "tools.clean:clean_campaigns")
    clean.add_argument("campaigns", type=Path, nargs="*", help="default: those in config/, and those that ran here")
    clean.add_argument("--delete", action="store_true", help="delete it")
    schema = command(subparsers, "schema", "write config/schema.json and the key reference", "tools.schema:write")
    schema.add_argument("--folder", type=Path, default=Path("config"))
    command(subparsers, "wandb-sync", "upload the stages' runs to Weights & Biases", "training.tracking:sync")


def result_commands(subparsers) -> None:
    """The commands that read results."""
    verdict = command(
        subparsers, "verdict", "print the rulings on claims; fails where one fails", "tools.verdict:verdict"
    )
    verdict.add_argument("file", type=Path, nargs="?", default=Path("results/report/verdict.json"))
    record = "write a record of the artifacts, so that a later failure names the first stage that departs from it"
    verdict.add_argument("--record", type=Path, metavar="FILE", help=record)
    summary = command(subparsers, "summary", "print headline figures and the report's path", "tools.check:summary")
    summary.add_argument("folder", type=Path, nargs="?", default=Path("results/report"))
    summary.add_argument("--campaign", default=CAMPAIGN, help=f"default {CAMPAIGN}")
    explain = command(
        subparsers, "explain", "trace a number back to its questions, weights, data and jobs", "tools.explain:explain"
    )
    explain.add_argument("place", metavar="ARTIFACT", help="as tiny/evaluate/sft")
    explain.add_argument(
        "number", nargs="?", metavar="NUMBER", help="as 'world exact_match'; default: all of its numbers"
    )
    diff = command(subparsers, "diff", "compare two runs, and name the step at which they part", "tools.diff:diff")
    for side in ("one", "other"):
        diff.add_argument(side, metavar=side.upper(), help="an experiment, an artifact, or a folder of results")
    export = command(
        subparsers, "export", "write a policy as a whole model that transformers can load", "tools.export:export"
    )
    export.add_argument("policy", type=Path, help="manifest of the policy")
    export.add_argument("folder", type=Path, help="the model directory to write")
    types = ("float32", "bfloat16")
    export.add_argument("--dtype", choices=types, help="type of the weights; default: that of its frozen weights")


def reviewer_commands(subparsers) -> None:
    """The commands that check a run in part, and hand it on."""
    checked = "replay steps of a training, or ask questions of an evaluation again, and compare with the record"
    spotcheck = command(subparsers, "spotcheck", checked, "tools.spotcheck:spotcheck")
    spotcheck.add_argument("place", metavar="ARTIFACT", help="as tiny/sft or tiny/evaluate/sft")
    numbers = "places of the training to replay, from 1; 0: its beginning (default: one, by --seed)"
    spotcheck.add_argument("--place", dest="numbers", type=whole, nargs="+", default=[], metavar="N", help=numbers)
    asked = "questions to ask again (default 50)"
    spotcheck.add_argument("--questions", type=count, default=50, metavar="N", help=asked)
    spotcheck.add_argument("--seed", type=whole, metavar="N", help="of the draw (default: another one each time)")
    bundle = command(subparsers, "bundle", "pack a campaign for a reviewer, with checksums", "tools.bundle:bundle")
    bundle.add_argument("campaign", nargs="?", default=CAMPAIGN, help=f"default {CAMPAIGN}")
    bundle.add_argument("--output", type=Path, default=Path("results/bundle.zip"), help="default results/bundle.zip")
    large = "size of a file of weights beyond which it is named by its digest alone (default 5)"
    megabytes = partial(amount, unit="megabytes")
    bundle.add_argument("--largest-mb", type=megabytes, default=5.0, metavar="N", help=large)
    bundle.add_argument("--partial", action="store_true", help="bundle what there is; missing artifacts are named")
    bundle.add_argument("--named", action="store_true", help="leave names of people, machines and folders in it")
    check = "check a bundle: checksums, manifests, provenance and required fields"
    verify = command(subparsers, "verify-bundle", check, "bundle.verify_bundle:verify_bundle")
    verify.add_argument("file", type=Path, metavar="FILE", help="the .zip file, or the folder where it was unpacked")


def command(subparsers, name: str, text: str, function: str) -> argparse.ArgumentParser:
    """Add one command. function: its place in the package, MODULE:NAME."""
    added = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    added.set_defaults(run=function)
    return added


def quiet_libraries(command: str) -> None:
    """Set the environment variables that libraries read at import: no hub, no telemetry, no progress bars, and threads
    that wait for each other a tenth of a millisecond before they sleep.

    By OpenMP's default they wait for milliseconds at full load, which is 7 % faster on two idle cores; on two that
    other processes use, training took four times as long.
    """
    if command != "fetch":
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    os.environ.update(
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TRANSFORMERS_VERBOSITY="error",
        TOKENIZERS_PARALLELISM="false",
        DISABLE_MULTIPROC="1",
        TQDM_DISABLE="1",
        BITSANDBYTES_NOWELCOME="1",
    )
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


if __name__ == "__main__":
    sys.exit(main())
