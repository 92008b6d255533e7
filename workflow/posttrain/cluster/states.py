"""What Snakemake is told of its jobs' states on SLURM: no job is lost, and none is waited for in vain.

snakemake --profile slurm
"""

from pathlib import Path

from posttrain.ground.progress import say
from posttrain.jobs import slurm

LONGEST = 75  # seconds between two times at which Snakemake asks for all jobs' states, by the profile, and a margin
# What SLURM may yet run again, by itself or asked by the job (`attempt`), and how it ends where it does not.
UNSURE = {"PREEMPTED": "CANCELLED", "TIMEOUT": "TIMEOUT", "NODE_FAIL": "FAILED"}


def command() -> str:
    """What the executor plugin asks for jobs' states: squeue, or sacct where SLURM soon forgets an ended job."""
    age, accounts = slurm.remembered(slurm.configured())
    return "sacct" if accounts and age < LONGEST else "squeue"


def certain(listed: dict[str, str], active: dict[str, str], doubts: dict[str, str]) -> dict[str, str]:
    """The state of each active job as the plugin can take it. What may yet change is believed when it is said twice.

    listed: what SLURM said, `CANCELLED by 1000` where sacct did. active: job -> the manifest that it is to make.
    doubts: what it said of some the time before. A job that it does not list, since it has forgotten it or not written
    it down yet, is asked for by itself the second time.
    """
    sure = {}
    for job in active:
        state = (listed.get(job, "").split() or [""])[0]
        if state and state not in UNSURE:
            doubts.pop(job, None)
        elif doubts.get(job) != state:  # of a node that fails the plugin wants to know at once: it avoids it
            doubts[job], state = state, state if state == "NODE_FAIL" else "RUNNING"
        else:
            state = slurm.state(job)
            state = UNSURE.get(state, state)
            if state == "UNKNOWN" and not made(active[job]):  # which the plugin would take for done
                state = "FAILED"
        sure[job] = state
    return sure


def made(manifest: str) -> bool:
    """Whether an artifact appeared after this Snakemake began to work (`controller.hold`). What was made from other
    settings may lie in its place; the record beside it is written anew with each, also with one taken again."""
    from posttrain.cluster.controller import HOLDER  # which imports this module

    try:
        return Path(manifest).with_name("provenance.json").stat().st_mtime >= HOLDER.stat().st_mtime
    except OSError:
        return False


def watch() -> None:
    """Let the executor plugin (2.8.0) take states from `certain`, which it would wait for without an end: of a job that
    SLURM has forgotten, of one that was preempted for good, and of a cancelled one where accounts are asked. One that
    nobody remembers counts as done by what it has `made`, not by an earlier artifact in its place.

    Where a query of all states fails, as while SLURM's controller is restarted, the plugin neither reports a job nor
    says that it still runs: it does now. It asks accounts in place of a controller with a short memory, or none: it
    asks what `command` chose. Pauses between queries grow to three times the first one, not to three minutes, which a
    chain of short stages waits for at each of them.
    """
    import snakemake_executor_plugin_slurm as plugin

    check, query = plugin.Executor.check_active_jobs, plugin.query_job_status
    active: dict[str, str] = {}
    doubts: dict[str, str] = {}
    silent = False

    async def asked(command, logger):
        nonlocal silent
        listed, seconds = await query(command, logger)
        if silent is not (listed is None):
            silent = not silent
            say("SLURM does not say how its jobs are: they go on, and it is asked again" if silent else "SLURM answers")
        return (listed if listed is None else certain(listed, active, doubts)), seconds

    async def checked(self, active_jobs):
        open_jobs = {job.external_jobid: job for job in active_jobs}
        active.clear()
        active.update((number, str(job.job.output[0])) for number, job in open_jobs.items())
        reports = self.report_job_success, self.report_job_error

        def noting(report):
            def note(job, *arguments, **options):
                open_jobs.pop(job.external_jobid, None)
                return report(job, *arguments, **options)

            return note

        self.report_job_success, self.report_job_error = map(noting, reports)
        try:
            async for job in check(self, active_jobs):
                open_jobs.pop(job.external_jobid, None)
                yield job
        finally:
            self.report_job_success, self.report_job_error = reports
        for job in open_jobs.values():
            yield job
        longest = 3 * self.workflow.executor_settings.init_seconds_before_status_checks
        self.next_seconds_between_status_checks = min(self.next_seconds_between_status_checks, longest)

    plugin.Executor.check_active_jobs, plugin.query_job_status = checked, asked
    plugin.get_min_job_age = lambda: float("inf")
