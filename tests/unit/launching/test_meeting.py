"""Workers of one start find each other in a store that is full of what earlier ones left."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from softmoe_train.dist import World
from softmoe_train.launching import meeting
from softmoe_train.launching.meeting import End, Meeting, by_torchrun, restart_of

Meet = Callable[..., "list[Future[Meeting]]"]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store of torchrun's agent, which outlives the workers."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    changes = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    return store


@pytest.fixture
def meet(agent: dist.TCPStore) -> Meet:
    """Starts ranks, by default all of a world on hosts of two, as threads; the first named comes first."""
    pool = ThreadPoolExecutor(16)

    def start(size: int, ranks: list[int], local_size: int = 2) -> "list[Future[Meeting]]":
        futures = []
        for rank in ranks:
            futures.append(pool.submit(Meeting, World(rank, size, rank % local_size, local_size)))
            time.sleep(0.1)
        return futures

    return start


def test_each_start_meets_in_a_place_of_its_own_whoever_comes_first(meet: Meet) -> None:
    places = set()
    for size, ranks in ((4, [0, 1, 2, 3]), (4, [3, 2, 1, 0]), (2, [1, 0]), (4, [2, 0, 1, 3])):
        there = [future.result(20) for future in meet(size, ranks)]
        assert all(one.hosts == [2] * (size // 2) for one in there)
        assert not there[0].store.check(["mine"])  # what an earlier start has left is elsewhere
        there[0].store.set("mine", "")
        assert all(one.store.check(["mine"]) for one in there)
        places |= {one._name for one in there}
    assert len(places) == 4


def test_a_rank_that_does_not_come_is_not_taken_for_the_one_before_it(
    meet: Meet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for future in meet(3, [0, 1, 2], 3):
        future.result(20)
    monkeypatch.setattr(meeting, "MEETING_SECONDS", 1.0)
    main, second = meet(3, [0, 1], 3)
    with pytest.raises(TimeoutError, match="2 of 3 ranks were here"):
        main.result(20)
    assert isinstance(second.exception(20), RuntimeError)  # it was welcomed, and nobody said who else is there


def test_a_smaller_world_has_the_first_ranks_of_each_host(meet: Meet) -> None:
    there = [future.result(20) for future in meet(6, list(range(6)), 2)]
    worlds = [one.part_of(3) for one in there[:3]]
    assert [(world.rank, world.size, world.local_size) for world in worlds] == [(0, 3, 2), (1, 3, 2), (2, 3, 1)]
    assert [one.first_on_host() for one in there] == [0, 0, 2, 2, 4, 4]


def test_those_who_wait_learn_how_the_others_ended(meet: Meet) -> None:
    main, _, spare = (future.result(20) for future in meet(3, [0, 1, 2], 3))
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(spare.wait_for_end)
        time.sleep(0.2)
        assert not waits.done()
        began = time.monotonic()
        main.end(End(75, for_good=True), followers=1)
        assert waits.result(5) == End(75, for_good=True)
    assert time.monotonic() - began < 5  # it knew that the spare had left


def test_a_spare_ends_when_the_others_are_started_again_without_it(meet: Meet) -> None:
    *_, spare = (future.result(20) for future in meet(2, [0, 1], 1))
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(spare.wait_for_end)
        (alone,) = meet(1, [0], 1)
        alone.result(20)
        with pytest.raises(ConnectionError, match="started again"):
            waits.result(10)


def test_torchruns_restarts_are_read_and_our_own_launcher_has_none() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert by_torchrun(torchrun) and restart_of(torchrun) == (1, 3)
    assert not by_torchrun({**torchrun, "SOFTMOE_LAUNCHER_PID": "7"})
    assert not by_torchrun({}) and restart_of({}) == (0, 0)
