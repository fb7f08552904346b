"""This file owns the grid on this machine: every point in a process of its own, as many at a time as there is room for."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from softmoe_train.at_end import is_complete
from softmoe_train.faults.stop import ASKING
from softmoe_train.sweep.ledger import Ledger
from softmoe_train.sweep.outcome import FOR_GOOD, Outcome, ended, given_up, log_of, step_of_run
from softmoe_train.sweep.points import Point
from softmoe_train.sweep.room import VISIBLE, Room
from softmoe_train.sweep.show import Running, Show

LOOK_SECONDS = 0.2  # between two looks at the points that run
CLAIM_SECONDS = 2.0  # between two looks at a folder that another process holds


Command = Callable[[Point], list[str]]


def command_of(verb: str) -> Command:
    """How a point starts: `softmoe VERB`, to die with this process."""
    return lambda point: [sys.executable, "-m", "softmoe_train.sweep.child", str(os.getpid()), verb, *point.overrides]


@dataclass
class Child:
    """The process of a point."""

    point: Point
    process: subprocess.Popen[bytes]
    attempt: int


class LocalGrid:
    """Runs points in processes that die with this one. Signals that ask it to end go on to them, and nothing more is started."""

    def __init__(self, command: Command, room: Room, retries: int, show: Show) -> None:
        self._command = command
        self._room = room
        self._retries = retries
        self._show = show
        self._running: list[Child] = []
        self._asked: signal.Signals | None = None
        self._held: dict[str, tuple[str, float]] = {}  # by label: who holds the folder, and when that was looked at

    def run(self, points: Sequence[Point], ledger: Ledger) -> list[Outcome]:
        """Run what is not complete, in order where there is room; the outcomes come in the order of the points."""
        outcomes: dict[str, Outcome] = {}
        waiting = []
        for point in points:
            if is_complete(point.config):
                outcomes[point.label] = Outcome(point, "complete", None, "complete already")
            elif (last := given_up(point, ledger, self._retries)) is not None:
                outcomes[point.label] = last
            else:
                waiting.append(point)
        with self._hearing(), self._show.over(len(points)):
            try:
                while self._running or (waiting and self._asked is None):
                    if self._asked is None:
                        self._start(waiting, ledger, outcomes)
                    self._show.update([_progress(child) for child in self._running], outcomes.values(), len(waiting))
                    self._wait()
                    self._collect(waiting, ledger, outcomes)
            finally:
                self._end_all()
        for point in waiting:
            outcomes[point.label] = Outcome(point, "to do", None, "not started: the sweep was asked to end")
        return [outcomes[point.label] for point in points]

    def _start(self, waiting: list[Point], ledger: Ledger, outcomes: dict[str, Outcome]) -> None:
        """Start what there is room for, but nothing in a folder that another process holds: an orphan, or a run by hand."""
        for point in list(waiting):
            if self._is_held(point):
                continue
            if is_complete(point.config):  # whoever held it
                waiting.remove(point)
                outcomes[point.label] = Outcome(point, "complete", None, "complete")
                continue
            devices = self._room.take(point)
            if devices is None:
                continue
            waiting.remove(point)
            child = self._child(point, devices, ledger)
            self._running.append(child)
            if self._asked is not None:  # while it was started
                child.process.send_signal(self._asked)
                return

    def _child(self, point: Point, devices: list[str], ledger: Ledger) -> Child:
        point.folder.mkdir(parents=True, exist_ok=True)
        command = self._command(point)
        environ = {**os.environ, "PYTHONUNBUFFERED": "1", **({VISIBLE: ",".join(devices)} if devices else {})}
        at = step_of_run(point)
        with log_of(point).open("ab") as log:
            log.write(f"\n{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ,
                process_group=0,  # the terminal's Ctrl-C comes through us, once
            )
        # What is written after a start can be lost by a kill between the two; what ran is then in the point's own folder.
        attempt = ledger.start(point, pid=process.pid, **({"devices": devices} if devices else {}))
        on = f" on {','.join(devices)}" if devices else ""
        went = f", goes on from about step {at}" if at else ""
        again = f" (attempt {attempt})" if attempt > 1 else ""
        self._show.tell(f"{point.label}: started{again}{on}{went}")
        return Child(point, process, attempt)

    def _collect(self, waiting: list[Point], ledger: Ledger, outcomes: dict[str, Outcome]) -> None:
        for child in [child for child in self._running if child.process.poll() is not None]:
            point = child.point
            self._running.remove(child)
            self._room.give_back(point)
            outcome = ended(point, child.process.returncode)
            if outcome.code == 2 and (holder := point.holder()) is not None:
                why = f"in use by {holder}, which was faster"
                ledger.end(point, "interrupted", code=outcome.code, reason=why, step=step_of_run(point))
                waiting.append(point)
                continue
            ledger.end(point, outcome.state, code=outcome.code, reason=outcome.reason, step=step_of_run(point))
            again = outcome.state == "failed" and outcome.code not in FOR_GOOD and self._asked is None
            if again and given_up(point, ledger, self._retries) is None:
                waiting.append(point)
                self._show.tell(f"{point.label}: {outcome.reason}; it will be tried again; see {log_of(point)}")
                continue
            outcomes[point.label] = outcome
            see = "" if outcome.state == "complete" else f"; see {log_of(point)}"
            self._show.tell(f"{point.label}: {outcome.reason}{see}")

    def _is_held(self, point: Point) -> bool:
        """Whether another process writes in its folder, or in that of its checkpoints; told once a holder."""
        before, looked = self._held.get(point.label, ("", -CLAIM_SECONDS))
        if time.monotonic() - looked < CLAIM_SECONDS:
            return bool(before)
        holder = point.holder() or ""
        if holder and holder != before:
            self._show.tell(f"{point.label}: in use by {holder}, so it waits for that to end")
        self._held[point.label] = (holder, time.monotonic())
        return bool(holder)

    def _wait(self) -> None:
        """Until the next look, or a signal, or the end of the oldest."""
        if self._running:
            with suppress(subprocess.TimeoutExpired):
                self._running[0].process.wait(LOOK_SECONDS)
        else:
            time.sleep(LOOK_SECONDS)

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        """Pass on what asks us to end, at every time: the second ends a run at once."""

        def hear(number: int, frame: object) -> None:
            # A run knows no closed terminal, and would be killed with us before it has saved.
            self._asked = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
            for child in self._running:
                with suppress(ProcessLookupError):
                    child.process.send_signal(self._asked)

        closed = (signal.SIGHUP,) * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)  # as nohup has it
        before = {number: signal.signal(number, hear) for number in (*ASKING, *closed)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end_all(self) -> None:
        """Where this process fails, as without its terminal, its points end in good order before it."""
        for child in self._running if self._asked is None else []:  # a second signal would end them at once
            with suppress(ProcessLookupError):
                child.process.terminate()
        for child in self._running:
            child.process.wait()


def _progress(child: Child) -> Running:
    return Running(child.point.label, step_of_run(child.point), child.point.config.steps)
