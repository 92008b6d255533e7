"""The command line that starts a stage in one process or several, on one node or several, by the settings of its site.

`cluster.sites` writes the site's settings into the environment of every job of `snakemake --profile slurm`.

python -m posttrain.jobs.launch [--processes 4] [--nodes 2] STAGE --config ... --output ...
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain.config.stages import TRAINERS
from posttrain.ground.errors import UserError
from posttrain.jobs.slurm import SITE
from posttrain.training.interruption import WAIT

KEPT = ("SLURM_CONF", "SLURM_JOB_ID")  # variables that a process of a job needs to start a step
# Expanded by each node's shell inside its step, which has the step's number. Each step has its own port.
RENDEZVOUS = (
    "--rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID.$SLURM_STEP_ID "
    "--rdzv-endpoint=$SLURM_LAUNCH_NODE_IPADDR:$((15000 + (SLURM_JOB_ID * 31 + SLURM_STEP_ID) % 15000))"
)


def command(stage: str, processes: int, nodes: int = 1, python: Sequence[str] = (sys.executable,)) -> list[str]:
    """The command line that starts a stage, up to the stage's name.

    processes: on each node. python: the command that starts Python there.

    Processes of one node rendezvous at a free port. Nodes rendezvous at a port computed from the numbers of SLURM's job
    and step, on the node that started the step, which must be one of them (as in a batch job).
    """
    module = ["-m", "posttrain"]
    if stage not in TRAINERS or processes * nodes == 1:
        return [*python, *module]
    agent = [*python, "-m", "torch.distributed.run", f"--shutdown-timeout={WAIT:.0f}"]  # for saving; default 30 s
    torchrun = [*agent, f"--nproc-per-node={processes}"]
    if nodes == 1:
        return [*torchrun, "--standalone", *module]
    # --overlap: the step shares the resources of the step that starts it. One node's failure ends all.
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=1"]
    line = f'exec "${{@:1:{len(torchrun)}}}" --nnodes={nodes} {RENDEZVOUS} "${{@:{len(torchrun) + 1}}}"'
    return [*step, "bash", "-c", line, "bash", *torchrun, *module]


def outside_step(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that srun would read as options of a new step.

    A new step can then use all nodes of the job, although the step that starts it runs on one of them.
    """
    outside = {key: value for key, value in environ.items() if not key.startswith(("SLURM_", "SRUN_")) or key in KEPT}
    cores = environ.get("SLURM_CPUS_PER_TASK")
    return outside | ({"SRUN_CPUS_PER_TASK": cores} if cores else {})


def processes(environ: Mapping[str, str]) -> int:
    """Number of processes on a node: one for each GPU of the job, and one without GPUs."""
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len(visible.split(","))  # "", "-1" and "NoDevFiles" mean no GPU: one process
    return max(1, int(environ.get("SLURM_GPUS_ON_NODE") or 1))


def site() -> dict:
    """The site's settings (`cluster.sites.Site`); empty outside of such a job."""
    return json.loads(os.environ.get(SITE, "{}"))


def request(stage: str) -> dict:
    """The site's own request for a stage (`cluster.sites.Request`); empty where it has none."""
    return site().get("stages", {}).get(stage, {})


def scratch(text: str | None) -> Path | None:
    """The site's folder for checkpoints, with ~ and variables filled in. Raises UserError where it is not absolute."""
    if text is None:
        return None
    folder = os.path.expandvars(os.path.expanduser(text))
    if "$" in folder or not os.path.isabs(folder):
        raise UserError(f"{text!r} is {folder!r}: give a folder from / on, with variables that are set")
    return Path(folder)


def python(container: str | None, folder: str | None) -> list[str]:
    """The command that starts Python on a node, in the site's container where it has one. folder: scratch to bind."""
    if container is None:
        return [sys.executable]
    return ["apptainer", "exec", "--nv", *(["--bind", str(scratch(folder))] if folder else []), container, "python"]


def main() -> None:
    """Replace this process by the stage's command."""
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.jobs.launch", description="Start a stage on all its devices."
    )
    parser.add_argument("--processes", type=int, default=processes(os.environ), help="default: one for each GPU")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the SLURM job (default 1)")
    parser.add_argument("stage", nargs=argparse.REMAINDER, help="the stage and its arguments")
    options = parser.parse_args()
    if not options.stage:
        parser.error("name a stage")
    line = [*command(options.stage[0], options.processes, options.nodes), *options.stage]
    os.execvpe(line[0], line, outside_step(os.environ) if options.nodes > 1 else os.environ)


if __name__ == "__main__":
    main()
