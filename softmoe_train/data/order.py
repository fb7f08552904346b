"""This file owns the order of training samples: arithmetic from (seed, global sample g) to a stored sample.

Training is one endless sequence. Epoch e holds g in [eN, (e+1)N) and sample g belongs to stream g mod L. In each
epoch the N stored samples, shards permuted by (seed, epoch), are cut into L contiguous slices, one a stream, with as
many samples as the stream has g's in the epoch. Inside a slice, blocks of consecutive samples are permuted, and then
the samples inside each window. There is no buffer, so any position can be computed without the ones before it.

Letters: N stored samples, L streams, e epoch, j the position of a sample in its stream's slice.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softmoe_train.data.keyed import chain, permute

I64 = NDArray[np.int64]

_SHARDS, _BLOCKS, _WINDOW = 1, 2, 3  # the three places where the order is permuted


class Location(NamedTuple):
    """Where samples are stored: shard numbers and the index of each sample in its shard."""

    shard: I64
    index: I64


class Order:
    """The endless order of the samples of shards with `counts` samples; raises ValueError where there are none."""

    def __init__(self, counts: list[int], *, streams: int, window: int, block: int, seed: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.total = int(self.counts.sum())
        if self.total < 1:
            raise ValueError("the shards hold no sample: an endless order needs at least one.")
        self.streams, self.window, self.block, self.seed = streams, window, block, seed
        # Bound to the instance: an epoch's tables are O(shards + streams), and a batch touches few epochs.
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)

    def locate(self, g: I64) -> Location:
        """Where the global samples `g` are stored."""
        g = np.asarray(g, np.int64)
        shard, index = np.empty_like(g), np.empty_like(g)
        epochs = g // self.total
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            shard[rows], index[rows] = self._locate_in(int(epoch), g[rows])
        return Location(shard, index)

    def successor(self, g: int, step: int) -> int:
        """The sample `step` places after `g` in its stream's slice of the epoch, from the end on to its beginning."""
        lowest, count = self._slice(g)
        return lowest + ((g - lowest) // self.streams + step) % count * self.streams

    def stand_ins(self, g: int, most: int) -> Iterator[int]:
        """Up to `most` others of g's epoch for its place: those after it in its stream and then, where that is shorter, in the sequence."""
        own = range(1, self._slice(g)[1])
        yield from (self.successor(g, step) for step in own[:most])
        first = g // self.total * self.total
        others = (first + (g - first + step) % self.total for step in range(1, self.total))
        yield from islice((other for other in others if (other - g) % self.streams), max(0, most - len(own)))

    def share_of(self, shard: int, g: int, streams: range) -> float:
        """The part of a shard's samples that `streams`, which are consecutive, give in the epoch of sample `g`."""
        shards, starts, slices = self._epoch(g // self.total)
        count = int(self.counts[shard])
        start = int(starts[np.flatnonzero(shards == shard)[0]])
        ours = min(start + count, int(slices[streams.stop])) - max(start, int(slices[streams.start]))
        return max(0, ours) / max(1, count)

    def _slice(self, g: int) -> tuple[int, int]:
        """(the first, how many) of the global samples of g's stream in g's epoch."""
        first, stream = g // self.total * self.total, g % self.streams
        lowest = first + (stream - first) % self.streams
        return lowest, -(-(first + self.total - lowest) // self.streams)

    def _make_epoch(self, epoch: int) -> tuple[I64, I64, I64]:
        """(shards in the epoch's order, where each begins in it, where each stream's slice begins in it)."""
        places = np.arange(len(self.counts))
        shards = permute(places, len(places), chain(self.seed, _SHARDS, epoch))
        ends = np.cumsum(self.counts[shards])
        rank_in_epoch = (np.arange(self.streams) - epoch * self.total) % self.streams
        sizes = (self.total - rank_in_epoch + self.streams - 1) // self.streams
        return shards, ends - self.counts[shards], np.concatenate([[0], np.cumsum(sizes)])

    def _locate_in(self, epoch: int, g: I64) -> tuple[I64, I64]:
        shards, shard_starts, slice_starts = self._epoch(epoch)
        stream = g % self.streams
        first = epoch * self.total
        j = (g - (first + (stream - first) % self.streams)) // self.streams
        slice_start = slice_starts[stream]
        size = slice_starts[stream + 1] - slice_start

        window = j // self.window
        window_start = window * self.window
        window_size = np.minimum(self.window, size - window_start)
        key = chain(self.seed, _WINDOW, epoch, stream, window)
        j = window_start + permute(j - window_start, window_size, key)

        place = slice_start + self._undo_blocks(epoch, stream, j, size)
        # The last shard that begins at or before the place: empty shards begin there too, and come earlier.
        slot = np.searchsorted(shard_starts, place, side="right") - 1
        return shards[slot], place - shard_starts[slot]

    def _undo_blocks(self, epoch: int, stream: I64, j: I64, size: I64) -> I64:
        """The place in the slice of its j-th sample once its blocks are permuted; the last block may be short."""
        last = (size - 1) // self.block
        short = size - last * self.block
        key = chain(self.seed, _BLOCKS, epoch, stream)
        # The short block is moved to a place of its own, so that the j of every block is known in closed form;
        # the others are permuted among themselves.
        begin = (chain(key, 1) % (last + 1).astype(np.uint64)).astype(np.int64) * self.block
        inside = (j >= begin) & (j < begin + short)
        shifted = np.where(inside, 0, np.where(j < begin, j, j - short))
        others = permute(shifted // self.block, np.maximum(last, 1), key)
        return np.where(inside, last * self.block + j - begin, others * self.block + shifted % self.block)
