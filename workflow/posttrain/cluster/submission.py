"""Jobs are submitted when SLURM answers, as those that run already do without it; after Ctrl-C none is, and all end.

snakemake --profile slurm
"""

import threading

from posttrain.ground.progress import say
from posttrain.jobs import slurm


def wait() -> None:
    """Let the executor plugin (2.8.0) submit a job only once SLURM answers. It asks sbatch once, which gives up after
    seconds, and takes the job for failed, so that all that follows from it is not done either.

    On Ctrl-C it cancels the jobs that it knows of just then: none while it asks for their states, nor one that is being
    submitted; and where scancel fails it leaves those that wait to be submitted later. Here all go by their run's name.
    """
    import snakemake_executor_plugin_slurm as plugin

    submit, shutdown = plugin.Executor.run_job, plugin.Executor.shutdown
    over = threading.Event()

    def submitted(self, job):
        if slurm.wait("a job waits to be submitted", over=over):
            submit(self, job)

    def ended(self):  # which waits for what still is to be submitted
        over.set()
        shutdown(self)

    def cancelled(self):
        over.set()
        slurm.ask("scancel", "--name", self.run_uuid)
        shutdown(self)
        if slurm.ask("scancel", "--name", self.run_uuid) is not None:  # also what was being submitted
            say("interrupted: the jobs of this run are cancelled; the next call continues them")
        else:
            end = f"scancel --name {self.run_uuid}"
            say(f"SLURM does not answer: jobs go on, and the next call waits for them; to end them: {end}")

    plugin.Executor.run_job, plugin.Executor.shutdown, plugin.Executor.cancel = submitted, ended, cancelled
