"""The exceptions whose messages are meant for a person and printed without a traceback."""

INTERRUPTED = 75  # exit code of a stage that is to be run again: EX_TEMPFAIL of sysexits.h
TOO_LARGE = 77  # exit code of a stage that a GPU has not the memory for


class UserError(Exception):
    """A mistake that the user can mend: says where, what was found and what is allowed or which command to run.

    Several mistakes of one kind are reported together, one line each.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class Diverged(UserError):
    """What training came to, and would come to again with the same settings, inputs and code."""


class Unreadable(UserError):
    """A file is there and could not be read now; another time it may be."""


class Interrupted(UserError):
    """No mistake: a stage has saved and stopped before its end; run again, it continues. Exit code 75."""


class TooLarge(UserError):
    """A GPU has not the memory for a stage's micro-batch. Exit code 77."""


def gather(function, items: list) -> list:
    """Apply a function to every item; raise the UserErrors of all of them as one."""
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
