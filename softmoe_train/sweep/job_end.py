"""This file owns what became of a job that is over: by the notes of its tasks, and else by what SLURM remembers."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from softmoe_train.at_end import is_complete
from softmoe_train.sweep.outcome import Outcome, ended, step_of_run
from softmoe_train.sweep.points import Point
from softmoe_train.sweep.slurm_queue import restarts_of, state_of

# How jobs end that did not fail.
OF_NO_POINT = ("TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "REVOKED")
BY_ITSELF = ("COMPLETED", "FAILED")  # its tasks have noted something
ENDS = (*OF_NO_POINT, *BY_ITSELF, "OUT_OF_MEMORY")  # every other state is of a job that lives
DISK_SECONDS = 15.0  # until what another host has written is seen here


class JobEnd(NamedTuple):
    """The outcome of a job, and whether its time was up or another job took its nodes, so that it is to go on by itself."""

    outcome: Outcome
    goes_on: bool


class Note(NamedTuple):
    """How one task ended: its exit code, what had asked it to end."""

    rank: int
    code: int
    asked: str | None
    time: float
    requeued: bool  # had SLURM start the job again


def end_of(point: Point, number: str, folder: Path) -> JobEnd | None:
    """What became of job `number`, whose notes are in `folder`; None while it is not over."""
    state = state_of(number)
    if state is not None and not state.startswith(ENDS):
        return None
    restarts = restarts_of(number)
    notes, until = notes_of(number, folder, restarts), time.monotonic() + DISK_SECONDS
    while not notes and (state or "").startswith(BY_ITSELF) and time.monotonic() < until:
        time.sleep(0.5)
        notes = notes_of(number, folder, restarts)
    bad = [note for note in notes if note.code]
    if is_complete(point.config):
        return JobEnd(Outcome(point, "complete", 0, "complete"), False)
    if not notes:
        return _by_slurm(point, number, folder, state)
    if not bad:
        return JobEnd(ended(point, 0), False)
    # The first that failed; the others were ended because of it.
    first = min(bad, key=lambda note: (ended(point, note.code).state != "failed", note.time))
    outcome = ended(point, first.code)
    if first.rank and outcome.state == "failed":
        log = point.folder / f"output.{first.rank}.log"
        outcome = outcome._replace(reason=f"rank {first.rank} {outcome.reason} ({log})")
    cancelled = first.asked == "SIGTERM" and (state is None or state.startswith("CANCELLED"))  # and else preempted
    return JobEnd(outcome, outcome.state == "interrupted" and not cancelled)


def notes_of(number: str, folder: Path, restarts: int | None) -> list[Note]:
    """How the tasks of a job ended in its last start; nothing where that is not known: it left no note, or had itself requeued.

    `restarts` is how often SLURM says that it was started again, None where that is forgotten.
    """
    found: dict[int, list[Note]] = {}
    for path in folder.glob(f"{number}_*_*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            mine = found.setdefault(int(path.stem.split("_")[1]), [])  # a torn note tells at least of a start
            note = json.loads(path.read_text())
            asked = next(iter(note["asked"]), None)
            mine.append(
                Note(int(note["rank"]), int(note["code"]), asked, float(note["time"]), note["requeued"] is True)
            )
    notes = found.get(max([*found, restarts or 0]), [])
    return [] if any(note.requeued for note in notes) else notes


def _by_slurm(point: Point, number: str, folder: Path, state: str | None) -> JobEnd:
    """Of a job that was killed before a task of its last start could note anything, or never began."""
    if state == "COMPLETED":
        return JobEnd(ended(point, 0), False)
    if state is None or state.startswith(OF_NO_POINT):
        reason = f"job {number} is gone at step {step_of_run(point)} ({state or 'SLURM has forgotten it'})"
        return JobEnd(Outcome(point, "interrupted", None, reason), state in ("TIMEOUT", "PREEMPTED"))
    return JobEnd(Outcome(point, "failed", 1, f"job {number} ended with {state}; its own output is in {folder}"), False)
