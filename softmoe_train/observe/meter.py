"""This file owns the clock of a run: images per second, what a step takes, how long it waits for data, peak memory."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

GIB = 2**30
STALL_SHARE, STALL_REPORTS = 0.15, 3
_REMEDY = (
    "raise data.workers as far as there are cores, or decode less by data.scaled_decode=true and data.train_transform.arithmetic=uint8; "
    "softmoe bench stream tells what takes how long"
)


class Meter:
    """Measures the steps between two reports without a host sync of its own.

    On a GPU, steps are queued ahead of the host's clock: read the step's tensors (which waits for them) before `read`.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device = device
        self._clock = clock
        self._restart()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        begin = self._clock()
        try:
            yield
        finally:
            self._data_seconds += self._clock() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of every rate: evaluations and saves are not steps."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - begin

    def step(self, images: int) -> None:
        """Count one finished step of `images` images (the global batch, for the rate of the whole run)."""
        self._steps += 1
        self._images += images

    def read(self) -> dict[str, float]:
        """The rates since the last read (none without a step) and the peak memory so far; starts the next interval.

        Seconds are means per step, `perf/data_share` is the part of a step that waited for data, memory is in GiB.
        """
        metrics = {}
        seconds = self._clock() - self._begin - self._paused_seconds
        if self._steps and seconds > 0:
            metrics = {
                "perf/images_per_second": self._images / seconds,
                "perf/step_seconds": seconds / self._steps,
                "perf/data_seconds": self._data_seconds / self._steps,
                "perf/data_share": self._data_seconds / seconds,
            }
        metrics["perf/peak_memory_gib"] = peak_memory_bytes(self._device) / GIB
        self._restart()
        return metrics

    def _restart(self) -> None:
        self._begin = self._clock()
        self._steps = 0
        self._images = 0
        self._data_seconds = 0.0
        self._paused_seconds = 0.0


class StallWatch:
    """Says once that steps wait for data, when they did in several reports in a row, and again when it has been well in between."""

    def __init__(self) -> None:
        self._stalled = 0
        self._first = True  # its interval holds the start of the workers

    def see(self, metrics: Mapping[str, float]) -> str | None:
        """What to tell people after this report, if anything."""
        share = metrics.get("perf/data_share")
        if share is None:
            return None
        first, self._first = self._first, False
        if first or share <= STALL_SHARE:
            self._stalled = 0
            return None
        self._stalled += 1
        if self._stalled != STALL_REPORTS:
            return None
        return (
            f"steps wait for data: {100 * share:.0f} % of the time ({1e3 * metrics['perf/data_seconds']:.0f} ms a step), and in each of the last "
            f"{STALL_REPORTS} reports more than {100 * STALL_SHARE:.0f} %; {_REMEDY}"
        )


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: torch's on a CUDA device, all that was resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
