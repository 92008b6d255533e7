"""Patches of Snakemake's SLURM executor: it loses no job, submits when SLURM answers, and on Ctrl-C cancels all jobs.

snakemake --profile slurm
"""

import threading
from collections.abc import Awaitable, Callable

from posttrain.ground.progress import say
from posttrain.jobs import slurm

States = dict[str, str]  # number of a job -> its state in SLURM


def report_states(settle: Callable[[States, States, States], States]) -> None:
    """Let the executor take the states of its jobs from `settle(listed, outputs, doubts)`.

    listed: what SLURM lists. outputs: number of each active job -> its first output. doubts: for `settle` to keep what
    it is to decide the next time. It returns the state of each active job.

    Where a query of all states fails, as while SLURM's controller is restarted, the executor neither reports a job nor
    says that it still runs, and so loses it: here it still runs. The executor never chooses by itself to ask accounts
    in place of the controller; `slurm-status-command` of the profile decides. Pauses between queries grow to three
    times the first one, and not to three minutes, which a chain of short stages waits for at each of them.
    """
    import snakemake_executor_plugin_slurm as plugin

    outputs: States = {}
    plugin.query_job_status = _settled(plugin.query_job_status, settle, outputs)
    plugin.Executor.check_active_jobs = _complete(plugin.Executor.check_active_jobs, outputs)
    plugin.get_min_job_age = lambda: float("inf")


def _settled(query: Callable[..., Awaitable], settle: Callable, outputs: States) -> Callable:
    """A query of all states that also settles those in doubt, and says once when SLURM is away and when it is back."""
    doubts: States = {}
    away = False

    async def settled(command, logger):
        nonlocal away
        listed, seconds = await query(command, logger)
        if away is not (listed is None):
            away = not away
            say("SLURM does not say how its jobs are: they go on, and it is asked again" if away else "SLURM answers")
        return (listed if listed is None else settle(listed, outputs, doubts)), seconds

    return settled


def _complete(check: Callable, outputs: States) -> Callable:
    """A check of active jobs after which each of them was reported as ended, or is named as active."""

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
    """Let the executor wait for SLURM before it submits a job, and cancel all jobs of its run on Ctrl-C.

    By itself it asks sbatch once, which gives up after seconds, and takes the job for failed, so that nothing that
    follows from it is made. On Ctrl-C it cancels only the jobs that it knows of just then: none while it asks for
    states, nor one that is being submitted; and where scancel fails, jobs that wait would be submitted afterwards.
    Here jobs are cancelled by the name of their run.
    """
    import snakemake_executor_plugin_slurm as plugin

    submit, shutdown = plugin.Executor.run_job, plugin.Executor.shutdown
    over = threading.Event()

    def run_job(self, job):
        if slurm.wait_until_reachable("a job waits to be submitted", over=over):
            submit(self, job)

    def stop_waiting_and_shut_down(self):  # the executor waits for jobs that are still to be submitted
        over.set()
        shutdown(self)

    def cancel(self):
        over.set()
        slurm.ask("scancel", "--name", self.run_uuid)
        shutdown(self)
        if slurm.ask("scancel", "--name", self.run_uuid) is not None:  # also what was being submitted
            say("interrupted: the jobs of this run are cancelled; the next call continues them")
        else:
            end = f"scancel --name {self.run_uuid}"
            say(f"SLURM does not answer: jobs go on, and the next call waits for them; to end them: {end}")

    plugin.Executor.run_job, plugin.Executor.cancel = run_job, cancel
    plugin.Executor.shutdown = stop_waiting_and_shut_down
