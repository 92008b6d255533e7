"""Run a stage by its command line, and publish its artifact, complete or not at all, with its manifest and provenance.

python -m posttrain STAGE --config SECTION --data MANIFEST ... --output results/NAME/STAGE/manifest.json
"""

import datetime
import gc
import importlib
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from posttrain.config.mistakes import one_of, validated
from posttrain.config.sections import Base, Optimisation, Prepare, Section, Watched, slice_of
from posttrain.config.settings import settings_of_argument
from posttrain.config.sources import own_files
from posttrain.config.stages import ROLES, STAGES
from posttrain.dag.artifacts import at, flat
from posttrain.ground import accepted, progress
from posttrain.ground.errors import TooLarge, UserError
from posttrain.ground.files import manifest_of, read_json, sha256, verify, write_json
from posttrain.ground.identity import canonical, identity
from posttrain.ground.progress import say, spent
from posttrain.jobs import compute, damage, failure, kept, provenance
from posttrain.jobs.publishing import publish, refuse_foreign_folders
from posttrain.reporting import card
from posttrain.training import interruption, spotchecks, tracking
from posttrain.training.epochs import with_steps

# Files that the manifest does not list: they have times, hosts and settings, which may differ between equal artifacts.
BESIDE = ("config.yaml", "provenance.json", "lm_eval.json", spotchecks.FOLDER)

# Thresholds of garbage collection for `prepare`: its rows form no cycles, and by Python's own thresholds to search them
# takes a tenth of its time.
RARELY = (50_000, 20, 20)


def run_stage(arguments: Namespace) -> None:
    """Run a stage by its command line (`__main__.stage_commands`), publish its artifact, and end the process."""
    interruption.listen(arguments.minutes)
    output, stage = arguments.output, arguments.command
    progress.name = name_of(output, stage)
    section = section_of(stage, arguments.config)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    gc.disable()  # during imports, garbage collection would take a quarter of the start-up

    def run(section, **inputs) -> dict:
        if stage != "prepare":  # it does not need torch, which takes seconds to import
            import_libraries()
        function = getattr(importlib.import_module(f"posttrain.stages.{stage}"), stage)
        gc.freeze()
        gc.enable()
        if stage == "prepare":
            gc.set_threshold(*RARELY)
            return function(section, **inputs, processes=arguments.threads)
        return run_with_torch(arguments, function, section, inputs)

    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_DATASETS_CACHE"] = cache  # temporary, as cached builders must not outlive the data
        planned = (arguments.code, arguments.keep_gb, arguments.lineage)
        with compute.by_hand(output, stage):
            make(stage, run, section, inputs_of(arguments), output, *planned)
    say("done")
    end_process()


def import_libraries() -> None:
    """Import what every stage that loads a model needs.

    bitsandbytes marks its reference functions for compilation when it is imported, which would import torch's compiler
    for a second. They replace kernels that a device lacks, and are run as they are.
    """
    import torch

    torch.compiler.set_default_backend("eager")
    importlib.import_module("peft")  # with transformers and bitsandbytes


def run_with_torch(arguments: Namespace, function, section, inputs: dict) -> dict:
    """Call a stage's function with the threads and the micro-batches of the command line.

    Raises TooLarge where the GPU has too little memory.
    """
    import torch

    from posttrain.training import parallel

    torch.set_num_threads(arguments.threads)
    parallel.fits, parallel.sharded = arguments.micro_batch_size, getattr(arguments, "shard", False)
    spotchecks.wanted = getattr(arguments, "spotchecks", 0)
    try:
        return function(section, **inputs)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise TooLarge(f"out of GPU memory: {reason}; lower micro_batch_size or batch_size") from None
    finally:
        compute.note(**provenance.of_gpu())


def name_of(output: Path, stage: str) -> str:
    """The artifact's name in the stage's output; for a manifest outside results/, its last folders."""
    if "results" in output.parts:
        return at(output).name
    return "/".join(output.parent.parts[-3 if STAGES[stage].makes == "judgement" else -2 :])


def section_of(stage: str, text: str):
    """A stage's section from the command line. Raises UserError with every mistake in it."""
    values = settings_of_argument(text)
    problems: list[str] = []
    file = values.places[""].partition(":")[0]
    section = validated(STAGES[stage].section, values, values.places, problems)
    if section:
        problems += [f"{file}: {key}: {problem}" for key, problem in unresolved(stage, section)]
    if problems:
        raise UserError(*problems)
    return section


def inputs_of(arguments: Namespace) -> dict[str, Path | list[Path]]:
    """Role -> manifest, for the inputs on the command line."""
    inputs = {role: getattr(arguments, role, None) for role in (*ROLES, "fetched")}
    return {role: files for role, files in inputs.items() if files}


def unresolved(stage: str, section: Section) -> Iterator[tuple[str, str]]:
    """The keys that the workflow fills in and a hand-written section lacks."""
    where = stage
    if isinstance(section, Base):
        yield from one_of(stage, section, "path", "hub", "scratch")
        if section.scratch is None:
            return
        where, section = f"{stage}.scratch", section.scratch
    keys = ["seed", "max_length"] if isinstance(section, Optimisation) else []
    keys += ["tokenizer", "max_tokens"] if isinstance(section, Prepare) else []
    for key in keys:
        if key in type(section).model_fields and getattr(section, key) is None:
            yield f"{where}.{key}", "missing; the workflow writes it"


def make(
    stage: str,
    run: Callable,
    section,
    inputs: dict[str, Path | list[Path]],
    output: Path,
    planned: str | None = None,
    keep_gb: float = 0.0,
    lineage: str = "",
) -> None:
    """Run a stage and publish its artifact in the folder of `output`, the manifest.

    run(section, **inputs, work, checkpoints) writes `model/` or `data/` into the folder `work` and returns metrics.
    The inputs are verified first. Files are published by rename, the manifest last; then the checkpoints are deleted.
    Where `keep_gb` is not 0, a kept artifact of the same identity is used instead of running the stage.
    planned: fingerprint of the code at planning. lineage: digest of everything upstream, by the plan.
    Raises UserError for a damaged input, and for code that was edited after planning.
    """
    damage.verify_inputs(inputs)
    home = output.parent
    refuse_foreign_folders(output)
    planned = planned_with(stage, planned)
    slice, read = slice_of(section), digests(inputs | {"files": local_files(stage, section)})
    name = identity(stage, slice, planned, read)
    compute.note(identity=name)
    if os.environ.get("WANDB_MODE", "disabled") == "offline":
        tracking.describe(home.absolute().parts[-2], stage, name)
    work, checkpoints = home / f".making-{name}", home / "checkpoints" / name
    made_from = {"stage": stage, "params": [canonical(slice), planned, lineage], "inputs": read}
    if os.environ.get("RANK", "0") != "0":  # the first of several processes writes for all
        return run_beside(run, section, inputs, checkpoints)
    with interruption.alone(home / f".lock-{name}") as waited:
        if waited and is_made(name, output):
            rank_0_decides(False)
            compute.note(reused=True)
            return say("another process has made it meanwhile")
        shutil.rmtree(work, ignore_errors=True)
        if rank_0_decides(not (keep_gb and take_kept(name, work, made_from))):
            make_anew(name, run, section, inputs, work, checkpoints, made_from)
        parts = publish(work, home)
        shutil.rmtree(checkpoints, ignore_errors=True)
        if keep_gb:
            kept.keep(name, home, parts, keep_gb)


def planned_with(stage: str, planned: str | None) -> str:
    """The fingerprint of the code that a run was planned with; without one, that of the present code.

    Raises UserError where the code was edited after planning.
    """
    standing = accepted.standing(stage)
    if planned and planned.partition("+")[0] != standing:
        raise UserError(f"{stage}: its code was edited after this run was planned; run snakemake again")
    return planned or standing


def run_beside(run: Callable, section, inputs: dict, checkpoints: Path) -> None:
    """Run a stage in a process other than rank 0, which writes no artifact, if rank 0 runs it too."""
    if rank_0_decides():
        with tempfile.TemporaryDirectory() as unused:
            run(with_steps(section, inputs.get("data")), **inputs, work=Path(unused), checkpoints=checkpoints)


def rank_0_decides(decision: bool = False) -> bool:
    """The decision of rank 0 in every process, so that no process skips a collective call for which the others wait."""
    if "RANK" not in os.environ:
        return decision
    from posttrain.training import parallel

    return parallel.largest(float(decision), parallel.device()) > 0


def take_kept(name: str, work: Path, made_from: dict) -> bool:
    """Fill the folder `work` with a kept artifact of this identity, and record the present paths of its inputs.

    Returns whether there was one.
    """
    if (record := kept.take(name, provenance.versions(), work)) is None:
        return False
    say(f"reusing an earlier artifact of the same settings, inputs and code ({name})")
    compute.note(reused=True)
    write_json(work / "provenance.json", record | made_from)
    return True


def is_made(name: str, output: Path) -> bool:
    """Whether the artifact of an identity is complete at `output`, its manifest."""
    try:
        verify(output)
        return read_json(output.parent / "provenance.json").get("identity") == name
    except UserError:
        return False


def make_anew(name: str, run: Callable, section, inputs: dict, work: Path, checkpoints: Path, made_from: dict) -> None:
    """Run the stage, and write its output, metrics, settings, manifest and provenance into the folder `work`."""
    work.mkdir(parents=True)
    started, clock = datetime.datetime.now(datetime.UTC), time.monotonic() - spent(checkpoints)
    keys_read: set[str] = set()
    with failure.remembered(checkpoints):
        watched = with_steps(Watched(section, keys_read), inputs.get("data"))
        metrics = run(watched, **inputs, work=work, checkpoints=checkpoints)
    write_json(work / "metrics.json", metrics)
    card.write_published(work / "model", made_from["stage"], slice_of(section), inputs, metrics)
    (work / "config.yaml").write_text(made_from["params"][0] + "\n", encoding="utf-8")
    spotchecks.publish(checkpoints, work)
    parts = sorted(part.name for part in work.iterdir() if not part.name.startswith("."))
    write_json(work / "manifest.json", manifest_of(work, [part for part in parts if part not in BESIDE]))
    cost = provenance.of_run(name, started, time.monotonic() - clock)
    record = cost | provenance.of_section(section, keys_read) | {"disk_mb": provenance.disk_of(work, checkpoints)}
    record |= made_from | accepted.of_code(made_from["stage"])
    beside = (*BESIDE, spotchecks.MANIFEST)
    record["beside"] = {name: sha256(work / name) for name in beside if (work / name).is_file()}
    if warning := kept.differs(name, record["shape"], sha256(work / "manifest.json")):
        say(f"warning: {warning}")
        record["warning"] = warning
    write_json(work / "provenance.json", record)


def digests(inputs: dict[str, Path | list[Path]]) -> dict[str, dict[str, str]]:
    """Role -> file -> sha256, of all files that a stage reads."""
    by_role = {role: flat({role: files}) for role, files in inputs.items()}
    return {role: {str(file): sha256(file) for file in files} for role, files in by_role.items() if files}


def local_files(stage: str, section) -> list[Path]:
    """The user's own existing files that a stage reads. The stage itself reports missing ones."""
    return [file for _, file in own_files(stage, section) if file.is_file()]


def end_process() -> None:
    """End the process at once: the teardown of torch and its libraries takes a second and is not needed."""
    if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
        sys.modules["wandb"].teardown()  # unlike `finish`, it waits until the run is on disk
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
