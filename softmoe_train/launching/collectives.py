"""This file owns the trial of the collectives that a run uses: whether they are right to the bit, and how many bytes a second they move."""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from softmoe_train.config import Record
from softmoe_train.launching.speed import finish, release
from softmoe_train.plain import plain, ranks_in_words

CHECKED = (torch.float32, torch.bfloat16, torch.int64)
TIMES = 5
SAID = 120  # characters
REDUCED_BYTES = {"cuda": 2**26, "cpu": 2**22}
CHECKED_BYTES = 2**22  # of int64: the numbers that tell whether it is right need several times what is exchanged
CHUNK = 8  # elements for each rank of an all-to-all that is only to be right
EXACT = 251  # whole numbers below it are exact in every dtype
Collective = Callable[[ProcessGroup, Tensor], Tensor]


class Tried(Record):
    """What one rank found of one collective."""

    name: str
    first: int  # of its ranks: a list of them, from each of them, would be millions
    last: int
    ranks: int  # how many
    bytes: int  # given by each rank
    speed: float  # bytes a second that leave it, by the median
    wrong: dict[str, str]  # by dtype, the ranks whose part is not what it must be, in a few words


def try_collectives(
    device: torch.device, expert_axis: ProcessGroup, slots_bytes: int, dtype: torch.dtype
) -> list[Tried]:
    """All-reduce and all-to-all over all ranks, and the latter over the expert axis with the slots of a rank; collective."""
    world = dist.group.WORLD
    assert isinstance(world, ProcessGroup), world
    found = [
        _tried("all-reduce over all ranks", world, all_reduce, device, REDUCED_BYTES[device.type], torch.float32),
        _tried("all-to-all over all ranks", world, all_to_all, device, 0, torch.float32),
    ]
    if slots_bytes and dist.get_world_size(expert_axis) > 1:
        found.append(_tried("all-to-all over the expert axis", expert_axis, all_to_all, device, slots_bytes, dtype))
    release(device)
    return found


def all_reduce(group: ProcessGroup, given: Tensor) -> Tensor:
    """The sum of what all give."""
    dist.all_reduce(given, group=group)
    return given


def all_to_all(group: ProcessGroup, given: Tensor) -> Tensor:
    """An equal part of what each gives."""
    got = torch.empty_like(given)
    dist.all_to_all_single(got, given, group=group)
    return got


def _tried(
    name: str, group: ProcessGroup, collective: Collective, device: torch.device, count: int, dtype: torch.dtype
) -> Tried:
    ranks = dist.get_process_group_ranks(group)
    size, summed = len(ranks), collective is all_reduce
    elements = max(CHUNK, count // dtype.itemsize // size) * size
    checking = max(CHUNK, min(count, CHECKED_BYTES) // torch.int64.itemsize // size) * size
    wrong: dict[str, str] = {}
    for checked in dict.fromkeys((dtype, *CHECKED)):  # in one order on every rank
        given, expected, source = _pattern(checking, dist.get_rank(group), size, summed, device)
        got = collective(group, given.to(checked))
        off = source[got != expected.to(checked)].unique().tolist()
        if off:
            wrong[str(checked).removeprefix("torch.")] = plain(ranks_in_words(ranks[rank] for rank in off), SAID)
    handed = elements * dtype.itemsize
    leaving = handed * (size - 1) / size * (2 if summed else 1)
    speed = leaving / _seconds(group, collective, torch.zeros(elements, dtype=dtype, device=device))
    return Tried(name=name, first=ranks[0], last=ranks[-1], ranks=size, bytes=handed, speed=speed, wrong=wrong)


def _pattern(elements: int, me: int, size: int, summed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What this rank gives, what it must get, and from which rank each element of that is.

    In a sum each element is of one rank, the others give zero: exact in any dtype, and whose part is missing or twice there shows.
    """
    place = torch.arange(elements, device=device)
    if summed:
        source = place % size
        value = place % EXACT + 1
        return torch.where(source == me, value, 0), value, source
    part = elements // size
    source = place // part
    given = (place * 3 + me * 17) % EXACT  # each rank another number at each place
    return given, ((me * part + place % part) * 3 + source * 17) % EXACT, source


def _seconds(group: ProcessGroup, collective: Collective, given: Tensor) -> float:
    seconds = []
    for _ in range(TIMES + 1):
        finish(given.device)
        began = time.perf_counter()
        collective(group, given)
        finish(given.device)
        seconds.append(time.perf_counter() - began)
    return max(median(seconds[1:]), 1e-9)  # the first connects
