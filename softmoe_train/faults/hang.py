"""This file owns how a hang is noticed, shown and ended.

A rank that is stuck inside a collective, a read or a write cannot look at itself, so a thread does. It ends the process, and nothing
that may block with the rest (the disk, the store, standard error, another rank) can keep it from that: each has a time of its own.
"""

import faulthandler
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Generic, NoReturn, Protocol, TypeVar

from softmoe_train.dist import Board, World, lengthen_timeouts
from softmoe_train.faults.whereabouts import Report, duration, report_of, suspects, told
from softmoe_train.observe.log import SilentLog

T = TypeVar("T")
FOLDER = "hangs"  # of the run folder; what a rank saw of one hang is added to its file
UNTIL_THE_FIRST_STEP = 2  # times the limit: it may load a checkpoint and compile
MOST_STACKS = 4  # on standard error
SAY_SECONDS = 3.0  # for what is written when all have answered
DAY_SECONDS = 24 * 3600.0  # beyond the limit: backends count the time for which a whole job was suspended, we do not


class HasStep(Protocol):
    """What moves while a run is well."""

    step: int


class Silence:
    """For how long nothing has moved, in time that this process has lived through.

    A process that was stopped, or a whole job, finds on going on that hours have passed: they count as two looks.
    """

    def __init__(self, look_seconds: float, clock: Callable[[], float]) -> None:
        self._look_seconds = look_seconds
        self._clock = clock
        self._looked = clock()
        self._signs: object = None
        self.seconds = 0.0

    def look(self, signs: object) -> None:
        """Look once; `signs` differ from those of the last look where something has moved."""
        now = self._clock()
        lived = min(now - self._looked, 2 * self._look_seconds)
        self.seconds = self.seconds + lived if signs == self._signs else 0.0
        self._looked, self._signs = now, signs


class Watch:
    """The threads that end this process when nothing has moved for `limit` seconds, or when another rank finds that it is so.

    Signs of life are a finished step and each batch of an evaluation: a save, a load or a first compilation must take less than
    the limit. Until `begin`, and with a limit of infinity, nothing is counted.
    """

    def __init__(self, world: World, limit: float, folder: Path, exit_code: int) -> None:
        self.log = SilentLog("")  # the run's, as soon as there is one
        self._world = world
        self._limit = limit
        self._file = folder / FOLDER / f"rank_{world.rank:05d}.txt"
        self._exit_code = exit_code
        self._look_seconds = min(5.0, limit / 12)
        self._answer_seconds = min(30.0, limit / 2)
        self._silence = Silence(self._look_seconds, time.monotonic)
        self._state: HasStep | None = None
        self._batches = 0  # of evaluations
        self._first: tuple[int, int] | None = None  # the signs at `begin`
        self._main = threading.get_ident()
        self._board = Board("hang") if world.size > 1 and limit < math.inf else None
        self._called, self._over, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._reports: list[Report] = []
        self._processes: dict[int, str] = {}
        self._kept = ""  # or why the stacks are not in their file
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._look, self._listen)]

    def start(self) -> None:
        """Start to look, and to hear other ranks."""
        if self._board is not None:
            self._board.put("processes", f"{self._world.rank} process {os.getpid()} on {socket.gethostname()}")
        for thread in self._threads if self._limit < math.inf else []:
            thread.start()

    def begin(self, state: HasStep) -> None:
        """Count from here on, and have the process groups made so far wait longer: their message says less.

        Twice in a run: when no more tars are to be read, for hours perhaps, and before its first step.
        """
        self._state, self._first = state, (state.step, self._batches)
        if self._limit < math.inf:
            lengthen_timeouts(UNTIL_THE_FIRST_STEP * self._limit + DAY_SECONDS)

    def over(self, batches: Iterable[T]) -> Iterable[T]:
        """The same batches, each of which is a sign of life."""
        return _Watched(batches, self._sign)

    def wait_for_the_end(self) -> None:
        """Return only if no hang was found: what fails now fails because of it, and would be told instead of it."""
        if self._ending.is_set():
            self._threads[0].join()

    def stop(self) -> None:
        """End the threads, unless they are ending the process."""
        self._over.set()
        self.wait_for_the_end()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(2 * self._look_seconds)
        self.wait_for_the_end()

    def _sign(self) -> None:
        self._batches += 1

    def _look(self) -> None:
        while not self._over.wait(self._look_seconds):
            signs = None if self._state is None else (self._state.step, self._batches)
            self._silence.look(signs)
            patience = self._limit * (UNTIL_THE_FIRST_STEP if signs == self._first else 1)
            if self._called.is_set() or (signs is not None and self._silence.seconds >= patience):
                self._end()

    def _listen(self) -> None:
        """Hear other ranks call: in a thread of its own, since a store whose host is stuck never answers."""
        with suppress(RuntimeError):  # no store any more: there is nobody to hear
            while self._board is not None and not self._over.wait(self._look_seconds) and not self._called.is_set():
                if self._board.count("reports"):
                    self._called.set()

    def _end(self) -> NoReturn:
        self._ending.set()
        try:
            step = 0 if self._state is None else self._state.step
            own = report_of(self._world.rank, step, busy_frame(self._main), self._silence.seconds)
            stacks = f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, {own}\n{stacks_of_all_threads()}\n"
            self._kept = "not written in time"
            within(self._answer_seconds, lambda: self._ask(own), lambda: self._keep(stacks))
            reports = self._reports or [own]
            within(SAY_SECONDS, lambda: self._say(reports, stacks), lambda: self.log.ended(self._reason(reports)))
            within(SAY_SECONDS + 2 * self._look_seconds, lambda: self._meet(len(reports)))
        finally:
            os._exit(self._exit_code)

    def _ask(self, own: Report) -> None:
        """Tell where this rank is and hear where the others are: those that live answer within a look."""
        if self._board is None:
            return
        until = time.monotonic() + 0.8 * self._answer_seconds
        self._board.put("reports", own.to_line())
        while self._board.count("reports") < self._world.size and time.monotonic() < until:
            time.sleep(0.1)
        processes = dict(line.split(" ", 1) for line in self._board.lines("processes"))
        self._processes = {int(rank): process for rank, process in processes.items()}
        self._reports = [Report.from_line(line) for line in self._board.lines("reports")]

    def _keep(self, stacks: str) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write(stacks)
            self._kept = ""
        except OSError as error:
            self._kept = str(error)

    def _say(self, reports: list[Report], stacks: str) -> None:
        """One line for people, after the stacks of the first suspects: those of 256 ranks would bury it."""
        rank = self._world.rank
        if self._kept or rank in suspects(reports, self._world.size)[:MOST_STACKS]:
            os.write(2, f"rank {rank} at {stacks}".encode())
        if rank == min(report.rank for report in reports):
            kept = f"not kept: {self._kept}" if self._kept else f"in {self._file.parent}"
            how = "the same command goes on from the last checkpoint"
            os.write(2, f"softmoe train: {self._reason(reports)}. Stacks are {kept}; {how}\n".encode())

    def _reason(self, reports: list[Report]) -> str:
        where = told(reports, self._world.size, self._processes)
        if self._board is not None and not self._reports:
            where = f"{reports[0]}; no other rank could be asked, for {self._board.holder} does not answer"
        return f"hang: nothing moved for {duration(max(report.seconds for report in reports))} (hang_limit): {where}"

    def _meet(self, answered: int) -> None:
        """Leave together: a launcher kills the ranks that remain, and rank 0 may hold the store."""
        if self._board is not None and self._reports:
            self._board.put("told", "")
            while self._board.count("told") < answered:
                time.sleep(0.05)
            time.sleep(0.2 if self._world.main else 0.0)


class _Watched(Generic[T]):
    def __init__(self, batches: Iterable[T], sign: Callable[[], None]) -> None:
        self._batches, self._sign = batches, sign

    def __iter__(self) -> Iterator[T]:
        for batch in self._batches:
            self._sign()
            yield batch


def busy_frame(main: int) -> FrameType | None:
    """Where the main thread is; or the thread of a save, where the main thread waits for that."""
    frames = sys._current_frames()
    outward = frame = frames.get(main)
    while outward is not None:
        if outward.f_code.co_filename.endswith(os.path.join("checkpoint", "background.py")):
            saving = [thread.ident for thread in threading.enumerate() if thread.name == "checkpoint"]
            return next((frames[ident] for ident in saving if ident in frames), frame)
        outward = outward.f_back
    return frame


def within(seconds: float, *works: Callable[[], object]) -> None:
    """Do all of `works` at once, and go on without those that have not ended in time."""
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def stacks_of_all_threads() -> str:
    """Where every thread of this process is, by names and line numbers alone: to read source files could block."""
    # Into memory: faulthandler writes with the interpreter locked, and a disk or a pipe that is stuck would lock it for ever.
    file = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(file, all_threads=True)
        return os.pread(file, os.fstat(file).st_size, 0).decode()
    finally:
        os.close(file)


@contextmanager
def watched(world: World, *, minutes: float | None, folder: Path, exit_code: int) -> Iterator[Watch]:
    """Watch this process until the end of the block, for `minutes` without a sign of life (None: for ever); every rank enters it."""
    watch = Watch(world, math.inf if minutes is None else 60 * minutes, folder, exit_code)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
