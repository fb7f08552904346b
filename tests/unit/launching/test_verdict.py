"""From what thousands of ranks tell, the one that is at fault is named, and those that only waited for it are not."""

import time

import pytest

from softmoe_train.launching.facts import RankFacts, clock_of
from softmoe_train.launching.speed import Pair, Speed, partners
from softmoe_train.launching.traps import traps_in
from softmoe_train.launching.verdict import refusals, slow_ranks, warnings

RANKS, ON_HOST = 4096, 8


def facts(ranks: int = RANKS, **changes: dict[int, object]) -> list[RankFacts]:
    """Ranks on hosts of eight GPUs, all alike but for `changes`: a field's values by rank."""
    return [
        RankFacts(**{
            "rank": rank, "host": f"node{rank // ON_HOST}", "device": "GPU", "device_id": f"GPU-{rank}", "settings": "a", "versions": {"torch": "2.13.0"},
            "others": {"driver": "570"}, "environment": {}, "free_bytes": {"device": 80 * 2**30}, "cores": (96, 96), "threads": 8,
            "files": 2**20, "clock": (0.0, 0.001),
            **{field: values[rank] for field, values in changes.items() if rank in values},
        })
        for rank in range(ranks)
    ]  # fmt: skip


def speeds(slow: dict[int, float], links: dict[frozenset[int], float] | None = None, ranks: int = RANKS) -> list[Speed]:
    """Measurements in which a pair goes as fast as the slower of its ranks, or its link, allows."""
    rounds = partners(ranks, ON_HOST)

    def pair(a: int, b: int) -> float:
        return 1e9 * min(slow.get(a, 1.0), slow.get(b, 1.0), (links or {}).get(frozenset({a, b}), 1.0))

    return [
        Speed(
            rank=rank,
            alone={"matmul": 1e12},
            pairs=[Pair(partner=p, speed=pair(rank, p)) for p in (r[rank] for r in rounds) if p is not None],
        )
        for rank in range(ranks)
    ]


def test_a_rank_with_a_slow_network_is_named_and_its_partners_are_not() -> None:
    measured, ranks = speeds({1234: 0.3}), facts()
    began = time.process_time()
    found = slow_ranks(measured, ranks)
    assert time.process_time() - began < 1
    assert [line.partition(":")[0] for line in found] == [
        "rank 1234 (node154) is slow on its host",
        "rank 1234 (node154) is slow to other hosts",
    ]


def test_a_slow_link_between_two_good_ranks_is_named_as_a_link() -> None:
    (line,) = slow_ranks(speeds({}, {frozenset({800, 808}): 0.2}), facts())
    assert line.startswith("the link of rank 800 (node100) and rank 808 (node101) is slow: 0.20")


@pytest.mark.parametrize("ranks", [ON_HOST, 64])
def test_links_of_two_kinds_on_every_host_accuse_nobody_and_a_slow_one_is_still_named(ranks: int) -> None:
    bridges = {frozenset({rank, rank + 1}): 1.0 if rank % 2 == 0 else 0.1 for rank in range(ranks - 1)}
    between = {frozenset({rank, rank + 1}): 1.0 for rank in range(ON_HOST - 1, ranks - 1, ON_HOST)}
    assert slow_ranks(speeds({}, bridges | between, ranks), facts(ranks)) == []
    found = slow_ranks(speeds({}, bridges | between | {frozenset({1, 2}): 0.02}, ranks), facts(ranks))
    assert [line.partition(":")[0] for line in found] == (
        ["the link of rank 1 (node0) and rank 2 (node0) is slow"] if ranks > ON_HOST else []
    )


def test_every_rank_has_a_partner_at_most_once_a_round_and_rounds_do_not_grow_with_ranks() -> None:
    for size, on_host in ((2, 2), (3, 3), (7, 2), (16, 8), (4096, 8), (4096, 1)):
        rounds = partners(size, on_host)
        assert len(rounds) <= 4
        for one in rounds:
            assert all(partner is None or one[partner] == rank != partner for rank, partner in enumerate(one))
        assert {rank for one in rounds for rank in range(size) if one[rank] is not None} == set(range(size))


def test_who_has_which_version_is_told_and_no_run_starts_with_two() -> None:
    other = {rank: {"torch": "2.12.1"} for rank in range(16, 24)}
    (line,) = refusals(facts(64, versions=other))
    assert line == (
        "torch must be the same on every rank: ranks 0-15, 24-63 have 2.13.0; ranks 16-23 (node2) have 2.12.1"
    )
    assert refusals(facts()) == []


def test_two_ranks_on_one_device_are_refused() -> None:
    (line,) = refusals(facts(16, device_id={9: "GPU-8"}))
    assert line.startswith("ranks 8, 9 (node1) are on one device (GPU-8); start one process a GPU")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"clock": dict.fromkeys(range(8, 16), (5.0, 5.001))}, "the clock of node1 is 5.0 s ahead of rank 0's"),
        ({"host": {15: "node9"}}, "hosts have 8 ranks, but node1 has 7, node9 has 1"),
        ({"others": {3: {"driver": "535"}}}, "driver is not the same everywhere: ranks 0-2, 4-15 (node0, node1) have 570; rank 3 (node0) has 535"),
        ({"environment": {3: {"NCCL_ALGO": "Ring"}}}, "NCCL_ALGO is not set alike on all ranks: "),
        ({"environment": {rank: {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} for rank in range(16)}}, "every rank: CUDA_DEVICE_MAX_CONNECTIONS=1: all streams"),
        ({"free_bytes": {5: {"device": 2**30}}}, "rank 5 (node0) has less free device memory than the others"),
        ({"free_bytes": {rank: {"/dev/shm": 2**26, "device": 80 * 2**30} for rank in range(8)}}, "ranks 0-7 (node0) has less than 0.25 GiB of /dev/shm"),
        ({"files": {5: 256}}, "rank 5 (node0) may open less than 1024 files"),
        ({"device_id": dict.fromkeys(range(16)), "threads": {4: 90}}, "rank 4 (node0) computes with more threads"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_whose_it_is(changes: dict[str, dict[int, object]], told: str) -> None:
    found = warnings(facts(16, **changes), fsdp=True, workers=2)
    assert [line for line in found if line.startswith(told)], found
    assert warnings(facts(16), fsdp=True, workers=2) == []


def test_traps_are_told_only_where_they_are_some() -> None:
    environment = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_LAUNCH_BLOCKING": "1",
        "NCCL_IB_DISABLE": "1",
        "NCCL_DEBUG": "info",
        "NCCL_P2P_DISABLE": "0",
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    }
    everywhere = traps_in(environment, gpu=True, fsdp=True, hosts=2)
    assert [line.partition("=")[0] for line in everywhere] == [
        "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "NCCL_IB_DISABLE", "NCCL_DEBUG", "TORCH_DISTRIBUTED_DEBUG"
    ]  # fmt: skip
    assert len(traps_in(environment, gpu=True, fsdp=False, hosts=1)) == 3
    assert [line.partition("=")[0] for line in traps_in(environment, gpu=False, fsdp=True, hosts=2)] == [
        "TORCH_DISTRIBUTED_DEBUG"
    ]


def test_a_clock_is_bounded_by_rounds_that_all_ranks_were_in() -> None:
    # Seconds of one true clock at which rank 0 and another (2.5 s ahead) entered and left each round; one round was held up.
    ours = ((0.0, 0.010), (1.0, 1.9), (2.0, 2.001))
    theirs = ((0.009, 0.011), (1.0, 1.8), (2.0005, 2.0015))
    first, other = (
        facts(1, clock={0: tuple(ahead + t for one in rounds for t in one)})[0]
        for rounds, ahead in ((ours, 0.0), (theirs, 2.5))
    )
    clock = clock_of(other, first)
    assert clock.least <= 2.5 <= clock.most < clock.least + 0.003
    assert clock.off == clock.least > 2.49
