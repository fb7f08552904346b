"""This file owns what is made of the facts and measurements of all ranks: what refuses a run, what is a warning, and whose it is."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median_high

from softmoe_train.launching.collectives import Tried
from softmoe_train.launching.facts import RankFacts, clock_of
from softmoe_train.launching.speed import Speed
from softmoe_train.launching.traps import traps_in
from softmoe_train.plain import plain, ranks_in_words

CLOCK_SECONDS = 1.0
# Of the median; devices of one kind differ by a few percent, processors that others use too by more.
SLOW_ALONE = {"cuda": 0.85, "cpu": 0.6}
SLOW_PAIR = 0.5
ALIKE = "must be the same on every rank"
MOST = 8  # findings of one kind
# That hosts or ranks have of their own.
OWN = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
DISK_BYTES, SHARED_BYTES, GIB = 2**30, 2**28, 2**30


def refusals(facts: Sequence[RankFacts]) -> list[str]:
    """What no run should start with."""
    return differing({f.rank: f.versions for f in facts}, facts, ALIKE) + _shared_devices(facts)


def wrong_results(tried: Sequence[Sequence[Tried]]) -> list[str]:
    """Which collectives gave which ranks what nobody sent; `tried` by rank."""
    found = []
    for rank, ones in enumerate(tried):
        for one in ones:
            for dtype, whose in one.wrong.items():
                found.append(
                    f"{one.name} ({dtype}): rank {rank} got wrong values in the part of {whose}; do not train on it: "
                    f"look at the hosts, the driver and the network of these ranks"
                )
    return _first(found)


def warnings(facts: Sequence[RankFacts], *, fsdp: bool, workers: int) -> list[str]:
    """What a run can start with, and a person should know."""
    hosts = hosts_of(facts)
    found = _clocks(facts)
    sizes = Counter(len(ranks) for ranks in hosts.values())
    if len(sizes) > 1:
        usual = sizes.most_common(1)[0][0]
        few = [f"{host} has {len(ranks)}" for host, ranks in hosts.items() if len(ranks) != usual]
        found.append(f"hosts have {usual} ranks, but {', '.join(_first(few))}")
    found += differing({f.rank: {**f.others, "device": f.device} for f in facts}, facts, "is not the same everywhere")
    gpu = any(f.device_id for f in facts)
    traps: dict[str, list[int]] = defaultdict(list)
    for one in facts:
        for trap in traps_in(one.environment, gpu=gpu, fsdp=fsdp, hosts=len(hosts)):
            traps[trap].append(one.rank)
    found += [f"{_who(ranks, facts)}: {trap}" for trap, ranks in traps.items()]
    ours = {f.rank: {k: v for k, v in f.environment.items() if k not in OWN} for f in facts}
    return found + differing(ours, facts, "is not set alike on all ranks") + _lacks(facts, hosts, workers)


def slow_ranks(speeds: Sequence[Speed], facts: Sequence[RankFacts]) -> list[str]:
    """Ranks that are slower than the others by themselves, or with each of their partners, and pairs of which neither is."""
    found = []
    for what in speeds[0].alone if len(speeds) > 1 else ():
        rates = {s.rank: s.alone[what] for s in speeds}
        middle = median_high(rates.values())
        limit = SLOW_ALONE["cuda" if facts[0].device_id else "cpu"]
        found += _first(
            [
                f"{_who([rank], facts)} is slow by itself: its {what} runs at {rate / middle:.2f} of the median"
                for rank, rate in sorted(rates.items(), key=lambda item: item[1])
                if rate < limit * middle
            ]
        )
    return found + _slow_pairs(speeds, facts)


def _slow_pairs(speeds: Sequence[Speed], facts: Sequence[RankFacts]) -> list[str]:
    kinds: dict[bool, dict[tuple[int, int], float]] = {False: {}, True: {}}  # on one host, between two
    for speed in speeds:
        for pair in speed.pairs:
            ends = min(speed.rank, pair.partner), max(speed.rank, pair.partner)
            pairs = kinds[facts[ends[0]].host != facts[ends[1]].host]
            pairs[ends] = min(pair.speed, pairs.get(ends, pair.speed))
    found = []
    for between, pairs in kinds.items():
        middle = median_high(pairs.values()) if pairs else 0.0
        slow = {ends for ends, rate in pairs.items() if rate < SLOW_PAIR * middle}
        of_rank: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for ends in pairs:
            for rank in ends:
                of_rank[rank].append(ends)
        guilty = [rank for rank, ones in of_rank.items() if len(ones) > 1 and slow.issuperset(ones)]
        where = "to other hosts" if between else "on its host"
        found += _first(
            [
                f"{_who([rank], facts)} is slow {where}: {max(pairs[e] for e in of_rank[rank]) / middle:.2f} of the median with the "
                f"best of its {len(of_rank[rank])} partners"
                for rank in sorted(guilty)
            ]
        )
        found += _first(
            [
                f"the link of {_who([a], facts)} and {_who([b], facts)} is slow: {pairs[a, b] / middle:.2f} of the median"
                for a, b in sorted(slow)
                if a not in guilty and b not in guilty
            ]
        )
    return found


def hosts_of(facts: Iterable[RankFacts]) -> dict[str, list[int]]:
    """The ranks of each host."""
    hosts: dict[str, list[int]] = defaultdict(list)
    for one in facts:
        hosts[one.host].append(one.rank)
    return dict(hosts)


def differing(values: Mapping[int, Mapping[str, str]], facts: Sequence[RankFacts], rule: str) -> list[str]:
    """One line for each key that not all ranks have alike: who has what."""
    found = []
    for key in sorted({key for one in values.values() for key in one}):
        having: dict[str, list[int]] = defaultdict(list)
        for rank, one in values.items():
            having[one.get(key, "none")].append(rank)
        if len(having) > 1:
            told = [
                f"{_who(ranks, facts)} {'has' if len(ranks) == 1 else 'have'} {plain(v)}" for v, ranks in having.items()
            ]
            found.append(f"{key} {rule}: {'; '.join(_first(told))}")
    return found


def _shared_devices(facts: Sequence[RankFacts]) -> list[str]:
    sharing: dict[str, list[int]] = defaultdict(list)
    for one in facts:
        if one.device_id:
            sharing[one.device_id].append(one.rank)
    return [
        f"{_who(ranks, facts)} are on one device ({device}); start one process a GPU, and let each host's ranks see all of its GPUs or "
        f"one of their own each"
        for device, ranks in sharing.items()
        if len(ranks) > 1
    ]


def _clocks(facts: Sequence[RankFacts]) -> list[str]:
    off = {f.host: clock_of(f, facts[0]).off for f in facts}
    found = [
        f"the clock of {host} is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} rank 0's: have it follow a time server, or "
        f"time limits and logs will not agree"
        for host, seconds in off.items()
        if abs(seconds) > CLOCK_SECONDS
    ]
    return _first(found)


def _lacks(facts: Sequence[RankFacts], hosts: Mapping[str, list[int]], workers: int) -> list[str]:
    """What there may be too little of."""
    middle = median_high(f.free_bytes.get("device", 0) for f in facts)
    tests: list[tuple[str, Callable[[RankFacts], bool]]] = [
        (
            "has less free device memory than the others: another process may be on its device",
            lambda f: f.free_bytes.get("device", 0) < 0.9 * middle,
        ),
        (
            f"has less than {DISK_BYTES // GIB} GiB free where the run folder is",
            lambda f: f.free_bytes.get("run folder", DISK_BYTES) < DISK_BYTES,
        ),
        (
            f"has less than {SHARED_BYTES / GIB:g} GiB of /dev/shm, through which decode workers hand over batches (docker: --shm-size=8g)",
            lambda f: workers > 0 and f.free_bytes.get("/dev/shm", SHARED_BYTES) < SHARED_BYTES,
        ),
        (
            f"may open less than {max(1024, 8 * len(facts))} files at once, and has a connection to every rank for each process group (ulimit -n)",
            lambda f: 0 <= f.files < max(1024, 8 * len(facts)),
        ),
        (
            "computes with more threads than its host's ranks have cores; set OMP_NUM_THREADS to cores / ranks, or bind ranks to cores",
            lambda f: f.device_id is None and _too_many_threads(f, len(hosts[f.host])),
        ),
    ]
    found = []
    for told, lacks in tests:
        ranks = [f.rank for f in facts if lacks(f)]
        if ranks:
            found.append(f"{_who(ranks, facts)} {told}")
    return found


def _too_many_threads(facts: RankFacts, on_host: int) -> bool:
    ours, cores = facts.cores
    sharing = on_host if ours == cores else 1  # one that is bound to some cores has them for itself
    return facts.threads > 1 and facts.threads * sharing > ours


def _who(ranks: Sequence[int], facts: Sequence[RankFacts]) -> str:
    """`ranks 0-7 (node1)`; many hosts are not named."""
    hosts = list(dict.fromkeys(facts[rank].host for rank in ranks))
    every = len(ranks) == len(facts) > 1
    where = "" if every or len(hosts) > 3 else f" ({', '.join(map(plain, hosts))})"
    return ("every rank" if every else ranks_in_words(ranks)) + where


def _first(found: list[str]) -> list[str]:
    return (
        found if len(found) <= MOST else [*found[:MOST], f"and {len(found) - MOST} more like these, in preflight.json"]
    )
