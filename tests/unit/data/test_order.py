"""The order is a bijection in every epoch, balanced over streams, and the same for ever."""

import pickle

import numpy as np
import pytest

from softmoe_train.data.keyed import Draws, chain, mix, permute
from softmoe_train.data.order import Order


def random_order(trial: int) -> Order:
    rng = np.random.default_rng(trial)
    counts = rng.integers(0, rng.choice([2, 9, 60]), rng.integers(1, 14)).tolist()
    counts[rng.integers(len(counts))] += 1  # never empty altogether
    streams, window, block = (int(rng.integers(1, high)) for high in (20, 40, 20))
    return Order(counts, streams=streams, window=window, block=block, seed=trial)


def stored(order: Order, g: np.ndarray) -> list[tuple[int, int]]:
    where = order.locate(g)
    return list(zip(where.shard.tolist(), where.index.tolist()))


@pytest.mark.parametrize("trial", range(60))
def test_every_epoch_holds_every_stored_sample_exactly_once(trial: int) -> None:
    order = random_order(trial)
    everything = {(s, i) for s, count in enumerate(order.counts.tolist()) for i in range(count)}
    for epoch in (0, 1, 7):
        samples = stored(order, np.arange(epoch * order.total, (epoch + 1) * order.total))
        assert len(samples) == len(everything)
        assert set(samples) == everything


@pytest.mark.parametrize("trial", range(20))
def test_a_sample_is_located_alike_alone_and_in_any_company(trial: int) -> None:
    order = random_order(trial)
    g = np.random.default_rng(trial).integers(0, 5 * order.total, 30)
    assert stored(order, g) == [stored(order, np.asarray([one]))[0] for one in g]


@pytest.mark.parametrize("trial", range(20))
def test_a_stream_reads_a_contiguous_slice_of_the_permuted_shards(trial: int) -> None:
    order = random_order(trial)
    for epoch in (0, 3):
        g = np.arange(epoch * order.total, (epoch + 1) * order.total)
        shards, starts, _ = order._epoch(epoch)
        start_of = dict(zip(shards.tolist(), starts.tolist()))
        places = np.asarray([start_of[s] + i for s, i in stored(order, g)])
        slices = [sorted(places[g % order.streams == stream].tolist()) for stream in range(order.streams)]
        assert [place for one in slices for place in one] == list(range(order.total))


def test_samples_stay_inside_their_window_of_blocks() -> None:
    order = Order([1000], streams=1, window=64, block=64, seed=3)
    index = order.locate(np.arange(960)).index.reshape(-1, 64)
    # 1000 = 15 blocks of 64 and a short one of 40, which shifts the windows after it over two blocks.
    assert max(len(set(window // 64)) for window in index) <= 3


def test_shuffling_is_even_over_places() -> None:
    order = Order([100], streams=1, window=100, block=10, seed=0)
    epochs = np.stack([order.locate(np.arange(e * 100, (e + 1) * 100)).index for e in range(1000)])
    counts = np.zeros((100, 100))
    np.add.at(counts, (np.tile(np.arange(100), 1000), epochs.reshape(-1)), 1)
    chi_squared = ((counts - 10) ** 2 / 10).sum()
    # 99 * 99 degrees of freedom: mean 9801, standard deviation 140.
    assert abs(chi_squared - 9801) < 6 * 140


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = [Order([50, 50], streams=2, window=16, block=8, seed=seed) for seed in (0, 1)]
    lists = [stored(order, np.arange(e * 100, e * 100 + 100)) for order in orders for e in (0, 1)]
    assert len({tuple(one) for one in lists}) == 4


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_permute_is_a_bijection_of_any_size(size: int) -> None:
    for key in range(20):
        assert sorted(permute(np.arange(size), size, chain(key)).tolist()) == list(range(size))


def test_the_hash_is_splitmix64() -> None:
    # The published reference output for seed 1234567.
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_order_is_the_same_for_ever() -> None:
    # Written down once: a change here changes the data order of every run that resumes.
    assert permute(np.arange(10), 10, chain(1, 2, 3)).tolist() == PERMUTED
    order = Order([5, 3, 9], streams=3, window=4, block=2, seed=11)
    assert stored(order, np.arange(20)) == LOCATED
    draws = Draws(1, 2, "augment")
    assert [draws.uniform() for _ in range(3)] == DRAWN


@pytest.mark.parametrize("trial", range(10))
def test_successors_go_round_the_stream_within_the_epoch(trial: int) -> None:
    order = random_order(trial)
    for g in np.random.default_rng(trial).integers(0, 4 * order.total, 10).tolist():
        epoch = range(g // order.total * order.total, (g // order.total + 1) * order.total)
        mates = [other for other in epoch if other % order.streams == g % order.streams]
        turned = mates[mates.index(g) + 1 :] + mates[: mates.index(g) + 1]
        assert [order.successor(g, step) for step in range(1, len(mates) + 1)] == turned


@pytest.mark.parametrize("trial", range(10))
def test_stand_ins_are_the_rest_of_the_stream_and_then_of_the_epoch(trial: int) -> None:
    order = random_order(trial)
    for g in np.random.default_rng(trial).integers(0, 4 * order.total, 5).tolist():
        epoch = range(g // order.total * order.total, (g // order.total + 1) * order.total)
        turned = [*range(g + 1, epoch.stop), *range(epoch.start, g)]
        own = [other for other in turned if other % order.streams == g % order.streams]
        want = own + [other for other in turned if other not in own]
        for most in (0, 1, 3, 32, order.total):
            assert list(order.stand_ins(g, most)) == want[:most]


def test_an_order_survives_being_sent_to_a_worker() -> None:
    order = random_order(5)
    g = np.arange(2 * order.total)
    assert stored(pickle.loads(pickle.dumps(order)), g) == stored(order, g)


def test_an_order_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no sample"):
        Order([0, 0], streams=1, window=1, block=1, seed=0)


PERMUTED = [0, 8, 4, 7, 2, 6, 5, 3, 1, 9]
LOCATED = [
    (2, 2),
    (2, 7),
    (0, 0),
    (1, 1),
    (2, 6),
    (0, 2),
    (1, 0),
    (2, 5),
    (0, 3),
    (2, 1),
    (2, 8),
    (0, 1),
    (2, 0),
    (2, 4),
    (0, 4),
    (1, 2),
    (2, 3),
    (0, 4),
    (2, 3),
    (1, 1),
]
DRAWN = [0.18579190825503533, 0.5139977975118754, 0.6337463981229592]
