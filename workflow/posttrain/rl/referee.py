"""A process that scores answers by the user's function: one that hangs, crashes or raises costs that answer alone.

A reply that the function does not score in time, or scores with no finite number, counts as 0 and is named.
"""

import math
import multiprocessing
from multiprocessing.connection import Connection

from posttrain.config.sections import Compare, Sampled
from posttrain.ground.progress import say
from posttrain.rl import handwritten

SHOWN = 3  # failures of each run that are printed; the others are counted


class Referee:
    """The function of a section's `reward_function`, in a process of its own, which is started again when it ended."""

    def __init__(self, section: Sampled | Compare, seconds: float):
        self.function = section.reward_function, section.reward_code
        self.seconds, self.failures = seconds, 0
        handwritten.load_judge(section, "reward")  # a function that cannot be loaded is told here
        self.process: multiprocessing.process.BaseProcess | None = None
        self.ours: Connection | None = None

    def scores(self, rows: list[dict], replies: list[str]) -> list[float]:
        """A finite score for each reply to a row; 0 where the function gives none."""
        return [self._score(row, reply) for row, reply in zip(rows, replies, strict=True)]

    def _score(self, row: dict, reply: str) -> float:
        try:
            ours = self._started()
            ours.send((row["prompt"], reply, row.get("answer")))
            if not ours.poll(self.seconds):
                self.close()
                return self._failed(row, reply, f"gave no score in {self.seconds:g} s")
            value, problem = ours.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.close()
            return self._failed(row, reply, "ended its process")
        return self._failed(row, reply, problem) if problem else value

    def _started(self) -> Connection:
        if self.ours is None:
            context = multiprocessing.get_context("spawn")
            self.ours, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(*self.function, theirs), daemon=True)
            self.process.start()
            theirs.close()
            self.ours.recv()  # it is ready: its start does not count as the function's time
        return self.ours

    def _failed(self, row: dict, reply: str, problem: str) -> float:
        self.failures += 1
        if self.failures <= SHOWN:
            say(f"warning: reward_function {problem} for the row {row.get('id')}, reply {reply[:80]!r}: counts as 0")
        return 0.0

    def close(self) -> None:
        """End the process."""
        if self.process and self.ours:
            self.process.kill()
            self.process.join()
            self.ours.close()
        self.process = self.ours = None


def serve(name: str, code: str | None, theirs: Connection) -> None:
    """Answer (prompt, reply, answer) with (score, "") or (0, what went wrong), until the other side is gone. name,
    code: of the function, and its file's fingerprint."""
    judge = handwritten.load("reward_function", name, code)
    theirs.send("ready")
    while True:
        try:
            asked = theirs.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            value = float(judge.function(*asked))
            problem = "" if math.isfinite(value) else f"returned {value}"
        except Exception as error:  # a program of the user's, which can raise anything
            value, problem = 0.0, f"raised {type(error).__name__}: {error}"
        theirs.send((value, problem))
