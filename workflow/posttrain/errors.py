"""The one exception whose message is meant for a person and printed without a traceback."""


class UserError(Exception):
    """A mistake that the user can mend: says where, what was found and what is allowed or which command to run.

    Several mistakes of one kind are reported together, one line each.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


def gather(function, items: list) -> list:
    """Apply a function to every item; raise the UserErrors of all of them as one."""
    results, problems = [], []
    for item in items:
        try:
            results.append(function(item))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return results
