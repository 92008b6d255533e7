"""Hand-written rewards, named in an experiment as `config/rewards.py:FUNCTION`."""


def brevity(prompt: str, reply: str, answer: str | None) -> float:
    """1 for an empty reply, 0 for one of ten words, and less for longer ones."""
    return 1 - len(reply.split()) / 10
