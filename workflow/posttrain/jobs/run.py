"""Run one stage in this process, by its command line, and publish its artifact.

python -m posttrain STAGE --config SECTION --data MANIFEST ... --output results/NAME/STAGE/manifest.json
"""

import gc
import importlib
import logging
import os
import sys
import tempfile
import warnings
from argparse import Namespace
from pathlib import Path

from posttrain.config.settings import settings_of_argument, validated
from posttrain.config.stages import ROLES, STAGES
from posttrain.dag import artifacts
from posttrain.dag.resolution import unresolved
from posttrain.ground import progress
from posttrain.ground.errors import TooLarge, UserError
from posttrain.jobs import artifact
from posttrain.training import interruption


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
        function = getattr(importlib.import_module(f"posttrain.stages.{stage}"), stage)
        gc.enable()
        if stage == "prepare":  # it does not need torch, which takes seconds to import
            return function(section, **inputs)
        return run_with_torch(arguments, function, section, inputs)

    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_DATASETS_CACHE"] = cache  # temporary, as cached builders must not outlive the data
        planned = (arguments.code, arguments.keep_gb, arguments.lineage)
        artifact.make(stage, run, section, inputs_of(arguments), output, *planned)
    progress.say("done")
    end_process()


def run_with_torch(arguments: Namespace, function, section, inputs: dict) -> dict:
    """Call a stage's function with the threads and the micro-batches of the command line.

    Raises TooLarge where the GPU has too little memory.
    """
    import torch

    from posttrain.training import parallel

    torch.set_num_threads(arguments.threads)
    parallel.fits, parallel.sharded = arguments.micro_batch_size, getattr(arguments, "shard", False)
    try:
        return function(section, **inputs)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise TooLarge(f"out of GPU memory: {reason}; lower micro_batch_size or batch_size") from None


def name_of(output: Path, stage: str) -> str:
    """The artifact's name in the stage's output; for a manifest outside results/, its last folders."""
    if "results" in output.parts:
        return artifacts.at(output).name
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


def end_process() -> None:
    """End the process at once: the teardown of torch and its libraries takes a second and is not needed."""
    if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
        sys.modules["wandb"].teardown()  # unlike `finish`, it waits until the run is on disk
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
