"""Mixup: the distribution of the weights, who is mixed with whom, and the same numbers on every layout."""

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from softmoe_train.data import Batch, Cursor, ImageStream, WebDatasetConfig, build_stream, check_data
from softmoe_train.data.keyed import Draws
from softmoe_train.data.mixup import WHOLE, Mixup, larger_weight
from softmoe_train.data.records import RandAugment
from tests.unit.data.conftest import INCEPTION, encoded, numbered_picture, settings, write_tar
from tests.unit.data.test_synthetic import settings as synthetic
from tests.unit.data.test_synthetic import train


def stream(cfg: WebDatasetConfig, rank: int = 0, world: int = 1, *, batch: int = 16, size: int = 4) -> ImageStream:
    return build_stream(cfg, image_size=size, num_classes=10, seed=7, global_batch=batch, rank=rank, world=world)


def joined(parts: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels and sample numbers of the ranks' parts, in the order of the samples."""
    ids = torch.cat([part.sample_ids for part in parts])
    order = ids.argsort()
    return (
        torch.cat([part.images for part in parts])[order],
        torch.cat([part.labels for part in parts])[order],
        ids[order],
    )


def weights(p: float, count: int) -> np.ndarray:
    return np.asarray([larger_weight(p, Draws(0, g, "mixup")) for g in range(count)]) / WHOLE


@pytest.mark.parametrize(
    ("p", "below"),
    [
        (0.5, lambda x: 2 / math.pi * np.arcsin(np.sqrt(x))),
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
    ],
)
def test_weights_are_the_larger_side_of_a_beta_distribution(
    p: float, below: Callable[[np.ndarray], np.ndarray]
) -> None:
    count = 1500
    drawn = np.sort(weights(p, count))
    truth = below(drawn) - below(1 - drawn)  # that max(X, 1 - X) is smaller
    assert np.abs(truth - (np.arange(count) + 0.5) / count).max() < 2.2 / math.sqrt(
        count
    )  # Kolmogorov's bound at 1 in 8,000


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8, 3.0])
def test_weights_have_the_moments_of_a_beta_distribution(p: float) -> None:
    off = (weights(p, 1500) - 0.5) ** 2
    second, fourth = 1 / (4 * (2 * p + 1)), 3 / (16 * (2 * p + 1) * (2 * p + 3))
    assert abs(off.mean() - second) < 5 * math.sqrt((fourth - second**2) / 1500)


@pytest.mark.parametrize(("p", "low", "high"), [(1e-300, 1.0, 1.0), (1e-3, 0.5, 1.0), (1e6, 0.5, 0.51)])
def test_any_p_gives_weights_from_a_half_to_one(p: float, low: float, high: float) -> None:
    drawn = weights(p, 300)
    assert low <= drawn.min() <= drawn.max() <= high


def plain_and_mixed(folder: Path, **changes: object) -> list[tuple[Batch, Batch]]:
    plain, mixed = (stream(settings(train=str(folder), mixup=p, **changes)) for p in (None, 0.5))
    return list(islice(zip(plain, mixed), 4))


@pytest.mark.parametrize("streams", [1, 2, 8])
def test_an_image_is_mixed_with_the_next_of_its_stream_in_the_batch_to_the_nearest_level(
    numbered_shards, streams: int
) -> None:
    for plain, mixed in plain_and_mixed(numbered_shards(30, 11), streams=streams):
        begin = mixed.cursor.position - 16
        assert torch.equal(mixed.sample_ids, torch.arange(begin, begin + 16))
        for g in mixed.sample_ids.tolist():
            row, other = g - begin, (g - begin + streams) % 16
            weight = larger_weight(0.5, Draws(7, g, "mixup")) / WHOLE
            truth = weight * plain.images[row].double() + (1 - weight) * plain.images[other].double()
            assert (mixed.images[row] - truth).abs().max() <= 0.5
            label = torch.zeros(10)
            label[plain.labels[row]] += weight
            label[plain.labels[other]] += 1 - weight
            assert torch.equal(mixed.labels[row], label)
        assert (mixed.images.dtype, mixed.labels.dtype) == (torch.uint8, torch.float32)


def test_several_labels_of_an_image_are_weighed_alike() -> None:
    images = np.zeros((2, 3, 1, 1), np.uint8)
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    _, mixed = Mixup(0.5, 3, seed=7).mix(images, labels, np.asarray([4, 5]), 1)
    for row, g in enumerate((4, 5)):
        weight = larger_weight(0.5, Draws(7, g, "mixup")) / WHOLE
        assert torch.equal(
            mixed[row], torch.tensor([weight, 1.0, 1 - weight] if row == 0 else [1 - weight, 1.0, weight])
        )


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (2, 2)])
def test_every_layout_gives_the_mixed_batches_of_one_process_pixel_for_pixel(shared, world: int, workers: int) -> None:
    values = {
        "train": str(shared / "flowers5-train-000000.tar"),
        "train_transform": INCEPTION,
        "randaugment": RandAugment(layers=2, magnitude=10),
        "mixup": 0.2,
    }
    alone = list(islice(stream(settings(**values), size=48), 5))
    ranks = [stream(settings(**values, workers=workers), rank, world, size=48) for rank in range(world)]
    for one in ranks:
        one.seek(alone[1].cursor)
    for whole, *parts in zip(alone[2:], *[islice(rank, 3) for rank in ranks], strict=True):
        images, labels, ids = joined(parts)
        assert torch.equal(images, whole.images)
        assert torch.equal(labels, whole.labels)
        assert torch.equal(ids, whole.sample_ids)
        # The parts of a step are cut after all is mixed.
        micro = parts[0].split(2)
        assert torch.equal(torch.cat([part.images for part in micro]), parts[0].images)
        assert torch.equal(torch.cat([part.labels for part in micro]), parts[0].labels)


def test_a_batch_after_data_that_is_passed_over_is_the_one_that_begins_there(numbered_shards) -> None:
    cfg = settings(train=str(numbered_shards(30, 11)), mixup=0.5)
    whole = list(islice(stream(cfg), 6))
    later = stream(cfg)
    later.seek(Cursor(48))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[3:], islice(later, 3), strict=True))


def test_both_parts_of_an_image_are_among_the_samples_that_are_named_for_its_rank(numbered_shards) -> None:
    cfg = settings(train=str(numbered_shards(30, 11)), mixup=0.5)
    ranks = [stream(cfg, rank, 4) for rank in range(4)]
    for rank, one in enumerate(ranks):
        named = {sample.number for sample in ranks[0].samples(Cursor(16), rank)}
        assert set(next(islice(one, 1, None)).sample_ids.tolist()) == named
        assert {16 + (g - 16 + 4) % 16 for g in named} == named


def test_what_replaces_a_broken_sample_is_mixed_in_its_place_on_every_layout(tmp_path: Path) -> None:
    members = []
    for number in range(24):
        picture = b"broken" if number % 5 == 0 else encoded(numbered_picture(number))
        members += [(f"{number:02d}.cls", b"%d" % (number % 10)), (f"{number:02d}.png", picture)]
    values = {"train": str(write_tar(tmp_path / "some.tar", members)), "max_broken": 100}
    plain, mixed = (next(iter(stream(settings(**values, mixup=p)))) for p in (None, 0.5))
    assert len(plain.broken) == len(mixed.broken) > 0
    images, labels = Mixup(0.5, 10, seed=7).mix(plain.images.numpy(), plain.labels, plain.sample_ids.numpy(), 4)
    parts = joined([next(iter(stream(settings(**values, mixup=0.5), rank, 2))) for rank in (0, 1)])
    for one in (mixed.images, parts[0]):
        assert np.array_equal(one, images)
    for one in (mixed.labels, parts[1]):
        assert torch.equal(one, labels)


def test_synthetic_pictures_are_mixed_too() -> None:
    mixing = synthetic(mixup=0.5)
    streams = train(synthetic()), train(mixing), train(mixing, 0, 2), train(mixing, 1, 2)
    for plain, whole, *parts in islice(zip(*streams), 3):
        images, labels = Mixup(0.5, 5, seed=3).mix(plain.images.numpy(), plain.labels, plain.sample_ids.numpy(), 4)
        assert torch.equal(whole.images, torch.from_numpy(images))
        assert torch.equal(whole.labels, labels)
        assert torch.equal(joined(parts)[0], whole.images)
        assert torch.equal(joined(parts)[1], labels)


def test_a_batch_with_one_image_a_stream_is_refused_with_what_would_do(numbered_shards) -> None:
    cfg = settings(train=str(numbered_shards(5)), mixup=0.2, streams=8)
    [problem] = check_data(cfg, image_size=4, global_batch=8, world=2, needs_test=False)
    assert problem.startswith("data.mixup=0.2 with data.streams=8: ")
    assert problem.endswith("of 8 images each stream gives one; use data.streams=2 or 4, or a batch_size of 16")
    with pytest.raises(ValueError, match=r"data\.mixup=0\.2 with data\.streams=8"):
        stream(cfg, batch=8)
    assert check_data(cfg, image_size=4, global_batch=16, world=2, needs_test=False) == []
    [problem] = check_data(synthetic(mixup=0.2), image_size=4, global_batch=4, world=4, needs_test=False)
    assert problem.endswith("each stream gives one; use a batch_size of 8")


def test_the_fingerprint_tells_how_images_are_augmented_and_stays_where_they_are_not(numbered_shards) -> None:
    folder = str(numbered_shards(5))
    plain = stream(settings(train=folder)).fingerprint()
    assert not {"mixup", "randaugment"} & plain.keys()
    on = settings(train=folder, mixup=0.2, randaugment=RandAugment(layers=2, magnitude=10))
    assert stream(on).fingerprint() == {**plain, "mixup": 0.2, "randaugment": {"layers": 2, "magnitude": 10.0}}
    assert "mixup" not in train(synthetic()).fingerprint()
    assert train(synthetic(mixup=0.2)).fingerprint() == {**train(synthetic()).fingerprint(), "mixup": 0.2}
