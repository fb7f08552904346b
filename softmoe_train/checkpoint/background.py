"""This file owns the thread in which a save goes on beside the training."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread, current_thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """One job at a time in a thread of its own, which does not hold up the end of the process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._job: Future[T] | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the caller is the job, or there is none since the last `wait`."""
        return self._job is None or current_thread().name == self._name

    def start(self, job: Callable[[], T]) -> None:
        """Begin `job`; the one before must have been waited for."""
        assert self._job is None, f"{self._name} is under way"
        self._job = Future()
        Thread(target=_run, args=(job, self._job), name=self._name, daemon=True).start()

    def wait(self) -> T | None:
        """The result of the job, once; None without one. Raises what it raised."""
        job, self._job = self._job, None
        return job.result() if job is not None else None


def _run(job: Callable[[], T], outcome: "Future[T]") -> None:
    try:
        outcome.set_result(job())
    except BaseException as error:
        outcome.set_exception(error)
