"""This file owns what is told of a hang: where each rank is, which of them the others wait for, in one line for people."""

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from types import FrameType
from typing import NamedTuple

from softmoe_train.plain import ranks_in_words

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# A main thread in or under one of these waits for other ranks, or for what they send.
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", f"{PACKAGE}/dist.py", f"{PACKAGE}/parallel/")
MOST_PLACES = 6  # in one line; the stacks have them all


class Report(NamedTuple):
    """Where one rank is, since when, after which step; whether it waits for others there."""

    rank: int
    step: int
    waits: bool
    place: str
    seconds: float  # since something moved

    def to_line(self) -> str:
        """As a line of JSON."""
        return json.dumps(self)

    @classmethod
    def from_line(cls, line: str) -> "Report":
        """What `to_line` wrote."""
        rank, step, waits, place, seconds = json.loads(line)
        return cls(int(rank), int(step), bool(waits), str(place), float(seconds))

    def __str__(self) -> str:
        return f"rank {self.rank} {_doing([self.rank], self.step, self.waits, self.place)}"


def report_of(rank: int, step: int, frame: FrameType | None, seconds: float) -> Report:
    """Where `frame`, the innermost of the main thread, stands in our code, and what it called there."""
    frames = list(_outward(frame))
    if not frames:
        return Report(rank, step, waits=False, place="no Python code", seconds=seconds)
    own = next((i for i, (path, _, _) in enumerate(frames) if path.startswith(f"{PACKAGE}{os.sep}")), 0)
    path, line, name = frames[own]
    waits = any(mark in path for path, _, _ in frames[: own + 1] for mark in COLLECTIVES)
    where = f"{name} ({os.path.relpath(path, os.path.dirname(PACKAGE))}:{line})"
    return Report(rank, step, waits, where if own == 0 else f"{frames[0][2]} called by {where}", seconds)


def suspects(reports: Sequence[Report], size: int) -> list[int]:
    """The ranks that the others seem to wait for; none where all are alike.

    Those that say nothing; else those that wait for nobody while others do; else those at an earlier step.
    """
    silent = sorted(set(range(size)) - {report.rank for report in reports})
    busy = [report.rank for report in reports if not report.waits]
    first = min(report.step for report in reports)
    late = [report.rank for report in reports if report.step == first]
    return next((found for found in (silent, busy, late) if 0 < len(found) < size), [] if size > 1 else [0])


def told(reports: Sequence[Report], size: int, processes: Mapping[int, str]) -> str:
    """Where all `size` ranks are, suspects first; `processes` says which process on which host a rank is."""
    places: dict[tuple[int, bool, str], list[int]] = {}
    for report in sorted(reports):
        places.setdefault((report.step, report.waits, report.place), []).append(report.rank)
    suspected = suspects(reports, size)
    order = sorted(places.items(), key=lambda item: (item[1][0] not in suspected, len(item[1])))
    silent = sorted(set(range(size)) - {report.rank for report in reports})
    parts = [f"{_named(silent, processes)} gave no sign of life"] if silent else []
    for (step, waits, place), ranks in order[:MOST_PLACES]:
        who = _named(ranks, processes if ranks[0] in suspected else {})
        parts.append(f"{who} {_doing(ranks, step, waits, place)}")
    if len(order) > MOST_PLACES:
        parts.append(f"others are in {len(order) - MOST_PLACES} more places")
    return "; ".join(parts)


def duration(seconds: float) -> str:
    """Minutes, or seconds where there are few."""
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _outward(frame: FrameType | None) -> Iterable[tuple[str, int, str]]:
    """(file, line, function) of a frame and of those that called it."""
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name
        frame = frame.f_back


def _doing(ranks: Sized, step: int, waits: bool, place: str) -> str:
    one = len(ranks) == 1
    verb = ("waits" if one else "wait") if waits else ("is" if one else "are")
    return f"{verb} in {place} after step {step}"


def _named(ranks: Collection[int], processes: Mapping[int, str]) -> str:
    """`rank 3 (process 12 on node7)`, or `ranks 0-4, 7`."""
    if len(ranks) == 1:
        (rank,) = ranks
        return f"rank {rank}" + (f" ({processes[rank]})" if rank in processes else "")
    return ranks_in_words(ranks)
