"""Whatever changes at each stop, the global batches are those of one process that never stopped: pixels, labels and sample ids.

Cases are seeded and not hypothesis's: one writes tars and reads them by several streams, so there are dozens and not thousands, and what
shrinking would find is in the test's number, which draws the case again.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch

from softmoe_train.data import Batch, Cursor, WebDatasetConfig, build_stream
from softmoe_train.data.records import RandAugment
from tests.unit.data.conftest import INCEPTION, encoded, numbered_picture, numbers_of, settings, write_tar

CROP = INCEPTION.model_copy(update={"min_area": 0.3, "antialias": True})
BAD = b"no picture"


@dataclass(frozen=True)
class Leg:
    """A stretch between two stops: how many batches of what size, on what ranks, workers and micro-batches."""

    batches: int
    batch: int
    world: int
    workers: int
    micro_batches: int


@dataclass(frozen=True)
class Case:
    """A data set's shards, the settings of its order, and the legs of a run over it."""

    counts: list[int]
    broken: set[int]
    changes: dict[str, object]
    legs: list[Leg]
    mixed: bool


def legal(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def case(trial: int, *, same_batch: bool) -> Case:
    draw = np.random.default_rng([trial, same_batch])
    pick = lambda options: options[draw.integers(len(options))]  # noqa: E731
    counts = draw.integers(0, pick([2, 5, 30]), draw.integers(1, 9)).tolist()
    counts[draw.integers(len(counts))] += 2
    streams = pick([1, 2, 3, 4, 6, 8, 12])
    mixed = same_batch and trial % 4 == 1
    first = streams * int(draw.integers(2 if mixed else 1, 4))
    legs = []
    for _ in range(int(draw.integers(2, 6))):
        batch = first if same_batch else streams * int(draw.integers(1, 4))
        world = pick([w for w in legal(streams) if w <= 6])
        workers = int(draw.choice([0, 0, 0, 1, 2])) if world < 3 else 0
        legs.append(Leg(int(draw.integers(0, 5)), batch, world, workers, pick(legal(batch // world))))
    broken = set(draw.integers(0, sum(counts), draw.integers(0, 3)).tolist()) if trial % 3 == 2 else set()
    changes: dict[str, object] = {
        "streams": streams,
        "shuffle_window": int(draw.integers(1, 40)),
        "block": int(draw.integers(1, 20)),
        "max_broken": 1000,
        "mixup": 0.4 if mixed else None,
    }
    if trial % 2 and same_batch:
        changes |= {"train_transform": CROP, "randaugment": RandAugment(layers=1, magnitude=9.0)}
    return Case(counts, broken if len(broken) < sum(counts) else set(), changes, legs, mixed)


def made(folder, one: Case) -> WebDatasetConfig:
    number = 0
    for shard, count in enumerate(one.counts):
        members = []
        for _ in range(count):
            picture = BAD if number in one.broken else encoded(numbered_picture(number))
            members += [(f"{number}.cls", b"%d" % (number % 10)), (f"{number}.png", picture)]
            number += 1
        write_tar(folder / f"{shard:03d}.tar", members)
    return settings(train=str(folder), **one.changes)


def stream(cfg: WebDatasetConfig, batch: int, rank: int = 0, world: int = 1):
    return build_stream(cfg, image_size=4, num_classes=10, seed=5, global_batch=batch, rank=rank, world=world)


def rows(batches: list[Batch]) -> list[tuple]:
    """What a step consumed, image by image in the order of samples: number, label and pixels."""
    images, labels, ids = (
        torch.cat([getattr(one, name) for one in batches]) for name in ("images", "labels", "sample_ids")
    )
    assert all(one.mask.all() for one in batches)
    return [(int(ids[at]), labels[at].tolist(), images[at].numpy().tobytes()) for at in ids.argsort().tolist()]


def travelled(cfg: WebDatasetConfig, legs: list[Leg]) -> Iterator[tuple[Leg, list[tuple], list]]:
    """Each step's leg, rows and broken samples on the way, every leg by streams that are made anew and find the cursor that was kept."""
    kept = Cursor(0).to_json()
    for leg in legs:
        own = cfg.model_copy(update={"workers": leg.workers})
        ranks = [stream(own, leg.batch, rank, leg.world) for rank in range(leg.world)]
        for one in ranks:
            one.seek(Cursor.from_json(kept))
        for parts in islice(zip(*ranks, strict=True), leg.batches):
            [cursor] = {part.cursor for part in parts}
            micro = [piece for part in parts for piece in part.split(leg.micro_batches)]
            assert {len(piece) for piece in micro} == {leg.batch // leg.world // leg.micro_batches}
            yield leg, rows(micro), sorted(one for piece in micro for one in piece.broken)
            kept = cursor.to_json()


def trials(shown: int, all_of_them: int) -> list:
    """The first few cases for CI, and the others for `-m full`."""
    return [pytest.param(trial, marks=[pytest.mark.full] if trial >= shown else []) for trial in range(all_of_them)]


@pytest.mark.parametrize("trial", trials(15, 300))
def test_stops_and_changes_of_layout_leave_every_global_batch_as_it_was(tmp_path, trial: int) -> None:
    one = case(trial, same_batch=True)
    cfg = made(tmp_path, one)
    steps = list(travelled(cfg, one.legs))
    whole = list(islice(stream(cfg, one.legs[0].batch), len(steps)))
    assert [(got, broken) for _, got, broken in steps] == [(rows([want]), sorted(want.broken)) for want in whole]
    names = stream(cfg, one.legs[0].batch)
    for want in whole:
        stored = names.samples(Cursor(want.cursor.position - len(want)), 0)
        assert [s.number for s in stored] == want.sample_ids.tolist()
        if not one.broken and one.changes.get("train_transform") is None and not one.mixed:
            assert [int(s.key) for s in stored] == numbers_of(want.images)


@pytest.mark.parametrize("trial", trials(8, 150))
def test_another_global_batch_at_each_stop_repeats_and_misses_no_sample(tmp_path, trial: int) -> None:
    one = case(trial, same_batch=False)
    one = Case(one.counts, set(), one.changes, [*one.legs, *one.legs, *one.legs], mixed=False)
    cfg = made(tmp_path, one)
    got = [row for _, step, _ in travelled(cfg, one.legs) for row in step]
    total, end = sum(one.counts), sum(leg.batches * leg.batch for leg in one.legs)
    assert [number for number, _, _ in got] == list(range(end))
    seen = [int.from_bytes(bytes(np.frombuffer(pixels, np.uint8)[[0, 16, 32]])) for _, _, pixels in got]
    for start in range(0, end, total):
        times = Counter(seen[start : start + total])
        assert set(times.values()) <= {1}, "a sample comes once an epoch"
        assert start + total > end or set(times) == set(range(total)), "and none is left out"
    assert [label for _, label, _ in got] == [number % 10 for number in seen]
