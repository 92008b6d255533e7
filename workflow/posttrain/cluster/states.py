"""The states of jobs on SLURM, as Snakemake's executor is told of them: none in doubt is reported as ended too early.

snakemake --profile slurm
"""

from pathlib import Path

from posttrain.engine.controller import HOLDER
from posttrain.jobs import slurm

LONGEST_PAUSE = 75  # seconds between two queries of all jobs' states: 60 by the profile, and a margin
# States after which SLURM may requeue a job, by itself or asked by the job (`attempt`), and how it ends otherwise.
PASSING = {"PREEMPTED": "CANCELLED", "TIMEOUT": "TIMEOUT", "NODE_FAIL": "FAILED"}


def command() -> str:
    """Whom the executor asks for jobs' states: squeue, or sacct where the controller soon forgets an ended job."""
    age, accounts = slurm.retention(slurm.configuration())
    return "sacct" if accounts and age < LONGEST_PAUSE else "squeue"


def settle(listed: dict[str, str], outputs: dict[str, str], doubts: dict[str, str]) -> dict[str, str]:
    """The state of each active job to report. One that may still change is reported after two equal answers.

    listed: what SLURM listed, `CANCELLED by 1000` where sacct did. outputs: active job -> its manifest. doubts: the
    states in doubt at the query before; changed. A job that is not listed, since SLURM has forgotten it or has not
    written it down yet, is queried on its own the second time.
    """
    settled = {}
    for job, manifest in outputs.items():
        state = (listed.get(job, "").split() or [""])[0]
        if state and state not in PASSING:
            doubts.pop(job, None)
        elif doubts.get(job) != state:
            doubts[job] = state
            state = state if state == "NODE_FAIL" else "RUNNING"  # the executor avoids a failed node from now on
        else:
            state = slurm.state(job)
            state = PASSING.get(state, state)
            if state == "UNKNOWN" and not made_by_this_run(manifest):  # the executor takes UNKNOWN for success
                state = "FAILED"
        settled[job] = state
    return settled


def made_by_this_run(manifest: str) -> bool:
    """Whether an artifact appeared after this Snakemake began to work (`controller.claim`).

    An older one, of other settings, may lie in its place; the record beside it is written anew with each artifact, also
    with one that is reused.
    """
    try:
        return Path(manifest).with_name("provenance.json").stat().st_mtime >= HOLDER.stat().st_mtime
    except OSError:
        return False
