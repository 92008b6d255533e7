"""A process that scores answers by the user's function: one that hangs, crashes or raises costs that answer alone.

A reply that the function does not score in time, or scores with no finite number, counts as 0 and is named.
"""

import math
import multiprocessing
from multiprocessing.connection import Connection

from posttrain.config.sections import Compare, Sampled
from posttrain.ground.errors import UserError
from posttrain.ground.progress import say
from posttrain.rl import handwritten

SHOWN = 3  # failures of each run that are printed; the others are counted
HOPELESS = 32  # first answers of which one must be scored: with rewards of 0 alone nothing would be learned


class Referee:
    """The function of a section's `reward_function`, in a process of its own, which is started again when it ended."""

    def __init__(self, section: Sampled | Compare, seconds: float):
        self.function = section.reward_function, section.reward_code
        self.seconds, self.asked, self.failures = seconds, 0, 0
        handwritten.load_judge(section, "reward")  # a function that cannot be loaded is told here
        self.process: multiprocessing.process.BaseProcess | None = None
        self.ours: Connection | None = None

    def scores(self, rows: list[dict], replies: list[str]) -> list[float]:
        """A finite score for each reply to a row; 0 where the function gives none."""
        return [self._score(row, reply) for row, reply in zip(rows, replies, strict=True)]

    def _score(self, row: dict, reply: str) -> float:
        self.asked += 1
        try:
            ours = self._started()
            ours.send((row["prompt"], reply, row.get("answer")))
            if not ours.poll(self.seconds):
                self._end()
                return self._failed(row, reply, f"gave no score in {self.seconds:g} s")
            value, problem = ours.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._end()
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
        failed = f"reward_function {problem[:200]} for the row {row.get('id')}, reply {reply[:80]!r}"
        if self.failures == self.asked == HOPELESS:
            raise UserError(f"{failed}, as for all {HOPELESS} answers so far: none has a score")
        if self.failures <= SHOWN:
            say(f"warning: {failed}: counts as 0")
        return 0.0

    def close(self) -> None:
        """End the process, and tell how many answers it did not score."""
        if self.failures > SHOWN:
            say(f"warning: reward_function gave no score for {self.failures:,} of {self.asked:,} answers: 0 each")
        self._end()

    def _end(self) -> None:
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
