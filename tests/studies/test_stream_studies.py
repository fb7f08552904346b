"""The studies of the stream's shuffle and memory say what is so, on small cases."""

from pathlib import Path

import numpy as np
import pytest

from softmoe_train.data.order import Order
from tests.studies.memory import curve, make_shards, rise
from tests.studies.shuffle import full_shuffle, spread_of


def test_without_a_shuffle_neighbours_are_one_round_of_the_streams_apart() -> None:
    spread = spread_of(Order([100] * 16, streams=8, window=1, block=100_000, seed=0), batch=16)
    assert (spread.median, spread.within) == (0.5, 1.0)


def test_one_window_over_one_stream_is_a_full_shuffle() -> None:
    counts = [400] * 10
    ours, full = spread_of(Order(counts, streams=1, window=10**6, block=10**6, seed=0), 64), full_shuffle(counts, 64)
    assert ours.median == pytest.approx(full.median, rel=0.05)
    assert ours.within == pytest.approx(full.within, rel=0.35)  # of 3,990 neighbours 127 are expected
    assert ours.shards == pytest.approx(full.shards, rel=0.05)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_memory_stays_flat_over_two_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_shards(tmp_path, 1600, 64, shards=4)
    points = list(curve(tmp_path, 1600, workers=1, batch=16, epochs=2))
    total = np.asarray([point.trainer + point.workers for point in points])
    assert len(points) == 200
    assert abs(rise(points[100:])) < 0.1
    assert total[100:].max() < 1.15 * np.median(total[50:100])
