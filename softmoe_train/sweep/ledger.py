"""This file owns the ledger of a sweep: what was planned, started and ended, a line each, by one process at a time.

Whether a point is complete is for its own run folder to say; the ledger tells how often it was tried and what came of it.
"""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from softmoe_train.config import ConfigError
from softmoe_train.faults.claim import claim
from softmoe_train.redact import without_secrets
from softmoe_train.sweep.points import Point

FILE = "ledger.jsonl"
Entry = dict[str, Any]  # "event", "label", "time", and what else the event has to tell


class Ledger:
    """The lines of one sweep. `broken` counts those that were passed over: torn, or foreign."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries, self.broken, self._torn = _read(path)

    def write(self, event: str, label: str, **facts: Any) -> None:
        """Add a line, which is on the disk when this returns; raises OSError where it is not, or not all of it."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry: Entry = {"event": event, "label": label, "time": now, **facts}
        new = not self._path.exists()
        with self._path.open("ab", buffering=0) as file:
            # A line of its own, whatever a kill or a full disk has left before it.
            line = b"\n" * self._torn + json.dumps(entry).encode() + b"\n"
            self._torn = True
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "only a part of a line was written", str(self._path))
            os.fsync(file.fileno())
            self._torn = False
        if new:
            _sync_folder(self._path.parent)
        self.entries.append(entry)

    def of(self, label: str, event: str | None = None) -> list[Entry]:
        """What was written of a point, in its order."""
        return [one for one in self.entries if one["label"] == label and event in (None, one["event"])]

    def plan(self, point: Point) -> None:
        """Note a point with its settings, where that is news."""
        before = self.of(point.label, "planned")
        overrides = without_secrets(point.overrides)
        if not before or (before[-1].get("digest"), before[-1].get("overrides")) != (point.digest, overrides):
            self.write("planned", point.label, digest=point.digest, overrides=overrides)

    def start(self, point: Point, **facts: Any) -> int:
        """Note that a point starts, in a process or a job that `facts` name; returns which attempt it is, from 1."""
        attempt = len(self.of(point.label, "started")) + 1
        self.write("started", point.label, attempt=attempt, digest=point.digest, host=socket.gethostname(), **facts)
        return attempt

    def end(self, point: Point, state: str, *, code: int | None, reason: str, step: int, **facts: Any) -> None:
        """Note how an attempt ended, in the job that `facts` name, where it was one."""
        self.write("ended", point.label, state=state, code=code, reason=reason, step=step, digest=point.digest, **facts)

    def failures(self, point: Point) -> list[Entry]:
        """The attempts of a point with its present settings that failed; what was cut off or asked to end did not."""
        return [
            one
            for one in self.of(point.label, "ended")
            if one.get("state") == "failed" and one.get("digest") == point.digest
        ]


@contextmanager
def open_ledger(folder: Path) -> Iterator[Ledger]:
    """The ledger of the sweep in `folder`, held by this process to the end of the block; raises ConfigError where another has it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(claim(folder))
        except BlockingIOError as error:
            raise ConfigError([f"this sweep is under way: {error}"]) from None
        yield Ledger(folder / FILE)


def _read(path: Path) -> tuple[list[Entry], int, bool]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], 0, False
    entries, broken = [], 0
    for line in filter(None, raw.split(b"\n")):
        entry = _entry(line)
        broken += entry is None
        entries += [entry] if entry is not None else []
    return entries, broken, bool(raw) and not raw.endswith(b"\n")


def _entry(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
        whole = isinstance(entry["event"], str) and isinstance(entry["label"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry if whole else None


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
