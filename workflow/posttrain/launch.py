"""The command line of a stage in one process or several, on one node or several (SLURM); the only place that knows it.

python -m posttrain.launch [--processes 4] [--nodes 2] STAGE --config ... --output ...
"""

import argparse
import os
import sys

from posttrain.interruption import WAIT

SHARDED = ("sft", "dpo")  # trainers that can share weights out among processes
TRAINERS = ("base", "sft", "reward", "ppo", "dpo", "longctx")  # other stages have no work to share
# Read by each node's shell, inside its step: the job's number is not known before. Two steps meet at other ports.
MEET = (
    "--rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID.$SLURM_STEP_ID "
    "--rdzv-endpoint=$SLURM_LAUNCH_NODE_IPADDR:$((15000 + (SLURM_JOB_ID * 31 + SLURM_STEP_ID) % 15000))"
)


def command(stage_arguments: list[str], processes: int, nodes: int = 1) -> list[str]:
    """The command line of a stage. stage_arguments: the stage and its flags; processes: on each of the nodes.

    Processes of one node meet at a port that is free; nodes at one that follows from the numbers of SLURM's job and
    step, on the node that started the step, which must be one of them (as in a batch job).
    """
    module = ["-m", "posttrain", *stage_arguments]
    if stage_arguments[0] not in TRAINERS or processes * nodes == 1:
        return [sys.executable, *module]
    agent = [sys.executable, "-m", "torch.distributed.run", f"--shutdown-timeout={WAIT:.0f}"]  # to save in; else 30 s
    torchrun = [*agent, f"--nproc-per-node={processes}"]
    if nodes == 1:
        return [*torchrun, "--standalone", *module]
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    ready = f'exec "${{@:1:{len(torchrun)}}}" --nnodes={nodes} {MEET} "${{@:{len(torchrun) + 1}}}"'
    return [*step, "bash", "-c", ready, "bash", *torchrun, *module]


def processes(environ: dict[str, str]) -> int:
    """How many processes a node runs: one for each GPU that the job sees, one where it sees none."""
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len(visible.split(","))  # "", "-1" and "NoDevFiles" are no GPU, and one process
    return max(1, int(environ.get("SLURM_GPUS_ON_NODE") or 1))


def main() -> None:
    """Become the stage's command."""
    parser = argparse.ArgumentParser(prog="python -m posttrain.launch", description="Start a stage on all its devices.")
    parser.add_argument("--processes", type=int, default=processes(os.environ), help="default: one for each GPU")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the SLURM job (default 1)")
    parser.add_argument("stage", nargs=argparse.REMAINDER, help="the stage and its arguments")
    given = parser.parse_args()
    if not given.stage:
        parser.error("name a stage")
    started = command(given.stage, given.processes, given.nodes)
    os.execvp(started[0], started)


if __name__ == "__main__":
    main()
