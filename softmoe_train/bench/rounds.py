"""This file owns the measuring itself: sides timed in turn, so that what disturbs the machine disturbs all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Side(NamedTuple):
    """One of the things that are compared: `run` is timed, `reset` (which frees what `run` left) and `ready` are not."""

    name: str
    run: Callable[[], object]
    reset: Callable[[], object]


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)


@dataclass(frozen=True)
class Timings:
    """Seconds of every side, round by round: by the clock, and of processor time over all threads of this process."""

    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]

    def spread(self, side: str) -> Spread:
        """Seconds of one side."""
        return Spread.of(self.seconds[side])

    def ratio(self, other: str, ours: str) -> Spread:
        """How many times as long `other` takes as `ours`, of each round by itself: above 1 ours is the faster."""
        return Spread.of([a / b for a, b in zip(self.seconds[other], self.seconds[ours], strict=True)])

    def cpu_ratio(self, other: str, ours: str) -> Spread:
        """As `ratio`, of processor time: on a CPU that other programs use too it is the steadier of the two."""
        return Spread.of([a / b for a, b in zip(self.cpu_seconds[other], self.cpu_seconds[ours], strict=True)])

    def share(self, threads: int) -> float:
        """The part of `threads` processors that the sides got, all together; waiting for anything lowers it."""
        wall, cpu = (sum(map(sum, seconds.values())) for seconds in (self.seconds, self.cpu_seconds))
        return cpu / (threads * wall)

    def difference(self, more: str, less: str) -> Spread:
        """By how many seconds `more` exceeds `less`, of each round by itself."""
        return Spread.of([a - b for a, b in zip(self.seconds[more], self.seconds[less], strict=True)])


def no_reset() -> None:
    """The reset of a side that leaves nothing behind."""


def measure(
    sides: Sequence[Side],
    *,
    device: torch.device,
    rounds: int,
    warmup: int,
    ready: Callable[[], object] = no_reset,
    after: Callable[[], object] = no_reset,
) -> Timings:
    """Run every side once a round, in turn, the order reversed from round to round; `warmup` rounds are not kept.

    Neighbours in `sides` are neighbours in time, and each is as often first as second. `ready` comes before every timed
    run (a barrier between ranks, say), `after` at the end of every round (progress).
    """
    timings = Timings({side.name: [] for side in sides}, {side.name: [] for side in sides})
    with _no_collector():
        for i in range(warmup + rounds):
            for side in sides if i % 2 == 0 else reversed(sides):
                ready()
                cpu = time.process_time()
                took = timed(side.run, device)
                cpu = time.process_time() - cpu
                side.reset()
                if i >= warmup:
                    timings.seconds[side.name].append(took)
                    timings.cpu_seconds[side.name].append(cpu)
            after()
    return timings


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: by the host's clock on the CPU, by events around it on an idle CUDA device."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep Python's cycle collector out of the timed calls."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
