"""The command line that starts a stage in one process or several, on one node or several (SLURM).

python -m posttrain.jobs.launch [--processes 4] [--nodes 2] STAGE --config ... --output ...
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from posttrain.config.stages import TRAINERS
from posttrain.training.interruption import WAIT

KEPT = ("SLURM_CONF", "SLURM_JOB_ID")  # what a process of a job must know of it to start a step
# Read by each node's shell, inside its step: the job's number is not known before. Two steps meet at other ports.
RENDEZVOUS = (
    "--rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID.$SLURM_STEP_ID "
    "--rdzv-endpoint=$SLURM_LAUNCH_NODE_IPADDR:$((15000 + (SLURM_JOB_ID * 31 + SLURM_STEP_ID) % 15000))"
)


def command(
    stage_arguments: list[str], processes: int, nodes: int = 1, python: Sequence[str] = (sys.executable,)
) -> list[str]:
    """The command line of a stage.

    stage_arguments: the stage and its flags. processes: on each node. python: how Python is started there.

    Processes of one node meet at a free port. Nodes meet at a port that follows from the numbers of SLURM's job and
    step, on the node that started the step, which must be one of them (as in a batch job).
    """
    module = ["-m", "posttrain", *stage_arguments]
    if stage_arguments[0] not in TRAINERS or processes * nodes == 1:
        return [*python, *module]
    agent = [*python, "-m", "torch.distributed.run", f"--shutdown-timeout={WAIT:.0f}"]  # to save in; else 30 s
    torchrun = [*agent, f"--nproc-per-node={processes}"]
    if nodes == 1:
        return [*torchrun, "--standalone", *module]
    # --overlap: in the job's resources, which the step that starts this one holds. One node's failure ends all.
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=1"]
    line = f'exec "${{@:1:{len(torchrun)}}}" --nnodes={nodes} {RENDEZVOUS} "${{@:{len(torchrun) + 1}}}"'
    return [*step, "bash", "-c", line, "bash", *torchrun, *module]


def outside_step(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process in a step, without what srun would read in it as options of a new step.

    So a step can take all nodes of the job, though the one that starts it runs on one of them.
    """
    kept = {key: value for key, value in environ.items() if not key.startswith(("SLURM_", "SRUN_")) or key in KEPT}
    cores = environ.get("SLURM_CPUS_PER_TASK")
    return kept | ({"SRUN_CPUS_PER_TASK": cores} if cores else {})


def processes(environ: Mapping[str, str]) -> int:
    """How many processes a node runs: one for each GPU that the job sees, one where it sees none."""
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len(visible.split(","))  # "", "-1" and "NoDevFiles" are no GPU, and one process
    return max(1, int(environ.get("SLURM_GPUS_ON_NODE") or 1))


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
    line = command(options.stage, options.processes, options.nodes)
    os.execvpe(line[0], line, outside_step(os.environ) if options.nodes > 1 else os.environ)


if __name__ == "__main__":
    main()
