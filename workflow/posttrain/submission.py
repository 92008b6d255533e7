"""Jobs are submitted when SLURM answers: while its controller is away they wait, as those that run already do.

snakemake --profile slurm
"""

import threading

from posttrain import slurm
from posttrain.progress import say


def wait() -> None:
    """Let the executor plugin (2.8.0) submit a job only once SLURM answers. It asks sbatch once, which gives up after
    seconds, and takes the job for failed, so that all that follows from it is not done either."""
    import snakemake_executor_plugin_slurm as plugin

    submit, shutdown = plugin.Executor.run_job, plugin.Executor.shutdown
    over = threading.Event()

    def submitted(self, job):
        if answered(over):
            submit(self, job)

    def ended(self):  # which waits for what still is to be submitted, after Ctrl-C too
        over.set()
        shutdown(self)

    plugin.Executor.run_job, plugin.Executor.shutdown = submitted, ended


def answered(over: threading.Event) -> bool:
    """Wait until SLURM answers; False where it is over before."""
    pause = 0
    while not over.wait(pause):
        if slurm.ask("squeue", "-h", "--me") is not None:
            return True
        if not pause:
            say("SLURM does not answer: a job waits to be submitted")
        pause = min(2 * pause + 1, 60)
    return False
