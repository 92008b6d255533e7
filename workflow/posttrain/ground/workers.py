"""Call a function for many items in several processes; its results come in the order of the items."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from posttrain.ground.errors import UserError

FEWEST = 4  # items from which processes are started: a start takes as long as a few items
AHEAD = 2  # items for each process that are being worked on, or whose results wait

Item = TypeVar("Item")
Result = TypeVar("Result")
_function: Callable[[Any], Any]  # what a worker calls


def in_order(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """The function of each item, in the order of the items, by so many processes; by this one where one is asked for,
    and for fewer than FEWEST items.

    Workers are forks of this process: the function may hold anything, items and results must be picklable. Few items
    are taken ahead of what is asked for, so that memory does not grow with their number. An error of the function is
    raised here; the workers end with the iterator, and with this process.
    """
    waiting = iter(items)
    first = list(islice(waiting, FEWEST if processes > 1 else 0))
    items = chain(first, waiting)
    if len(first) < FEWEST:
        yield from map(function, items)
        return
    forking = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(processes, forking, initializer=_begin, initargs=(function,))
    try:
        yield from _results(executor, items, AHEAD * processes)
    except BrokenProcessPool:
        what = f"one of {processes} processes was ended from outside, as for want of memory"
        raise UserError(f"{what}; --threads 1 needs the least") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _results(executor: ProcessPoolExecutor, items: Iterable, most: int) -> Iterator:
    """The results of items in their order, with at most so many under way."""
    under_way: deque[Future] = deque()
    for item in items:
        under_way.append(executor.submit(_call, item))
        if len(under_way) > most:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _begin(function: Callable) -> None:
    """Make a process a worker: what to do at a signal is for the process that began it, with which it ends."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent) -> None:
    """Wait for the end of the parent process, then end this one: a worker would wait for its next item for ever."""
    parent.join()
    os._exit(1)


def _call(item):
    return _function(item)
