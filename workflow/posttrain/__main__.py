"""The command line: every stage, and the tools around them.

python -m posttrain STAGE --config results/NAME/STAGE/config.yaml ... --output results/NAME/STAGE/manifest.json
"""

import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path

from posttrain.ground import credentials, progress
from posttrain.ground.errors import INTERRUPTED, TOO_LARGE, Interrupted, TooLarge, UserError

ROLES = ("data", "base", "sft", "reward", "reference", "policy", "beside")  # of a stage's inputs


def main(argv: list[str] | None = None) -> int:
    """Run one command; a user's mistake is told in words, with exit code 2, and a stop before the end with 75."""
    arguments = parser().parse_args(argv)
    quiet_libraries(arguments.command)
    if arguments.run is run_stage:
        credentials.taken()  # a stage opens no connection and needs none
    try:
        return arguments.run(arguments) or 0
    except Interrupted as stopped:
        return told(str(stopped), INTERRUPTED)
    except TooLarge as error:
        return told(f"error: {error}", TOO_LARGE)
    except UserError as error:
        return told("\n".join(f"error: {problem}" for problem in error.problems), 2)
    except BrokenPipeError:  # `posttrain check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that cannot be written, a full disk
        if error.filename is None or error.errno is None:
            raise  # some library's own, not the file system's
        return told(f"error: {error.filename2 or error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt:
        progress.say("interrupted; the next run continues")
        return 130


def told(message: str, code: int) -> int:
    """Say how it ended, and leave it where `attempt` looks: torchrun has one exit code for all that goes wrong, and
    says so at length after it. The first of several processes to end so says it for all."""
    progress.say(message)
    if file := os.environ.get("POSTTRAIN_OUTCOME"):
        with contextlib.suppress(OSError), open(file, "x", encoding="utf-8") as outcome:
            json.dump({"code": code, "message": message}, outcome)
    return code


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = argparse.ArgumentParser(prog="posttrain", description="LLM post-training, one stage or tool at a time.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fetch = command(commands, "fetch", "bring models and data from the hub into the shared cache", run_fetch)
    prepare = command(commands, "prepare", "read, check and split the data", run_stage)
    base = command(commands, "base", "the untouched model", run_stage)
    sft = command(commands, "sft", "supervised fine-tuning", run_stage)
    reward = command(commands, "reward", "a reward model from preference pairs", run_stage)
    ppo = command(commands, "ppo", "proximal policy optimisation against a reward", run_stage)
    reference = command(commands, "reference", "log-probabilities of the pairs under the SFT policy", run_stage)
    dpo = command(commands, "dpo", "direct preference optimisation", run_stage)
    evaluate = command(commands, "evaluate", "benchmark a policy with lm-eval", run_stage)
    compare = command(commands, "compare", "a policy's own answers beside the SFT policy's", run_stage)
    longctx = command(commands, "longctx", "a longer context by rescaled positions", run_stage)
    lengths = command(commands, "lengths", "perplexity by length and position", run_stage)
    aligned = (reward, ppo, reference, dpo, compare)
    for stage in (fetch, prepare, base, sft, *aligned, longctx, lengths, evaluate):
        stage.add_argument("--config", required=True, help="the stage's own section: a file, or JSON")
        stage.add_argument("--output", type=Path, required=True, help="the manifest to write, beside the artifact")
    for stage in (prepare, base, evaluate):
        stage.add_argument("--fetched", type=Path, nargs="*", default=[], help="manifests of what fetch brought")
    for stage in (base, sft, *aligned, longctx, lengths, evaluate):
        stage.add_argument("--data", type=Path, required=True, help="manifest of the prepared data")
    for stage in (sft, *aligned):
        stage.add_argument("--base", type=Path, required=True, help="manifest of the frozen weights")
    for stage in aligned:
        stage.add_argument("--sft", type=Path, required=True, help="manifest of the SFT policy")
    for stage in (ppo, compare):
        stage.add_argument("--reward", type=Path, help="manifest of the reward model, where there is one")
    dpo.add_argument("--reference", type=Path, required=True, help="manifest of the reference log-probabilities")
    for stage in (evaluate, compare, longctx, lengths):
        stage.add_argument("--policy", type=Path, required=True, help="manifest of the policy")
    compare.add_argument("--beside", type=Path, help="manifest of the SFT policy's comparison, for all others")
    for stage in (evaluate, longctx, lengths):
        stage.add_argument("--base", type=Path, help="manifest of the base that an adapter belongs to")
    for stage in (prepare, base, sft, *aligned, longctx, lengths, evaluate):
        how_to_run(stage)
    for stage in (sft, dpo):  # launch.SHARDED
        stage.add_argument("--shard", action="store_true", help="share the weights out among the GPUs (FSDP)")
    tools(commands)
    return top


def how_to_run(stage) -> None:
    """The arguments of a stage that change nothing of what it makes: threads, limits, and what the workflow knows."""
    stage.add_argument("--threads", type=count, default=1, help="CPU threads (default 1)")
    limit = "time limit of the batch job it runs in: it saves before it and exits with 75 to be continued (0: none)"
    stage.add_argument("--minutes", type=minutes, default=0.0, help=limit)
    smaller = "smaller micro-batches than the config's; the same global batch, in another shape"
    stage.add_argument("--micro-batch-size", type=count, help=smaller)
    stage.add_argument("--code", help="fingerprint of the code that the run was planned with")
    stage.add_argument("--lineage", default="", help="digest of what it descends from, by the plan")
    keep = os.environ.get("POSTTRAIN_KEEP_GB") or "0"  # argparse reads it as it reads an argument
    stage.add_argument("--keep-gb", type=float, default=keep, help="keep and reuse earlier artifacts up to so much")


def tools(commands) -> None:
    """The commands around the stages, and their arguments."""
    report = command(commands, "report", "table, figures and page from the records", run_report)
    report.add_argument("--campaign", type=Path, required=True, help="JSON file that names the artifacts")
    report.add_argument("--output", type=Path, required=True, help="the manifest to write")
    report.add_argument("--code", help="fingerprint of the code that the run was planned with")
    report.add_argument("--lineage", default="", help="digest of what it descends from, by the plan")
    report.add_argument("--partial", action="store_true", help="render what there is; missing pieces are no error")
    summary = command(commands, "summary", "print the result table and where the report is", run_summary)
    summary.add_argument("folder", type=Path, nargs="?", default=Path("results/report"))
    check = command(commands, "check", "validate a campaign and list its stages", run_check)
    check.add_argument("campaign", type=Path, nargs="?", default=Path("config/config.yaml"))
    schema = command(commands, "schema", "write config/schema.json and the key reference", run_schema)
    schema.add_argument("--folder", type=Path, default=Path("config"))
    export = command(commands, "export", "write a policy as a model that transformers loads by itself", run_export)
    export.add_argument("policy", type=Path, help="manifest of the policy")
    export.add_argument("folder", type=Path, help="the model directory to write")
    status = command(commands, "status", "which stages are done, running or waiting", run_status)
    status.add_argument("campaign", type=Path, nargs="?", default=Path("config/config.yaml"))
    trial = command(commands, "attempt", "run a stage, and go on after an interruption", run_attempt)
    trial.add_argument("--gpus", type=int, default=0, help="GPUs that it has for itself on this machine")
    trial.add_argument("stage", nargs=argparse.REMAINDER, metavar="STAGE ...", help="a stage and its arguments")
    checks = command(commands, "doctor", "what this cluster lacks, before anything is submitted", run_doctor)
    checks.add_argument("campaign", type=Path, nargs="?", default=Path("config/config.yaml"))
    book = command(commands, "ledger", "write dvc.yaml, DVC's ledger of a campaign", run_ledger)
    book.add_argument("campaign", type=Path, nargs="?", default=Path("config/config.yaml"))
    reason = command(commands, "why", "what will be made anew and why, or how two experiments differ", run_why)
    reason.add_argument("wanted", nargs="?", default="", metavar="EXPERIMENT[/STAGE]")
    reason.add_argument("other", nargs="?", default="", metavar="EXPERIMENT", help="compare the two experiments")
    needed = command(commands, "plan", "parameters, memory, time and disk of the stages to be run", run_plan)
    needed.add_argument("wanted", nargs="?", default="config/config.yaml", metavar="CAMPAIGN | EXPERIMENT/STAGE")
    needed.add_argument("--all", action="store_true", help="every stage, not only those to be run")
    needed.add_argument("--terms", action="store_true", help="each term of each stage's memory")
    needed.add_argument("--gpu-memory-gb", type=float, metavar="N", help="refuse what is over the memory of a GPU")
    verify = command(commands, "verify", "compare every artifact's bytes with its manifest", run_verify)
    cleaner = command(commands, "clean", "list what no campaign needs, with sizes", run_clean)
    cleaner.add_argument("campaigns", type=Path, nargs="*", help="default: every campaign in config/")
    cleaner.add_argument("--delete", action="store_true", help="delete it")
    for tool in (reason, needed, verify):
        tool.add_argument(
            "--campaign", type=Path, default=Path("config/config.yaml"), help="default config/config.yaml"
        )
    command(commands, "wandb-sync", "send what the stages wrote for Weights & Biases", run_wandb_sync)


def count(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, it should be a whole number from 1")
    return int(text)


def minutes(text: str) -> float:
    """A time from 0, for argparse."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, it should be a number of minutes from 0")
    return found


def command(commands, name: str, text: str, run) -> argparse.ArgumentParser:
    """Add one command."""
    added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    added.set_defaults(run=run)
    return added


def quiet_libraries(command: str) -> None:
    """Set what libraries read when they are imported: no hub, no telemetry, no progress bars of their own."""
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


def given_section(stage: str, text: str):
    """A stage's section from the command line. Raises UserError that names every mistake in it."""
    from posttrain.config import reader
    from posttrain.config.stages import STAGES
    from posttrain.dag import campaign, checks

    values, problems = reader.given(text), []
    file = values.places[""].partition(":")[0]
    section = campaign.validated(STAGES[stage].section, values, values.places, problems)
    if section:
        problems += [f"{file}: {key}: {said}" for key, said in checks.incomplete(stage, section)]
    if problems:
        raise UserError(*problems)
    return section


def run_stage(arguments) -> None:
    """Run a stage on its own section and inputs, and publish its artifact."""
    import gc
    import importlib
    import logging
    import tempfile
    import warnings

    from posttrain.jobs import artifact
    from posttrain.training import interruption

    interruption.begin(arguments.minutes)
    output, stage = arguments.output, arguments.command
    progress.name = "/".join(output.parent.parts[-3 if stage in ("evaluate", "compare", "lengths") else -2 :])
    section = given_section(stage, arguments.config)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    gc.disable()  # a quarter of the start-up is collecting garbage that imports do not make
    inputs = {role: getattr(arguments, role, None) for role in ROLES}
    inputs = {role: path for role, path in inputs.items() if path}
    if getattr(arguments, "fetched", None):
        inputs["fetched"] = arguments.fetched

    def run(section, **given) -> dict:
        function = getattr(importlib.import_module(f"posttrain.stages.{stage}"), stage)
        gc.enable()
        if stage == "prepare":
            return function(section, **given)
        import torch

        from posttrain.training import parallel

        torch.set_num_threads(arguments.threads)
        parallel.fits, parallel.sharded = arguments.micro_batch_size, getattr(arguments, "shard", False)
        try:
            return function(section, **given)
        except torch.OutOfMemoryError as error:
            raise TooLarge(
                f"out of GPU memory: {str(error).splitlines()[0]}; lower micro_batch_size or batch_size"
            ) from None

    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_DATASETS_CACHE"] = cache  # its builder's cache must not outlive the data
        given = (arguments.code, arguments.keep_gb, arguments.lineage)
        artifact.make(stage, run, section, inputs, output, *given)
    progress.say("done")
    leave()


def leave() -> None:
    """End at once: tearing down torch and its friends takes a second and does nothing for us."""
    if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
        sys.modules["wandb"].teardown()  # also waits until all is on the disk, which `finish` does not
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_doctor(arguments) -> int:
    """Print what is missing; exit code 1 where something is."""
    from posttrain.dag import campaign
    from posttrain.tools import doctor

    credentials.taken()  # what it starts on a compute node needs none
    lines, whole = doctor.doctor(campaign.load(arguments.campaign))
    print("\n".join(lines))
    return 0 if whole else 1


def run_attempt(arguments) -> int:
    """Run a stage in a process of its own."""
    from posttrain.jobs.attempt import attempt, home

    progress.name = "/".join(home(arguments.stage).parts[1:])
    return attempt(arguments.stage, arguments.gpus)


def run_fetch(arguments) -> None:
    """Fetch what the section names."""
    from posttrain.config import reader
    from posttrain.ground.identity import canonical
    from posttrain.stages.fetch import fetch

    progress.name = "fetch"
    credentials.reveal()
    section = dict(reader.given(arguments.config))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    (arguments.output.parent / "config.yaml").write_text(canonical(section) + "\n", encoding="utf-8")
    fetch(section, arguments.output)


def run_report(arguments) -> None:
    """Render the report; `--campaign` was written when the workflow was planned."""
    from posttrain.ground.files import read_json, sha256, write_json
    from posttrain.stages.report import report

    progress.name = "report"
    campaign, folder = read_json(arguments.campaign), arguments.output.parent
    stages = [experiment["stages"] for experiment in campaign["experiments"]]
    judged = {f"{at}/manifest.json" for made in stages for stage, at in made.items() if "/" in stage}
    read = {"evaluations": {file: sha256(Path(file)) for file in sorted(judged) if Path(file).is_file()}}
    missing = report(campaign, folder, Path("results"))
    planned = [str(arguments.campaign), arguments.code or "", arguments.lineage]
    write_json(folder / "provenance.json", {"stage": "report", "params": planned, "inputs": read})
    if missing and not arguments.partial:
        raise UserError(*(f"{piece['name']}: {piece['reason']}" for piece in missing))


def run_summary(arguments) -> None:
    """Print the result table for the terminal."""
    from posttrain.reporting.records import print_table

    if not (arguments.folder / "table.md").is_file():
        raise UserError(f"{arguments.folder}: no report is there; run snakemake")
    print_table(arguments.folder / "table.md")
    print(f"report: {arguments.folder / 'index.html'}")


def run_check(arguments) -> None:
    """Say what a campaign would make."""
    from posttrain.dag import campaign

    plan = campaign.load(arguments.campaign)
    for name in plan.names:
        print(f"{name}: {plan.experiments[name].question}")
        for stage in plan.stages(name):
            print(f"  {stage:9} {plan.folder(name, stage)}")


def run_schema(arguments) -> None:
    """Write the generated documentation of the config."""
    from posttrain.tools import schema

    schema.write(arguments.folder)


def run_export(arguments) -> None:
    """Write a whole model, adapters merged."""
    from posttrain.tools import export

    export.export(arguments.policy, arguments.folder)


def run_status(arguments) -> None:
    """Print where each stage stands."""
    from posttrain.dag import campaign
    from posttrain.tools import status

    print(status.table(campaign.load(arguments.campaign)))


def run_ledger(arguments) -> None:
    """Write dvc.yaml."""
    from posttrain.dag import campaign
    from posttrain.tools import ledger

    Path("dvc.yaml").write_text(ledger.ledger(campaign.load(arguments.campaign)), encoding="utf-8")


def run_why(arguments) -> None:
    """Print what is stale, or how two experiments differ."""
    from posttrain.dag import campaign
    from posttrain.tools import why

    plan = campaign.load(arguments.campaign)
    print(why.compare(plan, arguments.wanted, arguments.other) if arguments.other else why.why(plan, arguments.wanted))


def run_plan(arguments) -> None:
    """Print what the stages to be run need; refuse those that cannot fit."""
    from posttrain.dag import campaign
    from posttrain.tools import budget

    if arguments.gpu_memory_gb is not None:
        os.environ["POSTTRAIN_DEVICE"] = "gpu"
    whole = arguments.wanted.endswith((".yaml", ".yml"))
    plan = campaign.load(arguments.wanted if whole else arguments.campaign)
    print(budget.table(plan, arguments.all, arguments.terms) if whole else budget.one(plan, arguments.wanted))
    if arguments.gpu_memory_gb is not None:
        budget.refuse_too_large(plan, arguments.gpu_memory_gb, arguments.all)


def run_verify(arguments) -> None:
    """Compare every artifact of a campaign with its manifest."""
    from posttrain.dag import campaign
    from posttrain.ground.errors import gather
    from posttrain.jobs.artifact import verify_input

    made = [Path(folder, "manifest.json") for folder in campaign.load(arguments.campaign).folders()]
    there = [manifest for manifest in made if manifest.is_file()]
    gather(verify_input, there)
    print(f"{len(there)} artifacts are what their manifests say" + f"; {len(made) - len(there)} are not made")


def run_clean(arguments) -> None:
    """Print what no campaign needs; delete it when told."""
    from posttrain.dag import campaign
    from posttrain.tools import clean

    files = arguments.campaigns or sorted(Path("config").glob("*.yaml"))
    if not files:
        raise UserError("clean: there is no campaign in config/; name those whose artifacts are to stay")
    print(f"left alone: what {', '.join(map(str, files))} need")
    print(clean.clean([campaign.load(file) for file in files], arguments.delete))


def run_wandb_sync(arguments) -> None:
    """Send offline runs; the only command that speaks to Weights & Biases."""
    from posttrain.training import tracking

    tracking.sync()


if __name__ == "__main__":
    sys.exit(main())
