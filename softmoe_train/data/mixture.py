"""This file owns the order of several weighted sources: which source gives global sample g, and which of its own samples.

Sample g is the k-th of stream s, where s = g mod L and k = g // L. A stream goes through patterns of P places, each permuted by
a key of (seed, s, k // P); a place belongs to the source whose weight covers it, and is also that source's number within the
pattern. So a source of weight w has its sample h = (k // P * w + number) * L + s there: nothing is counted, any position is
computed without the ones before it, and stream s of the run reads stream s of every source and no other.

Letters: L streams, P the sum of the weights, s a stream, k the position of a sample in it, h a source's own sample.
"""

import math
from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np

from softmoe_train.data.keyed import chain, permute
from softmoe_train.data.order import I64, Location, Order

MOST_PLACES = 1000  # of a pattern: a source's samples are read out of its order by no more than this
_PATTERN, _SOURCE = 4, 5  # the places of randomness beside those of an Order


def reduced(weights: Sequence[int]) -> list[int]:
    """The smallest whole weights of the same proportions: 20 and 80 are the mixture of 1 and 4."""
    common = reduce(math.gcd, weights)
    return [weight // common for weight in weights]


def source_seed(seed: int, own: int) -> int:
    """The seed of a source's order, from the run's and its own."""
    return int(chain(seed, _SOURCE, own)[0])


class Mixture:
    """The endless order of the samples of several sources, `weights[i]` of every P samples of a stream from `orders[i]`.

    Shards are numbered through all sources in turn; each order must have the same streams.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[int], *, seed: int, names: Sequence[str]) -> None:
        assert len(orders) == len(weights) == len(names) > 0 and min(weights) > 0, (len(orders), weights, names)
        self.names = list(names)
        self.orders, self.seed, self.streams = list(orders), seed, orders[0].streams
        assert all(order.streams == self.streams for order in orders), [order.streams for order in orders]
        self.weights = np.asarray(reduced(weights), np.int64)
        self.ends = np.cumsum(self.weights)  # where each source's places end in the pattern that is permuted
        self._first_shard = np.cumsum([0, *(len(order.counts) for order in orders)])

    @property
    def places(self) -> int:
        """P: how many samples of a stream hold each source exactly as often as its weight says."""
        return int(self.ends[-1])

    @property
    def window(self) -> int:
        """About how many samples of a stream are shuffled among each other."""
        return sum(order.window for order in self.orders)

    def share_of(self, shard: int, g: int, streams: range) -> float:
        """The part of a shard's samples that consecutive `streams` give in the epoch that its source is in at sample `g`."""
        source = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        own = g // self.streams // self.places * int(self.weights[source]) * self.streams
        return self.orders[source].share_of(shard - int(self._first_shard[source]), own, streams)

    def own(self, g: I64) -> tuple[I64, I64]:
        """(source, the source's own sample) of the global samples `g`."""
        g = np.asarray(g, np.int64)
        stream, k = g % self.streams, g // self.streams
        pattern = k // self.places
        place = permute(k % self.places, self.places, chain(self.seed, _PATTERN, stream, pattern))
        source = np.searchsorted(self.ends, place, side="right")
        number = place - (self.ends - self.weights)[source]
        return source, (pattern * self.weights[source] + number) * self.streams + stream

    def locate(self, g: I64) -> Location:
        """Where the global samples `g` are stored."""
        sources, own = self.own(g)
        shard, index = np.empty_like(own), np.empty_like(own)
        for source, order in enumerate(self.orders):
            rows = sources == source
            if rows.any():
                where = order.locate(own[rows])
                shard[rows], index[rows] = where.shard + self._first_shard[source], where.index
        return Location(shard, index)

    def stand_ins(self, g: int, most: int) -> Iterator[int]:
        """Up to `most` others for the place of `g`, of the same source and of its epoch there, as its own order has them."""
        source, own = (int(one[0]) for one in self.own(np.asarray([g])))
        for other in self.orders[source].stand_ins(own, most):
            yield self._global(source, other)

    def _global(self, source: int, own: int) -> int:
        """The global sample that is a source's own sample: the inverse of `own`."""
        stream, taken = own % self.streams, own // self.streams
        pattern, number = divmod(taken, int(self.weights[source]))
        key = chain(self.seed, _PATTERN, stream, pattern)
        places = permute(np.arange(self.places), self.places, key)
        [place] = np.flatnonzero(places == self.ends[source] - self.weights[source] + number)
        return (pattern * self.places + int(place)) * self.streams + stream

    def taken(self, position: int) -> list[int]:
        """How many of the samples before `position` each source has given."""
        stream = np.arange(self.streams)
        k = (position - stream + self.streams - 1) // self.streams  # samples before it in each stream
        whole = int((k // self.places).sum()) * self.weights
        # The begun pattern of each stream: at most two lengths, since streams take turns.
        g = (k // self.places * self.places)[:, None] * self.streams + stream[:, None]
        g = g + np.arange(int((k % self.places).max()))[None] * self.streams
        begun = np.bincount(self.own(g[g < position])[0], minlength=len(self.orders))
        return (whole + begun).tolist()
