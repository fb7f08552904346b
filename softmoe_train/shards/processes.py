"""This file owns the worker processes of a making, check or indexing: how work is handed out, and what ends them."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, TypeVar

import torch

from softmoe_train.shards.settings import StoppedError

Task = TypeVar("Task")
Result = TypeVar("Result")

_work: Callable[[Any], Any] | None = None  # of a worker process, to which it is sent once and not with each task
_AHEAD = 2  # tasks handed out for each process: more would only fill memory


def in_processes(
    work: Callable[[Task], Result],
    tasks: Iterable[Task],
    processes: int,
    named: Callable[[Task], str] = lambda _: "",
) -> Iterator[Result]:
    """The results in the order of the tasks; one process is this one.

    Raises what a task raised, or StoppedError where a worker died, with the names of the tasks that one of them was at.
    """
    if processes == 1:
        yield from map(work, tasks)
        return
    ours, theirs = multiprocessing.Pipe()
    pool = ProcessPoolExecutor(processes, initializer=_start, initargs=(ours, theirs, work))
    waiting: deque[tuple[Task, Future[Result]]] = deque()  # in the order of the tasks
    try:
        for task in tasks:
            while len(at_work := [future for _, future in waiting if not future.done()]) >= _AHEAD * processes:
                wait(at_work, return_when=FIRST_COMPLETED)
            while waiting and waiting[0][1].done():
                yield waiting[0][1].result()
                waiting.popleft()
            waiting.append((task, pool.submit(_do, task)))
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
        pool.shutdown()
    except BrokenProcessPool:
        at = [named(task) for task, future in waiting if not future.done() or future.exception() is not None]
        where = " or ".join(filter(None, at[: _AHEAD * processes]))
        raise StoppedError(
            f"a worker process ended unexpectedly{where and f', at {where}'}: was it killed, for memory perhaps?"
        ) from None
    finally:
        ours.close()  # ends what is still at work, where the results are not wanted any more
        theirs.close()
        pool.shutdown(cancel_futures=True)


def _start(ours: Any, theirs: Any, work: Callable[[Any], Any]) -> None:
    """Make a worker single-threaded, deaf to Ctrl-C, which its parent hears, and no longer-lived than its parent wants it."""
    global _work  # noqa: PLW0603
    _work = work
    ours.close()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(theirs,), daemon=True).start()


def _do(task: Any) -> Any:
    assert _work is not None
    return _work(task)


def _end_with(parent: Any) -> None:
    with suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)
