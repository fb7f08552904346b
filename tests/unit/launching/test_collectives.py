"""What the trial of the collectives costs each of many ranks, told without those ranks: nothing here is sent."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from softmoe_train.launching import collectives
from softmoe_train.launching.collectives import try_collectives
from softmoe_train.launching.preflight import Measured, document
from softmoe_train.launching.speed import Pair, Speed
from tests.unit.launching.test_verdict import facts

CPU = torch.device("cpu")


@contextmanager
def made_up(ranks: int) -> Iterator[ProcessGroup]:
    """The world of the first of so many ranks, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def peak(exchanged: int) -> int:
    """The bytes that the trial of an exchange of so many has allocated at most, at once."""
    with made_up(8) as group, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        try_collectives(CPU, group, exchanged, torch.bfloat16)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_a_large_exchange_needs_no_more_than_what_is_given_and_got(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "TIMES", 1)
    exchanged = 2**25
    assert 2 * exchanged <= peak(exchanged) < 3 * exchanged


def told(ranks: int) -> tuple[int, int]:
    """The bytes that so many ranks send to rank 0, and those of the file that it keeps, where every collective is wrong."""
    with made_up(ranks) as group:
        tried = try_collectives(CPU, group, 2**16, torch.bfloat16)
    assert all(one.wrong for one in tried)
    speed = Speed(rank=0, alone={"matmul": 1e12 / 3}, pairs=[Pair(partner=1, speed=1e9 / 3)] * 4)
    measured = [Measured(speed=speed, tried=tried)] * ranks
    return sum(len(one.model_dump_json()) for one in measured), len(document({}, facts(ranks), measured))


def test_what_all_ranks_tell_grows_as_their_number_and_not_as_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "TIMES", 1)
    for fewer, more in zip(told(1024), told(2048), strict=True):
        assert more < 2.5 * fewer
        assert more < 2048 * 4096
