"""The states of SLURM jobs that Snakemake's executor receives; a doubtful state is reported only when it is confirmed.

snakemake --profile slurm
"""

from pathlib import Path

from posttrain.engine.controller import HOLDER
from posttrain.jobs import slurm

LONGEST_PAUSE = 75  # seconds between two queries of all jobs' states: 60 by the profile, and a margin
# State after which SLURM may requeue a job, by itself or on the job's request (`attempt`) -> its final state otherwise.
PASSING = {"PREEMPTED": "CANCELLED", "TIMEOUT": "TIMEOUT", "NODE_FAIL": "FAILED"}


def command() -> str:
    """The command with which the executor queries states: squeue, or sacct where the controller soon forgets jobs."""
    age, accounts = slurm.retention(slurm.configuration())
    return "sacct" if accounts and age < LONGEST_PAUSE else "squeue"


def settle(listed: dict[str, str], outputs: dict[str, str], doubts: dict[str, str]) -> dict[str, str]:
    """The state of each active job to report. A state that may still change is reported after two equal answers.

    listed: states listed by SLURM; sacct's may be `CANCELLED by 1000`. outputs: active job -> its manifest. doubts: the
    doubtful states of the previous query; changed. A job that SLURM does not list, because it has forgotten it or not
    recorded it yet, is queried individually the second time.
    """
    settled = {}
    for job, manifest in outputs.items():
        state = (listed.get(job, "").split() or [""])[0]
        if state and state not in PASSING:
            doubts.pop(job, None)
        elif doubts.get(job) != state:
            doubts[job] = state
            state = state if state == "NODE_FAIL" else "RUNNING"  # from NODE_FAIL on, the executor avoids the node
        else:
            state = slurm.state(job)
            state = PASSING.get(state, state)
            if state == "UNKNOWN" and not made_by_this_run(manifest):  # the executor treats UNKNOWN as success
                state = "FAILED"
        settled[job] = state
    return settled


def made_by_this_run(manifest: str) -> bool:
    """Whether an artifact is newer than the start of this Snakemake (`controller.claim`).

    An older one may be of other settings. The provenance record is rewritten with each artifact, also a reused one.
    """
    try:
        return Path(manifest).with_name("provenance.json").stat().st_mtime >= HOLDER.stat().st_mtime
    except OSError:
        return False
