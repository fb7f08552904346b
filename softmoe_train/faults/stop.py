"""This file owns how a run is asked to end early: by a signal or its time limit, at one step of all ranks, with time to save.

A signal may reach one rank or all of them, and often twice. Python runs handlers in the main thread, between two of its own
instructions: a rank that waits inside a collective would not hear that it is asked again. So a thread listens.
"""

import os
import selectors
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from softmoe_train.dist import ControlGroup, PendingMax, World, control_group, wait_for_all

ASKING = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)  # the first is SLURM's, by --signal
TIME_IS_UP = "interrupted by time_limit"
# What a rank wants is a number into this; all ranks together want the highest.
TOO_MANY_BROKEN = "too many broken samples"
REASONS = (None, TIME_IS_UP, *(f"interrupted by {number.name}" for number in ASKING), TOO_MANY_BROKEN)
TIME_LIMIT, SIGNALS = 1, 2
# Signals this soon after the first are the first: timeout(1) sends two, and SLURM reaches a rank itself and through its launcher.
ONE_SIGNAL_SECONDS = 2.0
SKEW_SECONDS = 1.0  # between two ranks that hear one signal
END = 0  # no signal has this number


class Ear:
    """The thread that hears the signals of this process, told of them through the pipe `hears`.

    A second signal ends the process at once, as that signal would; the first does when `grace_seconds` have passed, with
    `exit_code`. Whatever is under way then is left as a kill would leave it.
    """

    def __init__(self, hears: int, rank: int, grace_seconds: int, exit_code: int) -> None:
        self.asked: signal.Signals | None = None
        self._hears = hears
        self._rank = rank
        self._grace_seconds = grace_seconds
        self._exit_code = exit_code
        self._since = 0.0

    def listen(self) -> None:
        """Hear signals until END is."""
        with selectors.DefaultSelector() as pipe:  # select(2) refuses a descriptor above 1023
            pipe.register(self._hears, selectors.EVENT_READ)
            while True:
                patience = None if self.asked is None else max(0.0, self.seconds_left())
                if not pipe.select(patience):
                    self.give_up()
                for number in os.read(self._hears, 64):
                    if number == END:
                        return
                    if number in ASKING:  # a child that ended comes through the same pipe
                        self._hear(signal.Signals(number))

    def seconds_left(self) -> float:
        """Until this process gives up; for ever where nothing was asked."""
        return float("inf") if self.asked is None else self._since + self._grace_seconds - time.monotonic()

    def give_up(self) -> NoReturn:
        """End the process without the save that was asked for."""
        assert self.asked is not None
        self._exit(
            self._exit_code,
            f"{self._grace_seconds} s after {self.asked.name} (checkpoint.grace) it had not ended in good order: a checkpoint that "
            f"is not complete by now does not count, and the same command goes on from the one before",
        )

    def _hear(self, number: signal.Signals) -> None:
        if self.asked is None:
            self.asked, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ONE_SIGNAL_SECONDS:
            self._exit(128 + number, f"{number.name} after {self.asked.name}: ended at once")

    def _exit(self, code: int, why: str) -> NoReturn:
        # Past Python's buffers, whose locks the main thread may hold.
        os.write(2, f"rank {self._rank} was ended: {why}\n".encode())
        os._exit(code)


@contextmanager
def listening(rank: int, grace_seconds: int, exit_code: int) -> Iterator[Ear]:
    """Have an Ear instead of the usual handlers until the end of the block; in the main thread only, as Python wants it."""
    hears, tells = os.pipe()
    os.set_blocking(tells, False)
    ear = Ear(hears, rank, grace_seconds, exit_code)
    thread = threading.Thread(target=ear.listen, name="signals", daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _heard_elsewhere) for number in ASKING}
    for number in ASKING:
        signal.siginterrupt(number, False)  # or libraries would find their writes and receives interrupted
    try:
        yield ear
    except Exception:
        if ear.seconds_left() < SKEW_SECONDS:  # the ranks that gave up a moment ago are why this one fails
            ear.give_up()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.write(tells, bytes([END]))
        thread.join()
        os.close(tells)
        os.close(hears)


def _heard_elsewhere(number: int, frame: object) -> None:
    """Python writes a signal's number to the pipe only where a handler is set."""


class AgreedStop:
    """One answer for all ranks to whether this run is to end.

    What a rank wants is exchanged while the next step computes, so that asking waits for nothing: an answer is a step old.
    """

    def __init__(self, ear: Ear, ends_at: float | None, group: ControlGroup) -> None:
        self._ear = ear
        self._ends_at = ends_at
        self._group = group
        self._pending: PendingMax | None = None
        self._broken = False

    def end_for_broken_samples(self) -> None:
        """Have this rank want the run to end because of its data."""
        self._broken = True

    def agreed(self) -> str | None:
        """Why to stop after this step, or None: the same on every rank, each of which must ask once a step."""
        reason = REASONS[self._pending.wait() if self._pending else 0]
        if reason is None:
            self._pending = PendingMax(self._wanted(), self._group)
        return reason

    def _wanted(self) -> int:
        if self._broken:
            return REASONS.index(TOO_MANY_BROKEN)
        if self._ear.asked is not None:
            return SIGNALS + ASKING.index(self._ear.asked)
        return TIME_LIMIT if self._ends_at is not None and time.monotonic() >= self._ends_at else 0


@contextmanager
def agreed_stop(world: World, *, ends_at: float | None, grace_seconds: int, exit_code: int) -> Iterator[AgreedStop]:
    """Listen to signals, and to the clock (`ends_at`, of time.monotonic()), until the end of the block; collective.

    No rank leaves before the others: a launcher takes the first exit code but 0 for a failure, and ends the ranks that still
    close their logs.
    """
    group = control_group(world)
    with listening(world.rank, grace_seconds, exit_code) as ear:
        yield AgreedStop(ear, ends_at, group)
        wait_for_all(group)
