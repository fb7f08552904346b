"""This file owns which worlds are legal: the numbers of ranks that a run's settings allow, found by asking the rules one by one."""

import math
from collections.abc import Iterator, Mapping
from itertools import islice

from softmoe_train.data import check_streams
from softmoe_train.parallel.layout import layout_problems
from softmoe_train.settings import RunConfig, check, compute_problems

MOST_NAMED = 3  # of the worlds larger than the one that is there

# What else is to run in the same world, by its name: the fine-tunings at the end.
Others = Mapping[str, RunConfig]
NONE: Others = {}


def world_problems(config: RunConfig, size: int, local_size: int | None, others: Others = NONE) -> list[str]:
    """Why these settings, or those of `others`, do not go with `size` ranks, of which `local_size` (None: not known) can be taken for a host's."""
    problems = check_streams(config.data.streams, config.batch_size, size)
    problems += compute_problems(config, size, local_size or 1)
    # What a single host tells by itself; of several, all must have told.
    problems += layout_problems(config.parallel, num_experts=config.model.num_experts, size=size, local_size=local_size)
    problems += [f"{name}: {told}" for name, one in others.items() for told in world_problems(one, size, local_size)]
    return list(dict.fromkeys(problems))


def legal_worlds(config: RunConfig, hosts: list[int], others: Others = NONE) -> list[int]:
    """The numbers of ranks that could train on these hosts, each given by its ranks, filled in their order."""
    sizes = range(1, sum(hosts) + 1)
    return [size for size in sizes if _is_legal(config, size, math.gcd(*shares(hosts, size)), others)]


def larger_worlds(config: RunConfig, above: int, others: Others = NONE) -> Iterator[int]:
    """The legal worlds of more ranks than that, on hosts that nobody has seen yet."""
    return (size for size in range(above + 1, config.batch_size + 1) if _is_legal(config, size, None, others))


def shares(hosts: list[int], size: int) -> list[int]:
    """How many of the first `size` ranks each host has, without those that have none."""
    left, found = size, []
    for ranks in hosts:
        found.append(min(ranks, left))
        left -= found[-1]
    return [share for share in found if share]


def lasting_problems(config: RunConfig, size: int, local_size: int) -> list[str]:
    """The mistakes that another number of ranks would not heal; all of them where there is no legal number."""
    problems = check(config, size, local_size)
    if next(larger_worlds(config, 0), None) is None:
        return problems
    of_world = world_problems(config, size, local_size if local_size == size else None)
    return [problem for problem in problems if problem not in of_world]


def common_problems(config: RunConfig, others: Others) -> list[str]:
    """Why no number of ranks is legal for a run and for what follows it in the same world; empty where one of them has none by itself."""
    alone = [config, *others.values()]
    if not others or any(next(larger_worlds(one, 0), None) is None for one in alone):
        return []
    if next(larger_worlds(config, 0, others), None) is not None:
        return []
    worlds = "; ".join(f"{name}: {', '.join(map(str, larger_worlds(one, 0)))}" for name, one in others.items())
    return [
        f"{', '.join(others)}: no number of ranks is legal for the run ({', '.join(map(str, larger_worlds(config, 0)))}) and for what follows "
        f"it in the same world ({worlds}); give them data.streams and a batch_size with a common divisor that the layouts allow"
    ]


def told(config: RunConfig, hosts: list[int], legal: list[int], others: Others = NONE) -> str:
    """What a person is told of a world that is not legal: why, which are, and who trains meanwhile."""
    size = sum(hosts)
    why = "; ".join(world_problems(config, size, math.gcd(*hosts), others))
    larger = list(map(str, islice(larger_worlds(config, size, others), MOST_NAMED + 1)))
    worlds = ", ".join([*map(str, legal), *larger[:MOST_NAMED], *["..." for _ in larger[MOST_NAMED:]]])
    said = f"WORLD_SIZE={size} is not legal ({why}); the legal worlds are {worlds}"
    if not legal:
        return f"{said}: too few ranks"
    ranks = "rank" if size - legal[-1] == 1 else "ranks"
    spares = ", ".join(map(str, range(legal[-1], size))) if size - legal[-1] < 9 else f"{legal[-1]} to {size - 1}"
    return f"{said}: training on {legal[-1]}, {ranks} {spares} {'wait as spares' if ranks == 'ranks' else 'waits as a spare'}"


def _is_legal(config: RunConfig, size: int, local_size: int | None, others: Others) -> bool:
    # The streams alone leave few, in a glance.
    for one in (config, *others.values()):
        if check_streams(one.data.streams, one.batch_size, size):
            return False
    return not world_problems(config, size, local_size, others)
