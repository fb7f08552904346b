"""This file owns the worker processes of a making, check or indexing: how work is handed out, and what ends them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, TypeVar

import torch

from softmoe_train.shards.settings import ShardsError

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 2  # tasks handed out for each process: more would only fill memory


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[[Task], Result], tasks: Iterable[Task], processes: int) -> Iterator[Result]:
    """The results in the order of the tasks; one process is this one. Raises what a task raised, or ShardsError where a worker died."""
    if processes == 1:
        yield from map(work, tasks)
        return
    ours, theirs = multiprocessing.Pipe()
    pool = ProcessPoolExecutor(processes, initializer=_start, initargs=(ours, theirs))
    waiting: list[Future[Result]] = []  # in the order of the tasks
    try:
        for task in tasks:
            while len(open_ones := [future for future in waiting if not future.done()]) >= _AHEAD * processes:
                wait(open_ones, return_when=FIRST_COMPLETED)
            while waiting and waiting[0].done():
                yield waiting.pop(0).result()
            waiting.append(pool.submit(work, task))
        while waiting:
            yield waiting.pop(0).result()
        pool.shutdown()
    except BrokenProcessPool:
        raise ShardsError("a worker process ended unexpectedly: was it killed, for memory perhaps? The same command goes on.") from None
    finally:
        ours.close()  # ends what is still at work, where the results are not wanted any more
        theirs.close()
        pool.shutdown(cancel_futures=True)


def _start(ours: Any, theirs: Any) -> None:
    """Make a worker single-threaded, deaf to Ctrl-C, which its parent hears, and no longer-lived than its parent wants it."""
    ours.close()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(theirs,), daemon=True).start()


def _end_with(parent: Any) -> None:
    with suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)
