"""Parse the failed jobs out of Snakemake's log."""

import re
from pathlib import Path
from typing import NamedTuple


class Failure(NamedTuple):
    """One job that failed."""

    output: Path  # its first output
    message: str  # Snakemake's message; "" for none
    refusal: str  # sbatch's reason for refusing it; "" where it was not refused
    logs: list[Path]  # the stage's log, and the job's where it ran on SLURM


def failures(text: str) -> list[Failure]:
    """The failed jobs in Snakemake's log, in order, except those without an output or a log."""
    failed = []
    for block in re.split(r"^Error in rule ", text, flags=re.M)[1:]:
        message, _, fields = block.partition("\n    jobid: ")
        output = re.search(r"^    output: ([^,\n]+)", fields, re.M)
        logs = re.search(r"^    log: (.*) \(check log", fields, re.M)
        if output and logs:
            message = message.partition(": ")[2]
            refused = re.search(r"sbatch failed\. The error message was '(.*?)'?\.?$", message, re.M)
            brief = message.partition(" Detailed failure")[0].strip().removeprefix("None")
            written = [Path(log) for log in logs[1].split(", ")]
            failed.append(Failure(Path(output[1]), brief, refused[1] if refused else "", written))
    return failed
