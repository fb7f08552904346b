"""256 logical streams on every legal number of ranks: each epoch's samples come once, and every rank's batch is full.

The truth is `epoch_by_hand`: what the docstring of order.py promises, done to lists of samples, blocks and windows one after the other. It is
slow, so most trials ask it for some of the streams; that each sample comes once an epoch is counted over all of them in every trial.
"""

import time

import numpy as np
import pytest

from softmoe_train.data.build import check_streams
from softmoe_train.data.keyed import chain, permute
from softmoe_train.data.order import Order
from softmoe_train.data.stream import Share

STREAMS = 256
Sample = tuple[int, int]  # shard, index in it


def shape(trial: int) -> list[int]:
    """The samples of each shard of a data set: from one shard to thousands, even, uneven, with empty ones or of one sample each."""
    draw = np.random.default_rng(trial)
    shards = int(draw.choice([1, 2, draw.integers(3, 40), draw.integers(40, 400), draw.integers(1000, 4000)]))
    most = max(2, int(draw.choice([200, 2000, 8000])) // shards)
    counts = [
        np.ones(shards, np.int64),
        np.full(shards, most),
        draw.integers(0, most, shards),
        (draw.pareto(1.0, shards) * most / 4).clip(0, 10 * most).astype(np.int64),
        np.where(draw.random(shards) < 0.7, 0, draw.integers(1, 3 * most, shards)),
    ][trial % 5]
    counts[draw.integers(shards)] += 1  # never empty altogether
    return counts.tolist()


def turned(things: list, key: np.ndarray) -> list:
    """The things in the places that a keyed permutation reads them from."""
    if len(things) < 2:
        return things
    return [things[i] for i in permute(np.arange(len(things)), len(things), key).tolist()]


def cut(things: list, size: int) -> list[list]:
    return [things[start : start + size] for start in range(0, len(things), size)]


def epoch_by_hand(
    counts: list[int], epoch: int, streams: set[int], *, window: int, block: int, seed: int
) -> dict[int, Sample]:
    """The samples of an epoch that `streams` hold, by their global numbers."""
    shards = turned(list(range(len(counts))), chain(seed, 1, epoch))
    everything = [(shard, index) for shard in shards for index in range(counts[shard])]
    numbers, taken = range(epoch * len(everything), (epoch + 1) * len(everything)), 0
    ordered: dict[int, Sample] = {}
    for stream in range(STREAMS):
        mine = range(numbers.start + (stream - numbers.start) % STREAMS, numbers.stop, STREAMS)
        own = everything[taken : taken + len(mine)]
        taken += len(mine)
        if not own or stream not in streams:
            continue
        *blocks, last = cut(own, block)
        key = chain(seed, 2, epoch, stream)
        blocks = turned(blocks, key)
        blocks.insert(int(chain(key, 1)[0]) % (len(blocks) + 1), last)
        windows = cut([sample for one in blocks for sample in one], window)
        own = [s for i, one in enumerate(windows) for s in turned(one, chain(seed, 3, epoch, stream, i))]
        ordered |= dict(zip(mine, own, strict=True))
    assert taken == len(everything)
    return ordered


def check(trial: int) -> None:
    """Some epochs of a data set in a row, from any one on, by all ranks of every legal world."""
    draw = np.random.default_rng([trial, 1])
    counts = shape(trial)
    window, block, seed, epoch = (
        int(draw.integers(low, high)) for low, high in [(6, 80), (1, 40), (0, 1 << 40), (0, 50)]
    )
    order = Order(counts, streams=STREAMS, window=window, block=block, seed=seed)
    batch = STREAMS * int(draw.integers(1, 4)) if order.total > STREAMS else STREAMS
    epochs = range(epoch, epoch + max(2, 2 * batch // order.total + 1))
    first, stop = epochs.start * order.total, epochs.stop * order.total
    found = samples(order, np.arange(first, stop))
    stored = [(shard, index) for shard, count in enumerate(counts) for index in range(count)]
    assert all(sorted(one) == stored for one in cut(found, order.total)), "an epoch holds each stored sample once"
    some = set(range(STREAMS) if trial % 20 == 0 else draw.integers(0, STREAMS, 12).tolist())
    for e in epochs:
        by_hand = epoch_by_hand(counts, e, some, window=window, block=block, seed=seed)
        assert {g: found[g - first] for g in by_hand} == by_hand
    begin = -(-first // STREAMS) * STREAMS  # where a batch may begin
    positions = np.arange(begin, stop - batch + 1, batch)
    assert len(positions)
    worlds = [world for world in range(1, STREAMS + 1) if not check_streams(STREAMS, batch, world)]
    assert worlds == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for world in worlds:
        shares = [Share(batch, STREAMS, rank, world) for rank in range(world)]
        rows = np.asarray([[share.rows(position) for share in shares] for position in positions.tolist()])
        assert rows.shape == (len(positions), world, batch // world), "every batch of every rank is full"
        assert (rows % STREAMS * world // STREAMS == np.arange(world)[:, None]).all(), "a rank keeps its streams"
        joined = np.sort(rows.reshape(len(positions), batch))
        assert (joined == positions[:, None] + np.arange(batch)).all(), "a global batch is a run of samples"
        one = rows[draw.integers(len(positions)), draw.integers(world)]
        assert samples(order, one) == [found[g - first] for g in one.tolist()]


def samples(order: Order, g: np.ndarray) -> list[Sample]:
    where = order.locate(g)
    return list(zip(where.shard.tolist(), where.index.tolist(), strict=True))


@pytest.mark.parametrize("trial", range(1, 10))
def test_every_world_of_256_streams_reads_each_epoch_once_in_full_batches(trial: int) -> None:
    check(trial)


@pytest.mark.full
def test_a_thousand_shapes_of_data_are_read_once_an_epoch_on_every_world() -> None:
    began = time.monotonic()
    for trial in range(1000):
        check(trial)
    print(f"1,000 shapes on 9 worlds in {time.monotonic() - began:.0f} s")
