"""Patch Snakemake's SLURM executor: it loses no job, submits when SLURM answers, and cancels all jobs on Ctrl-C.

snakemake --profile slurm
"""

import threading
from collections.abc import Awaitable, Callable

from posttrain.ground.progress import say
from posttrain.jobs import slurm

States = dict[str, str]  # number of a job -> its state in SLURM


def report_states(settle: Callable[[States, States, States], States]) -> None:
    """Make the executor take the states of its jobs from `settle(listed, outputs, doubts)`.

    listed: states listed by SLURM. outputs: number of each active job -> its first output. doubts: states that `settle`
    stores for the next query. It returns the state of each active job.

    Three more changes. After a failed query, as during a restart of SLURM's controller, the executor would lose its
    jobs; here they count as running. The executor does not switch to sacct by itself; `slurm-status-command` of the
    profile decides. Pauses between queries grow to three times the first pause, not to three minutes, for which each
    stage of a chain of short stages would wait.
    """
    import snakemake_executor_plugin_slurm as plugin

    outputs: States = {}
    plugin.query_job_status = _settled(plugin.query_job_status, settle, outputs)
    plugin.Executor.check_active_jobs = _complete(plugin.Executor.check_active_jobs, outputs)
    plugin.get_min_job_age = lambda: float("inf")


def _settled(query: Callable[..., Awaitable], settle: Callable, outputs: States) -> Callable:
    """A query of all states that also settles doubtful ones, and reports once when SLURM stops or starts to answer."""
    doubts: States = {}
    away = False

    async def settled(command, logger):
        nonlocal away
        listed, seconds = await query(command, logger)
        if away is not (listed is None):
            away = not away
            say("SLURM does not answer: jobs continue, and it is queried again" if away else "SLURM answers")
        return (listed if listed is None else settle(listed, outputs, doubts)), seconds

    return settled


def _complete(check: Callable, outputs: States) -> Callable:
    """A check of active jobs after which each job is either reported as ended or yielded as active."""

    async def complete(self, active_jobs):
        pending = {job.external_jobid: job for job in active_jobs}
        outputs.clear()
        outputs.update((number, str(job.job.output[0])) for number, job in pending.items())
        reports = self.report_job_success, self.report_job_error

        def noting(report):
            def note(job, *arguments, **options):
                pending.pop(job.external_jobid, None)
                return report(job, *arguments, **options)

            return note

        self.report_job_success, self.report_job_error = map(noting, reports)
        try:
            async for job in check(self, active_jobs):
                pending.pop(job.external_jobid, None)
                yield job
        finally:
            self.report_job_success, self.report_job_error = reports
        for job in pending.values():
            yield job
        longest = 3 * self.workflow.executor_settings.init_seconds_before_status_checks
        self.next_seconds_between_status_checks = min(self.next_seconds_between_status_checks, longest)

    return complete


def submit_when_slurm_answers() -> None:
    """Make the executor wait for SLURM before it submits a job, and cancel all jobs of its run on Ctrl-C.

    Unpatched, it calls sbatch once; if that fails, the job counts as failed and its descendants are not made. On Ctrl-C
    it cancels only the jobs that it has listed: none during a query of states, and not one that is being submitted; and
    where scancel fails, waiting jobs would be submitted afterwards. Here jobs are cancelled by the name of their run.
    """
    import snakemake_executor_plugin_slurm as plugin

    submit, shutdown = plugin.Executor.run_job, plugin.Executor.shutdown
    over = threading.Event()

    def run_job(self, job):
        if slurm.wait_until_reachable("a job waits to be submitted", over=over):
            submit(self, job)

    def stop_waiting_and_shut_down(self):  # otherwise shutdown waits for jobs that are not submitted yet
        over.set()
        shutdown(self)

    def cancel(self):
        over.set()
        slurm.ask("scancel", "--name", self.run_uuid)
        shutdown(self)
        if slurm.ask("scancel", "--name", self.run_uuid) is not None:  # cancels jobs that were being submitted too
            say("interrupted: the jobs of this run are cancelled; the next call continues them")
        else:
            end = f"scancel --name {self.run_uuid}"
            say(f"SLURM does not answer: jobs continue, and the next call waits for them; to end them: {end}")

    plugin.Executor.run_job, plugin.Executor.cancel = run_job, cancel
    plugin.Executor.shutdown = stop_waiting_and_shut_down
