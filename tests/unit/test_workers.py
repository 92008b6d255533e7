"""A function called in several processes: results in order, errors as they are, and no process that stays behind.

pytest tests/unit/test_workers.py
"""

import os
import signal
import subprocess
import sys
import time
from itertools import count, islice

import psutil
import pytest

from posttrain.ground import workers
from posttrain.ground.errors import UserError
from posttrain.ground.workers import in_order
from posttrain.models.chat import Breach


def slow_first(number: int) -> tuple[int, int]:
    """The number, and the process; the first of every four takes longest."""
    time.sleep(0.02 * (number % 4 == 0))
    return number, os.getpid()


def runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_results_are_in_order_whoever_is_done_first():
    numbers, processes = zip(*in_order(slow_first, range(24), 2), strict=True)
    assert numbers == tuple(range(24)) and len(set(processes) - {os.getpid()}) == 2
    alone, processes = zip(*in_order(slow_first, range(24), 1), strict=True)
    assert alone == numbers and set(processes) == {os.getpid()}
    few = dict(in_order(slow_first, range(workers.FEWEST - 1), 2))
    assert set(few.values()) == {os.getpid()}, "no process is started for them"
    assert list(in_order(slow_first, [], 2)) == []


def test_few_items_are_taken_ahead_and_workers_end_with_the_iterator():
    taken = []
    endless = in_order(slow_first, map(lambda n: taken.append(n) or n, count()), 2)
    worker = next(endless)[1]
    assert len(taken) <= workers.FEWEST + 2 * workers.AHEAD
    assert [number for number, _ in islice(endless, 3)] == [1, 2, 3] and runs(worker)
    endless.close()
    assert not runs(worker)


@pytest.mark.parametrize("error", [UserError("f:1: a", "f:2: b"), Breach("kind", "what"), KeyError(1)])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_is_the_same_from_a_worker(error, processes):
    def fail(number: int) -> int:
        if number == 6:
            raise error
        return number

    results = in_order(fail, range(10), processes)
    assert list(islice(results, 6)) == list(range(6))
    with pytest.raises(type(error)) as raised:
        next(results)
    assert str(raised.value) == str(error) and vars(raised.value) == vars(error)


def test_a_worker_that_is_killed_is_told_in_words():
    with pytest.raises(UserError, match="one of 2 processes was ended from outside"):
        list(in_order(lambda number: number != 6 or os.kill(os.getpid(), signal.SIGKILL), range(10), 2))


def test_workers_end_with_the_process_that_is_killed(root):
    """Though nothing tells them, and both wait for work that never comes."""
    script = (
        "import time; from posttrain.ground.workers import in_order\n"
        "results = in_order(lambda n: __import__('os').getpid(), range(40), 2)\n"
        "print(*{next(results) for _ in range(36)}, flush=True); time.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": str(root / "workflow")}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as parent:
        pids = list(map(int, parent.stdout.readline().split()))
        assert pids and all(map(runs, pids)) and parent.pid not in pids
        parent.kill()
    patience = time.monotonic() + 120
    while (left := [pid for pid in pids if runs(pid)]) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not left
