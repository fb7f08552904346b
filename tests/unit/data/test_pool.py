"""Pools: labels are read once a shard, and the chosen samples are read each once on any number of ranks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from softmoe_train.data import pool as pools
from softmoe_train.data.build import build_pool_stream
from softmoe_train.data.pool import UNREADABLE, read_labels, read_pool
from softmoe_train.data.read import SampleReader
from softmoe_train.data.sources import NamedSpec
from tests.unit.data.conftest import encoded, numbered_picture, numbers_of, settings, write_tar


@pytest.mark.parametrize("world", [1, 2, 3])
def test_chosen_samples_are_read_each_once(world: int, numbered_shards: Callable[..., Path]) -> None:
    cfg = settings(test=str(numbered_shards(7, 5, 9)), keep={"labels": None, "keys": "[02468]$", "renumber": False})
    pool = read_pool(NamedSpec("data.test", cfg.test), cfg)
    assert pool.labels.tolist() == [number % 10 for number in range(0, 21, 2)]
    wanted = np.asarray([0, 2, 3, 7, 9, 10])  # none of the second shard
    assert pool.keys(wanted) == [f"sample-{2 * number:06d}" for number in wanted]
    seen, ids = [], []
    for rank in range(world):
        stream = build_pool_stream(cfg, pool, wanted, image_size=4, batch_size=2, rank=rank, world=world)
        assert len(stream) == -(-6 // (2 * world))
        for batch in stream:
            seen += numbers_of(batch.images[batch.mask].numpy())
            ids += batch.sample_ids[batch.mask].tolist()
    assert [seen[at] for at in np.argsort(ids)] == (2 * wanted).tolist()
    assert sorted(ids) == list(range(6))


def test_labels_are_read_once_and_what_has_none_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [b"3", b"-2", None, b"x", b"900", b"3 4"]
    members = []
    for number, label in enumerate(labels):
        members += [(f"{number}.cls", label)] if label is not None else []
        members += [(f"{number}.png", encoded(numbered_picture(number)))]
    cfg = settings(test=str(write_tar(tmp_path / "a.tar", members)))
    named = NamedSpec("data.test", cfg.test)
    none = UNREADABLE
    assert read_labels(named, cfg, part=0, parts=1) == []
    monkeypatch.setattr(SampleReader, "label", lambda *_: pytest.fail("read twice"))
    assert read_pool(named, cfg).labels.tolist() == [3, none, none, none, 900, none]
    monkeypatch.undo()
    kept = cfg.model_copy(update={"keep": cfg.keep.model_copy(update={"labels": [900, 3], "renumber": True})})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert read_pool(named, kept).labels.tolist() == [1, 0]
    assert pools.read_labels(NamedSpec("data.test", str(tmp_path / "b.tar")), cfg, part=0, parts=1)[0].startswith(
        "data.test="
    )
