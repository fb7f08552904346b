"""This file owns what becomes of a point: the states it may be in, and how an exit code, its folder and its log tell which."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from softmoe_train.at_end import is_complete, summary_of
from softmoe_train.launching.worker import HUNG, RESUME
from softmoe_train.plain import plain
from softmoe_train.sweep.ledger import Ledger
from softmoe_train.sweep.points import Point

State = Literal["complete", "running", "pending", "to do", "interrupted", "stopped", "failed"]
LOG = "output.log"  # of a point, in its folder: what it printed, attempt after attempt
ASKED_TO_END = (RESUME, *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)))
FOR_GOOD = (2, 3)  # a wrong setting, a run that stopped itself or found no memory: the next try would end as this one
TAIL = 4096  # bytes of a log


class Outcome(NamedTuple):
    """What became of a point in one start of its sweep. `code` is an exit code, None where nothing of it was started or has ended."""

    point: Point
    state: State
    code: int | None
    reason: str


class Launcher(Protocol):
    """Who starts points, and when the call returns: at their end, or as soon as they wait elsewhere ("pending", "running")."""

    def run(self, points: Sequence[Point], ledger: Ledger) -> list[Outcome]:
        """Have each point that is not complete run once at a time, as its failures so far allow."""
        ...


def step_of_run(point: Point) -> int:
    """How far its run has reported."""
    steps = summary_of(point.config).get("steps")
    return steps if isinstance(steps, int) else 0


def ended(point: Point, code: int) -> Outcome:
    """The outcome of an attempt that ended with this exit code (128 + n, or -n, for signal n)."""
    code = code if code >= 0 else 128 - code
    if code in (0, *ASKED_TO_END) and is_complete(point.config):  # it may be asked as it comes to its end
        return Outcome(point, "complete", code, "complete")
    if code in ASKED_TO_END:
        return Outcome(point, "interrupted", code, f"asked to end at step {step_of_run(point)}")
    if code == 0:
        return Outcome(point, "stopped", code, f"stopped at step {step_of_run(point)} of {point.config.steps}")
    return Outcome(point, "failed", code, _why(point, code))


def given_up(point: Point, ledger: Ledger, retries: int) -> Outcome | None:
    """The outcome of a point that has failed more often than it may; None of one that may be tried."""
    failed = ledger.failures(point)
    if len(failed) <= retries:
        return None
    last = failed[-1]
    why = f"failed {len(failed)} times with these settings, at last: {last.get('reason')}; give sweep.retries={len(failed)} to try it again"
    return Outcome(point, "failed", last.get("code") or 1, why)


def log_of(point: Point) -> Path:
    """Where all is that it printed."""
    return point.folder / LOG


def _why(point: Point, code: int) -> str:
    why = {2: "refused", 3: "stopped itself", HUNG: "hung", 128 + signal.SIGKILL: "was killed by SIGKILL"}.get(
        code, "failed" if code < 128 else f"was ended by signal {code - 128}"
    )
    said = summary_of(point.config).get("ended")
    last = said if isinstance(said, str) and said.startswith("failed") else _last_line(log_of(point))
    return plain(f"{why} (exit code {code})" + (f": {last}" if last else ""))


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
