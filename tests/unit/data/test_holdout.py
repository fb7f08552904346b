"""The held-out part of the training samples: by key alone, apart from what is trained on, and all of it together."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from softmoe_train.data import Batch, build_eval_stream, build_stream, make_indexes
from softmoe_train.data.records import WebDatasetConfig
from tests.unit.data.conftest import numbers_of, settings

FORM = {"image_size": 4, "num_classes": 10, "rank": 0, "world": 1}


def held_out(cfg: WebDatasetConfig, seed: int = 0) -> set[int]:
    """The numbers of the held-out pictures."""
    stream = build_eval_stream(cfg, seed=seed, batch_size=4, part="val", **FORM)
    return {number for batch in stream for number in real(batch)}


def real(batch: Batch) -> list[int]:
    """The pictures of a batch that are no padding."""
    return numbers_of(batch.images[batch.mask].numpy())


def test_held_out_and_trained_on_are_all_samples_and_share_none(numbered_shards: Callable[..., Path]) -> None:
    folder = numbered_shards(40, 24)
    cfg = settings(train=str(folder), test=str(folder), holdout=0.25, shuffle_window=4)
    assert make_indexes(cfg, part=0, parts=1, needs_test=True) == []
    held = held_out(cfg)
    assert 8 <= len(held) <= 24  # of 64
    assert held == held_out(cfg, seed=1)
    trained = build_stream(cfg, seed=0, global_batch=4, **FORM)
    seen = {number for batch in islice(trained, 3 * 64 // 4) for number in real(batch)}  # three epochs and more
    assert seen == set(range(64)) - held
    tested = build_eval_stream(cfg, seed=0, batch_size=4, **FORM)
    assert sorted(number for batch in tested for number in real(batch)) == list(range(64))  # data.test is whole


def test_a_share_that_holds_out_nothing_is_refused_and_decides_the_fingerprint(
    numbered_shards: Callable[..., Path],
) -> None:
    folder = str(numbered_shards(8))
    with pytest.raises(ValueError, match=r"data\.holdout and data\.quarantine leave none of the 8 samples"):
        build_eval_stream(settings(train=folder, holdout=1e-6), seed=0, batch_size=4, part="val", **FORM)
    prints = [
        build_stream(settings(train=folder, holdout=share), seed=0, global_batch=4, **FORM).fingerprint()
        for share in (None, 0.2)
    ]
    assert "holdout" not in prints[0] and prints[1]["holdout"] == 0.2
