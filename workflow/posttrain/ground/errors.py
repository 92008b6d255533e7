"""Exceptions whose messages are printed without a traceback."""

INTERRUPTED = 75  # exit code of a stage that saved and stopped early: EX_TEMPFAIL of sysexits.h
TOO_LARGE = 77  # exit code of a stage that does not fit into the GPU's memory


class UserError(Exception):
    """A user's mistake: the message says where, what was found, and what is allowed or which command to run.

    problems: one line for each mistake; they are reported together.
    """

    def __init__(self, *problems: str):
        self.problems = problems  # the arguments stay those of the class: by them an error is sent between processes

    def __str__(self) -> str:
        return "\n".join(self.problems)


class Diverged(UserError):
    """Training failed deterministically: with the same settings, inputs and code, retrying is pointless."""


class Unreadable(UserError):
    """A file exists and could not be read; it may be readable later."""


class Interrupted(UserError):
    """Not a mistake: a stage has saved its state and stopped early; the next run continues. Exit code 75."""


class TooLarge(UserError):
    """A stage's micro-batch does not fit into the GPU's memory. Exit code 77."""


def gather(function, items: list) -> list:
    """Apply a function to every item; raise the UserErrors of all items as one."""
    results = []
    problems: list[str] = []
    for item in items:
        try:
            results.append(function(item))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return results
