"""This file owns the account of a start: from the first instant of the process to the end of its first step, part by part."""

import os
import time
from pathlib import Path

IMPORTED = time.perf_counter()  # where nothing tells when the process began, its account begins here


class Startup:
    """A clock that is told when each part of a start is done; a part lasts from the end of the one before."""

    def __init__(self, launcher: int | None) -> None:
        self.parts: dict[str, float] = {}  # seconds
        self._latest = self._began = process_began(os.getpid()) or IMPORTED
        launched = None if launcher is None else process_began(launcher)
        if launched is not None:
            self._began = launched
            self.parts["launcher"] = self._latest - launched

    def done(self, part: str) -> None:
        """`part` ends now."""
        now = time.perf_counter()
        self.parts[part] = now - self._latest
        self._latest = now

    def __str__(self) -> str:
        named = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"first step {self._latest - self._began:.1f} s after the start: {named}"


def process_began(pid: int) -> float | None:
    """When a process of this machine began, to 10 ms, on the clock of `time.perf_counter`; None where Linux does not tell."""
    try:
        # Field 22 of proc(5); the name in front of it may hold spaces and brackets.
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return time.perf_counter() - age
