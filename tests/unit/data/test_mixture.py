"""A mixture gives each source's samples once in each of its epochs, in exact shares, on every layout and from any position."""

import pickle
import time
from collections import Counter

import numpy as np
import pytest

from softmoe_train.data.mixture import Mixture, reduced, source_seed
from softmoe_train.data.order import Order


def random_mixture(trial: int) -> Mixture:
    rng = np.random.default_rng(trial)
    streams = int(rng.integers(1, 9))
    orders = []
    for source in range(int(rng.integers(1, 5))):
        counts = rng.integers(0, 30, rng.integers(1, 6)).tolist()
        counts[0] += 1
        orders.append(Order(counts, streams=streams, window=8, block=4, seed=source_seed(trial, source)))
    weights = [1, *rng.integers(1, 6, len(orders) - 1).tolist()]
    return Mixture(orders, weights, seed=trial, names=[str(n) for n in range(len(orders))])


@pytest.mark.parametrize("trial", range(6))
def test_every_source_gives_each_of_its_samples_once_in_each_of_its_epochs(trial: int) -> None:
    mixture = random_mixture(trial)
    # So many samples that the slowest source has gone through three epochs, whole patterns of every stream.
    slowest = max(3 * order.total / weight for order, weight in zip(mixture.orders, mixture.weights, strict=True))
    patterns = int(slowest) // mixture.streams + 2
    g = np.arange(patterns * mixture.places * mixture.streams)
    sources, own = mixture.own(g)
    where = mixture.locate(g)
    first_shard = 0
    for source, order in enumerate(mixture.orders):
        rows = sources == source
        numbers = own[rows]
        assert sorted(numbers.tolist()) == list(range(len(numbers)))
        stored = {(first_shard + s, i) for s, count in enumerate(order.counts.tolist()) for i in range(count)}
        for epoch in range(3):
            mine = rows & (own // order.total == epoch)
            assert Counter(zip(where.shard[mine].tolist(), where.index[mine].tolist())) == Counter(stored)
        first_shard += len(order.counts)


@pytest.mark.parametrize("trial", range(6))
def test_shares_are_exact_over_every_whole_pattern(trial: int) -> None:
    mixture = random_mixture(trial)
    length = mixture.places * mixture.streams
    for begin in (0, length, 50 * length, 10**12 // length * length):
        sources, _ = mixture.own(np.arange(begin, begin + length))
        assert (
            np.bincount(sources, minlength=len(mixture.orders)).tolist() == (mixture.weights * mixture.streams).tolist()
        )


@pytest.mark.parametrize("trial", range(4))
def test_a_stream_of_the_run_reads_the_same_stream_of_every_source(trial: int) -> None:
    mixture = random_mixture(trial)
    g = np.random.default_rng(trial).integers(0, 10**9, 500)
    assert (mixture.own(g)[1] % mixture.streams == g % mixture.streams).all()


@pytest.mark.parametrize("trial", range(4))
def test_a_sample_is_located_alike_alone_and_in_any_company(trial: int) -> None:
    mixture = random_mixture(trial)
    g = np.random.default_rng(trial).integers(0, 10**6, 40)
    together = [one.tolist() for one in mixture.locate(g)]
    alone = [mixture.locate(np.asarray([one])) for one in g]
    assert together == [[int(one.shard[0]) for one in alone], [int(one.index[0]) for one in alone]]


@pytest.mark.parametrize("trial", range(4))
def test_what_was_taken_is_what_counting_finds(trial: int) -> None:
    mixture = random_mixture(trial)
    sources, _ = mixture.own(np.arange(4 * mixture.places * mixture.streams + 5))
    for position in (0, 1, mixture.streams, len(sources) // 2, len(sources)):
        counted = np.bincount(sources[:position], minlength=len(mixture.orders)).tolist()
        assert mixture.taken(position) == counted


@pytest.mark.parametrize("trial", range(4))
def test_stand_ins_are_those_of_the_source(trial: int) -> None:
    mixture = random_mixture(trial)
    for g in np.random.default_rng(trial).integers(0, 10**4, 3).tolist():
        source, own = (int(one[0]) for one in mixture.own(np.asarray([g])))
        others = list(mixture.orders[source].stand_ins(own, 5))
        sources, numbers = mixture.own(np.asarray(list(mixture.stand_ins(g, 5)), np.int64))
        assert numbers.tolist() == others
        assert set(sources.tolist()) <= {source}


def test_batches_mix_the_sources() -> None:
    orders = [Order([1000], streams=16, window=64, block=16, seed=seed) for seed in range(3)]
    mixture = Mixture(orders, [6, 3, 1], seed=5, names="abc")
    sources = mixture.own(np.arange(2000 * 64))[0]
    shares = np.stack([np.bincount(batch, minlength=3) for batch in sources.reshape(-1, 64)])
    # Independent draws would have a variance of 64 p (1 - p); without replacement inside a pattern it is smaller, and above none.
    assert np.allclose(shares.mean(0), [38.4, 19.2, 6.4], atol=0.15)
    assert (shares.std(0) < np.sqrt(64 * np.asarray([0.24, 0.21, 0.09]))).all()
    assert (shares.std(0) > 0.5).all()
    # A source follows itself no more and no less than its share says.
    one_stream = sources[::16]
    assert abs((one_stream[1:] == one_stream[:-1]).mean() - (0.36 + 0.09 + 0.01 - 0.06)) < 0.03


def test_every_place_of_a_pattern_is_given_evenly() -> None:
    order = Order([10], streams=1, window=4, block=2, seed=0)
    mixture = Mixture([order, order, order], [2, 1, 1], seed=1, names="abc")
    sources = mixture.own(np.arange(4 * 20_000))[0].reshape(-1, 4)
    for place in range(4):
        # Standard deviation of a share of 20,000 draws: at most 0.0036.
        assert np.allclose(np.bincount(sources[:, place], minlength=3) / 20_000, [0.5, 0.25, 0.25], atol=0.02)


def test_streams_and_patterns_are_permuted_by_keys_of_their_own() -> None:
    order = Order([10], streams=4, window=4, block=2, seed=0)
    mixture = Mixture([order, order], [8, 7], seed=1, names="ab")
    sources = mixture.own(np.arange(4 * 15 * 8))[0].reshape(8, 15, 4)
    patterns = {tuple(sources[pattern, :, stream]) for pattern in range(8) for stream in range(4)}
    assert len(patterns) == 32


def test_weights_with_a_common_factor_are_the_same_mixture() -> None:
    orders = [Order([20], streams=2, window=4, block=2, seed=seed) for seed in (1, 2)]
    g = np.arange(500)
    assert reduced([20, 80]) == [1, 4]
    few, many = (Mixture(orders, weights, seed=3, names="ab").locate(g) for weights in ([1, 4], [20, 80]))
    assert all((a == b).all() for a, b in zip(few, many, strict=True))


def test_seeds_of_run_and_source_both_change_a_sources_order() -> None:
    assert len({source_seed(run, own) for run in range(10) for own in range(10)}) == 100


def test_seeking_costs_the_same_anywhere() -> None:
    orders = [Order([1000] * 500, streams=64, window=4096, block=512, seed=seed) for seed in range(4)]
    mixture = Mixture(orders, [70, 20, 9, 1], seed=0, names="abcd")

    def seconds(position: int) -> float:
        began = time.process_time()
        mixture.locate(np.arange(position, position + 4096))
        return time.process_time() - began

    near, far = (min(seconds(position) for _ in range(3)) for position in (0, 10**14))
    # 4,096 rows take about 20 ms wherever they are; a count of what came before would take days.
    assert far < 20 * near + 0.5
    assert far < 2


def test_a_mixture_survives_being_sent_to_a_worker() -> None:
    mixture = random_mixture(3)
    g = np.arange(300)
    again = pickle.loads(pickle.dumps(mixture))
    assert all((a == b).all() for a, b in zip(mixture.locate(g), again.locate(g), strict=True))


def test_the_mixture_is_the_same_for_ever() -> None:
    # Written down once: a change here changes the data order of every run that resumes.
    orders = [Order([5, 3], streams=2, window=4, block=2, seed=source_seed(11, seed)) for seed in (0, 1)]
    where = Mixture(orders, [2, 1], seed=11, names="ab").locate(np.arange(12))
    assert list(zip(where.shard.tolist(), where.index.tolist())) == LOCATED


LOCATED = [(3, 2), (2, 1), (0, 1), (1, 2), (0, 3), (0, 4), (0, 0), (1, 0), (3, 1), (1, 1), (0, 2), (2, 4)]
