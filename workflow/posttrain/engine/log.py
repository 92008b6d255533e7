"""Parse the failed jobs out of Snakemake's log, and the reasons out of the logs of stages."""

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


TRACEBACK = "Traceback (most recent call last):"
BAR = re.compile(r"\d+%\|")  # of tqdm, which libraries print whatever they are told


def errors(text: str) -> list[str]:
    """The errors that posttrain printed to a stage's log, in order. A progress bar may stand before them in a line."""
    return re.findall(r"(?:^|\]) ?(?:what ended it|error): (?:error: )?(.*)", text.replace("\r", "\n"), re.M)


def exception(text: str) -> list[str]:
    """The line with the exception of the last traceback; [] without a traceback."""
    below = text.replace("\r", "\n").rpartition(TRACEBACK)[2].splitlines()[1:] if TRACEBACK in text else []
    lines = (re.sub(r"^\[rank\d+\]: ?", "", line) for line in below)  # torch marks the lines of each process
    return [line for line in lines if line and not line[0].isspace()][:1]


def last_line(text: str) -> list[str]:
    """The last line that is no progress bar; [] for none."""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return [line for line in lines if not BAR.search(line)][-1:] or lines[-1:]
