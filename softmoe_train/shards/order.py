"""This file owns which picture goes into which shard: classes, a shuffle over all pictures, what is held out, and shards of even size.

All of it is arithmetic on the listings and the seed. Of each picture only numbers are kept in memory; its line is read again by
who writes it.

Letters: N pictures, S shards of a split.
"""

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from softmoe_train.data.keyed import chain, place_number
from softmoe_train.shards.look import Listed, listing_of, read_listed
from softmoe_train.shards.settings import Making, StoppedError
from softmoe_train.shards.source import LeftOut

I64 = NDArray[np.int64]
_NO_CLASS = -1


@dataclass(frozen=True)
class Listing:
    """Where the line of each picture is, its size in bytes, and its first class: arrays of N; and the names of the classes."""

    part: I64
    start: I64
    size: I64
    first: I64
    names: list[str] | None
    left_out: list[LeftOut]  # found by comparing pictures with each other

    def __len__(self) -> int:
        return len(self.part)


class Shard(NamedTuple):
    """A shard to be: its file name, and the pictures in it by part and start of their line."""

    name: str
    part: I64
    start: I64


class _Names:
    """Numbers of class names, in the order of their coming until all are known."""

    def __init__(self, known: list[str] | None) -> None:
        self.fixed = known is not None
        self.number: dict[str, int] = {name: n for n, name in enumerate(known or [])}

    def of(self, name: str) -> int | None:
        if name not in self.number and self.fixed:
            return None
        return self.number.setdefault(name, len(self.number))


def read_listing(folder: Path, parts: int, known: list[str] | None) -> Listing:
    """Go through the listings of all parts; raises StoppedError where numbers and names of classes are mixed."""
    names, left = _Names(known), []
    rows, hashes = array("q"), array("Q")
    numbered = named = None
    for part in range(parts):
        for start, listed in _lines(folder, part):
            unknown = next((name for name in listed.classes if names.of(name) is None), None)
            if unknown is not None:
                left.append(
                    LeftOut(listed.key, f"its class {unknown} is not among the {len(names.number)} class names")
                )
                continue
            if known is not None and listed.labels and max(listed.labels) >= len(known):
                left.append(
                    LeftOut(listed.key, f"label {max(listed.labels)} has no class name: there are {len(known)}")
                )
                continue
            numbered, named = numbered or (listed.labels and listed.key), named or (listed.classes and listed.key)
            label = listed.labels[0] if listed.labels else _NO_CLASS
            rows.extend((part, start, listed.size, names.number[listed.classes[0]] if listed.classes else label))
            hashes.append(xxhash.xxh3_64_intdigest(listed.key.encode()))
    if numbered and named and known is None:
        raise StoppedError(
            f"labels are class numbers ({numbered}) and class names ({named}): a column holds one kind; correct it, or give classes=FILE."
        )
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    twice, told = _twice(folder, columns[0], columns[1], np.array(hashes, np.uint64))
    part, start, size, first = (np.delete(column, twice) for column in columns)
    if named and known is None:  # numbers by the sorted names, now that all are known
        in_order = sorted(names.number)
        first = np.where(first >= 0, _ranks(names.number, in_order)[first], first)
        return Listing(part, start, size, first, in_order, left + told)
    return Listing(part, start, size, first, known, left + told)


def split(listing: Listing, making: Making) -> dict[str, I64]:
    """The numbers of the pictures of each split, shuffled over all; what is held out is of each class in proportion, to within one."""
    n = len(listing)
    order = np.arange(n)
    if making.seed is not None:
        order = np.argsort(chain(making.seed, place_number("order of shards"), order), kind="stable")
    count = held_out(n, making)
    if not count:
        return {making.name: order}
    if count >= n:
        raise StoppedError(
            f"{count} of {n} pictures would be held out, and none is left for {making.name}: hold out fewer."
        )
    by_class = order[np.argsort(listing.first[order], kind="stable")]
    place = np.arange(n)
    # Picture p of the pictures by class is held out where p * count / n passes a whole number: evenly over all of them.
    out = np.zeros(n, np.bool_)
    out[by_class] = (place + 1) * count // n > place * count // n
    return {making.name: order[~out[order]], making.held_out: order[out[order]]}


def held_out(n: int, making: Making) -> int:
    """How many of `n` pictures are held out."""
    if making.test_fraction is not None:
        return round(n * making.test_fraction)
    if making.test_every is not None:
        return n // making.test_every
    return making.test_count or 0


def cut(listing: Listing, splits: dict[str, I64], making: Making) -> list[Shard]:
    """The shards of all splits, their sizes differing by one at most in each."""
    shards = []
    train = splits[making.name]
    for name, order in splits.items():
        count = num_shards(listing, order, train, making)
        bounds = np.arange(count + 1) * len(order) // count
        for number in range(count):
            rows = order[bounds[number] : bounds[number + 1]]
            shards.append(Shard(f"{name}-{number:06d}.tar", listing.part[rows], listing.start[rows]))
    return shards


def num_shards(listing: Listing, order: I64, train: I64, making: Making) -> int:
    """S of a split: as asked of the training split, and of another so that its shards have that size."""
    if making.samples_per_shard is not None:
        count = -(-len(order) // making.samples_per_shard)
    elif making.shards is not None:
        count = round(making.shards * len(order) / len(train))
    else:
        assert making.shard_mib is not None
        count = -(-int(listing.size[order].sum()) // int(making.shard_mib * 2**20))
    return min(max(count, 1), len(order))


def _lines(folder: Path, part: int) -> Iterator[tuple[int, Listed]]:
    start = 0
    with open(listing_of(folder, part), "rb") as file:
        for line in file:
            yield start, read_listed(line)
            start += len(line)


def _ranks(coming: dict[str, int], in_order: list[str]) -> I64:
    """The place in the sorted names of each name by its coming."""
    place = {name: n for n, name in enumerate(in_order)}
    return np.asarray([place[name] for name in coming], np.int64)


def _twice(folder: Path, part: I64, start: I64, hashes: NDArray[np.uint64]) -> tuple[list[int], list[LeftOut]]:
    """The numbers of pictures whose key an earlier one has, and what is to be said of them."""
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    suspects = sorted({int(order[i]) for at in again for i in (at - 1, at)})
    first: dict[str, Listed] = {}
    twice, told = [], []
    for number in suspects:  # few, or the source is of no use
        listed = line_at(folder, int(part[number]), int(start[number]))
        if listed.key not in first:
            first[listed.key] = listed
        else:
            twice.append(number)
            told.append(LeftOut(_where(listed), f"its key {listed.key} is that of {_where(first[listed.key])}"))
    return twice, told


def line_at(folder: Path, part: int, start: int) -> Listed:
    """A picture by its part and the start of its line."""
    with open(listing_of(folder, part), "rb") as file:
        file.seek(start)
        return read_listed(file.readline())


def _where(listed: Listed) -> str:
    return f"{os.path.basename(listed.path)}@{listed.offset}" if listed.offset else listed.path
