"""A reward that takes its time, whatever the machine: with it a job comes to its limit."""

import time


def slow(prompt: str, reply: str, answer: str | None) -> float:
    """The share of letters in the reply, after a while."""
    time.sleep(0.9)
    return sum(map(str.isalpha, reply)) / max(1, len(reply))
