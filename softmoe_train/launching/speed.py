"""This file owns how fast a rank is by itself and with its neighbours, measured so that the slow one can be told from those beside it.

A rank that waits for another looks as slow as that one. So what it computes and copies is measured while it waits for nobody; and of
the network, pairs: every rank with several partners in turn, all pairs of a round at once. Who is slow with each partner is slow, and
a partner who is not with others is not. The rounds are as many for a thousand ranks as for four.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from softmoe_train.config import Record
from softmoe_train.dist import World

WINDOWS, WINDOW_SECONDS = 5, 0.1
MATRIX = {"cuda": 4096, "cpu": 384}  # rows and columns: on a CPU a few milliseconds
COPIED_BYTES = {"cuda": 2**28, "cpu": 2**24}
PINNED_BYTES = 2**25  # stay pinned for the life of the process, since torch keeps them
PAIR_BYTES = {"cuda": 2**25, "cpu": 2**20}
PAIR_TIMES = 4
MIB = 2**20


class Pair(Record):
    """What one rank measured with one partner: bytes a second, each way."""

    partner: int
    speed: float


class Speed(Record):
    """How fast one rank is."""

    rank: int
    alone: dict[str, float]  # FLOP or bytes a second, by what was measured
    pairs: list[Pair]


def speed_of_rank(world: World, device: torch.device, dtype: torch.dtype, on_host: int) -> Speed:
    """Measure this rank alone and with its partners, `on_host` the ranks that a host has at most; collective."""
    found = Speed(rank=world.rank, alone=_alone(device, dtype), pairs=_pairs(world, device, on_host))
    release(device)
    return found


def partners(size: int, on_host: int) -> list[list[int | None]]:
    """The partner of each rank, round by round: neighbours on both sides, then the same place on the hosts on both sides."""
    rounds = []
    for distance in (1, on_host) if 1 < on_host < size else (1,):
        for first in (0, 1):
            found: list[int | None] = [None] * size
            for rank in range(size):
                if (rank // distance) % 2 == first and rank + distance < size:
                    found[rank], found[rank + distance] = rank + distance, rank
            if any(partner is not None for partner in found):
                rounds.append(found)
    return rounds


def per_second(work: Callable[[], object], device: torch.device) -> float:
    """How often a second `work` is done, by the median of windows: what stops a rank now and then shows, what stops it once does not."""
    work()
    rates = []
    for _ in range(WINDOWS):
        finish(device)
        began, times = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < WINDOW_SECONDS:
            for _ in range(4):
                work()
            finish(device)
            times += 4
        rates.append(times / passed)
    return median(rates)


def _alone(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    n, count = MATRIX[device.type], COPIED_BYTES[device.type]
    own = torch.Generator(device).manual_seed(0)  # a preflight draws nothing from the run's
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=own) for _ in range(2))
    out = torch.empty_like(a)
    here, there = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    rates = {
        "matmul": 2 * n**3 * per_second(lambda: torch.mm(a, b, out=out), device),
        "copy": count * per_second(lambda: there.copy_(here), device),
    }
    if device.type == "cuda":
        on_host, there = torch.zeros(PINNED_BYTES, dtype=torch.uint8, pin_memory=True), there[:PINNED_BYTES]
        rates["from the host"] = PINNED_BYTES * per_second(lambda: there.copy_(on_host, non_blocking=True), device)
    return rates


def _pairs(world: World, device: torch.device, on_host: int) -> list[Pair]:
    sent = torch.zeros(PAIR_BYTES[device.type], dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    found = []
    for partner in (round_[world.rank] for round_ in partners(world.size, on_host)):
        if partner is not None:
            swap(sent, received, partner)  # the first message also connects
        finish(device)
        dist.all_reduce(torch.zeros(1))  # all begin together
        if partner is None:
            continue
        began = time.perf_counter()
        for _ in range(PAIR_TIMES):
            swap(sent, received, partner)
        finish(device)
        found.append(Pair(partner=partner, speed=PAIR_TIMES * sent.numel() / (time.perf_counter() - began)))
    return found


def swap(sent: Tensor, received: Tensor, partner: int) -> None:
    """Give a partner what it gives at the same time."""
    both = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def release(device: torch.device) -> None:
    """Give back what was measured with: torch would keep it, in blocks that may not be those the run needs."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
