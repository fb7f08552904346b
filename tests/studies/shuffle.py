"""How far apart a shuffle sets the neighbours of a shard, for windows, blocks and streams.

    python -m tests.studies.shuffle samples=1281167 shards=1281 batch=1024

Without a word those of ImageNet-1k in shards of 1,000. Nothing is read: the order is arithmetic. For each setting it prints, of neighbours in a
shard, the median distance in the sequence in batches, and the part that comes within one batch; and of a batch, from how many shards it is,
beside a full shuffle of all samples.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from softmoe_train.data.order import Order
from tests.studies.options import options_of

SETTINGS = [  # streams, shuffle_window, block
    (256, 1, 512), (256, 512, 512), (256, 4096, 512), (256, 4096, 64), (256, 4096, 8), (16, 4096, 512), (16, 16384, 512), (16, 4096, 64),
]  # fmt: skip


class Spread(NamedTuple):
    """What a shuffle does to neighbours of a shard, and to a batch."""

    median: float  # batches between two neighbours
    within: float  # the part of neighbours that one batch holds
    shards: float  # of a batch, on average


def spread_of(order: Order, batch: int) -> Spread:
    """Measured over the first epoch, of the neighbours in eight streams' parts of the tars and of 32 batches."""
    begins = np.cumsum(order.counts) - order.counts
    apart = []
    for stream in np.linspace(0, order.streams - 1, min(8, order.streams)).astype(int):
        own = np.arange(stream, order.total, order.streams)
        where = order.locate(own)
        by_place = np.argsort(begins[where.shard] + where.index)
        same = np.diff(where.shard[by_place]) == 0
        apart.append(np.abs(np.diff(own[by_place]))[same])
    starts = np.linspace(0, order.total - batch, 32).astype(int)
    shards = np.mean([len(np.unique(order.locate(start + np.arange(batch)).shard)) for start in starts])
    gaps = np.concatenate(apart)
    return Spread(float(np.median(gaps)) / batch, float((gaps < batch).mean()), float(shards))


def full_shuffle(counts: list[int], batch: int) -> Spread:
    """The same of a permutation of all samples, in closed form but for the rounding of its shards."""
    total, shards = sum(counts), len(counts)
    # |a - b| of two of N places: P(< d) = 1 - (1 - d / N)^2.
    return Spread(
        total * (1 - 0.5**0.5) / batch, 1 - (1 - batch / total) ** 2, shards * (1 - (1 - 1 / shards) ** batch)
    )


def lines(samples: int, shards: int, batch: int, settings: list[tuple[int, int, int]]) -> Iterator[str]:
    """The table."""
    counts = [len(part) for part in np.array_split(np.arange(samples), shards)]
    yield "| streams | shuffle_window | block | neighbours apart (median, batches) | in one batch | shards in a batch |"
    yield "|---|---|---|---|---|---|"
    for streams, window, block in settings:
        one = spread_of(Order(counts, streams=streams, window=window, block=block, seed=0), batch)
        yield f"| {streams} | {window:,} | {block} | {one.median:,.1f} | {100 * one.within:.2f} % | {one.shards:,.0f} |"
    one = full_shuffle(counts, batch)
    yield f"| a full shuffle | | | {one.median:,.1f} | {100 * one.within:.2f} % | {one.shards:,.0f} |"


def main(arguments: list[str]) -> None:
    """Print the table."""
    asked = {
        name: int(value)
        for name, value in options_of(arguments, {"samples": "1281167", "shards": "1281", "batch": "1024"}).items()
    }
    print(*lines(asked["samples"], asked["shards"], asked["batch"], SETTINGS), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
