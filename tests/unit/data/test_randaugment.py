"""Each operation of RandAugment against its formula and against TensorFlow, and what is drawn for it."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from softmoe_train.data import build_eval_stream, build_stream
from softmoe_train.data.keyed import Draws
from softmoe_train.data.randaugment import OPERATIONS, operate, rand_augment
from softmoe_train.data.records import PaddedCrop, RandAugment
from tests.unit.data.conftest import settings

F = np.float32
SIDE = 56  # a quarter of 224: 25 m pixels in place of 100 m


class Drawn:
    """Draws that were made beforehand."""

    def __init__(self, *numbers: float) -> None:
        self.numbers: Iterator[float] = iter(numbers)

    def uniform(self) -> float:
        return next(self.numbers)

    def below(self, bound: int) -> int:
        return int(next(self.numbers) * bound)


def operated(operation: str, picture: np.ndarray, magnitude: float, *drawn: float) -> np.ndarray:
    return np.asarray(operate(operation, Image.fromarray(picture), magnitude / 10, Drawn(*drawn)))


def noise(low: int = 20, high: int = 230) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (SIDE, SIDE, 3), np.uint8)


def blended(degenerate: np.ndarray, picture: np.ndarray, magnitude: float) -> np.ndarray:
    factor = F(1.8 * magnitude / 10 + 0.1)
    return (degenerate + factor * (picture.astype(F) - degenerate.astype(F))).clip(0, 255).astype(np.uint8)


def smoothed(picture: np.ndarray) -> np.ndarray:
    wide, side = picture.astype(int), len(picture)
    around = sum(wide[i : side - 2 + i, j : side - 2 + j] for i in range(3) for j in range(3))
    result = picture.copy()
    result[1:-1, 1:-1] = (around + 4 * wide[1:-1, 1:-1]) // 13
    return result


def spread(channel: np.ndarray) -> np.ndarray:
    low, high = F(channel.min()), F(channel.max())
    scale = F(255) / (high - low)
    return (channel * scale + -low * scale).clip(0, 255).astype(np.uint8)


def equalized(channel: np.ndarray) -> np.ndarray:
    counts = np.bincount(channel.ravel(), minlength=256)
    step = (counts.sum() - counts[channel.max()]) // 255
    before = np.cumsum(counts) - counts
    return ((before + step // 2) // step).clip(0, 255)[channel].astype(np.uint8)


FORMULAS = {
    "AutoContrast": lambda x, _: np.stack([spread(x[..., c]) for c in range(3)], -1),
    "Equalize": lambda x, _: np.stack([equalized(x[..., c]) for c in range(3)], -1),
    "Invert": lambda x, _: 255 - x,
    "Posterize": lambda x, m: x >> (8 - max(1, int(0.4 * m))) << (8 - max(1, int(0.4 * m))),
    "Solarize": lambda x, m: np.where(x < int(25.6 * m) % 256, x, 255 - x),
    "Brightness": lambda x, m: blended(np.zeros_like(x), x, m),
    "Contrast": lambda x, m: blended(np.full_like(x, 196), x, m),
    "Sharpness": lambda x, m: blended(smoothed(x), x, m),
    "SolarizeAdd": lambda x, m: np.where(x < 128, np.minimum(x.astype(int) + int(11 * m), 255), x),
}


@pytest.mark.parametrize("magnitude", [0, 3, 10, 20])
@pytest.mark.parametrize("operation", sorted(FORMULAS))
def test_levels_are_those_of_the_formula(operation: str, magnitude: float) -> None:
    picture = noise()
    assert np.array_equal(operated(operation, picture, magnitude), FORMULAS[operation](picture, magnitude))


@pytest.mark.parametrize("magnitude", [3, 10, 20])
def test_color_blends_from_gray_by_luma(magnitude: float) -> None:
    picture = noise()
    gray = (picture @ np.array([0.2989, 0.5870, 0.1140]) * 255.5 / 255).astype(int)[..., None]
    off = operated("Color", picture, magnitude).astype(int) - blended(
        np.broadcast_to(gray, picture.shape), picture, magnitude
    )
    assert (off != 0).mean() < 1e-3  # float32 luma, cut off


@pytest.mark.parametrize("operation", ["AutoContrast", "Equalize"])
def test_a_flat_channel_stays(operation: str) -> None:
    picture = noise()
    picture[..., 1] = 77
    result = operated(operation, picture, 10)
    assert (result[..., 1] == 77).all()
    assert not np.array_equal(result[..., 0], picture[..., 0])


def moved(picture: np.ndarray, x: tuple[float, ...], y: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The nearest pixels, gray outside, and where one of two is not clearly nearer."""
    j, i = np.mgrid[:SIDE, :SIDE]
    places = np.stack([b[0] * i + b[1] * j + b[2] for b in (y, x)])
    near = np.floor(places + 0.5).astype(int)
    inside = ((near >= 0) & (near < SIDE)).all(0)
    result = np.where(inside[..., None], picture[tuple(near.clip(0, SIDE - 1))], 128)
    return result, (np.abs(places - near) > 0.495).any(0)


def turn(degrees: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    cos, sin, middle = np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), (SIDE - 1) / 2
    return (cos, -sin, middle * (1 - cos + sin)), (sin, cos, middle * (1 - sin - cos))


MOVES = {
    "Rotate": lambda m: turn(3 * m),
    "ShearX": lambda m: ((1, 0.03 * m, 0), (0, 1, 0)),
    "ShearY": lambda m: ((1, 0, 0), (0.03 * m, 1, 0)),
    "TranslateX": lambda m: ((1, 0, 2.5 * m), (0, 1, 0)),
    "TranslateY": lambda m: ((1, 0, 0), (0, 1, 2.5 * m)),
}


@pytest.mark.parametrize("magnitude", [4, 10, 20])
@pytest.mark.parametrize("drawn", [0.49, 0.5])
@pytest.mark.parametrize("operation", sorted(MOVES))
def test_pixels_come_from_where_the_matrix_says_and_gray_from_outside(
    operation: str, drawn: float, magnitude: float
) -> None:
    picture = noise()
    truth, unclear = moved(picture, *MOVES[operation](magnitude if drawn < 0.5 else -magnitude))
    off = (operated(operation, picture, magnitude, drawn) != truth).any(-1)
    assert not off[~unclear].any()
    assert unclear.mean() < 0.15


@pytest.mark.parametrize(("magnitude", "reach"), [(10, 10), (20, 20), (1, 1), (0, 0)])
def test_cutout_is_a_gray_square_about_the_drawn_pixel(magnitude: float, reach: int) -> None:
    picture = noise()
    truth = picture.copy()
    truth[max(0, 5 - reach) : 5 + reach, max(0, 50 - reach) : 50 + reach] = 128
    assert np.array_equal(operated("Cutout", picture, magnitude, 5.5 / SIDE, 50.5 / SIDE), truth)


# Mean level, and its means weighted by row / 223 and by column / 223, that TensorFlow 2.16.2 gives at magnitudes 10 and 20, with a
# sign of +, or Cutout's square about row 22 and column 201.
TENSORFLOW = {
    "AutoContrast": ((126.98, 71.56, 59.95), (126.98, 71.56, 59.95)),
    "Equalize": ((126.67, 74.23, 60.32), (126.67, 74.23, 60.32)),
    "Invert": ((124.67, 58.13, 65.69), (124.67, 58.13, 65.69)),
    "Rotate": ((129.98, 68.64, 64.43), (129.97, 68.43, 66.33)),
    "Posterize": ((122.83, 65.62, 58.05), (130.33, 69.37, 61.81)),
    "Solarize": ((124.67, 58.13, 65.69), (124.67, 58.13, 65.69)),
    "Color": ((128.27, 69.07, 64.12), (127.04, 68.09, 68.6)),
    "Contrast": ((76.63, 44.73, 32.68), (31.31, 18.86, 9.29)),
    "Brightness": ((224.17, 117.51, 109.38), (253.21, 127.26, 126.46)),
    "Sharpness": ((130.33, 69.37, 61.8), (131.25, 69.83, 62.26)),
    "ShearX": ((126.33, 66.33, 60.68), (123.52, 64.19, 60.33)),
    "ShearY": ((133.99, 69.59, 64.52), (136.15, 69.16, 66.11)),
    "TranslateX": ((124.33, 64.49, 62.42), (126.33, 63.62, 63.91)),
    "TranslateY": ((135.5, 66.78, 65.89), (130.65, 64.14, 64.97)),
    "Cutout": ((132.69, 69.67, 63.85), (134.98, 70.24, 65.54)),
    "SolarizeAdd": ((179.33, 87.39, 88.51), (199.94, 94.23, 100.46)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_picture_of_224_pixels_comes_out_as_from_tensorflow(operation: str) -> None:
    rows, columns = np.mgrid[:224, :224]
    channels = 40 + rows * 120 // 223, 200 - columns * 150 // 223, 90 + (rows + columns) * 60 // 446
    picture = (np.stack(channels, -1) + ((7 * rows + 13 * columns) % 32)[..., None]).astype(np.uint8)
    for magnitude, truth in zip((10, 20), TENSORFLOW[operation]):
        level = operated(operation, picture, magnitude, 0.1, 0.9).mean(-1)
        assert np.allclose(
            [level.mean(), (level * rows).mean() / 223, (level * columns).mean() / 223], truth, atol=0.03
        )


def test_layers_are_operations_in_a_row() -> None:
    picture, cfg = noise(), RandAugment(layers=2, magnitude=10)
    for sample in range(20):
        image, draws = Image.fromarray(picture), Draws(3, sample, "randaugment")
        for _ in range(2):
            image = operate(OPERATIONS[draws.below(16)], image, 1.0, draws)
        assert np.array_equal(rand_augment(picture, cfg, Draws(3, sample, "randaugment")), np.asarray(image))


def test_all_sixteen_operations_are_drawn_equally_often(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(
        "softmoe_train.data.randaugment.operate", lambda name, image, m, draws: drawn.append(name) or image
    )
    for sample in range(800):
        rand_augment(noise()[:4, :4], RandAugment(layers=2, magnitude=10), Draws(3, sample, "randaugment"))
    counts = [drawn.count(operation) for operation in OPERATIONS]
    assert sum(counts) == 1600
    assert all(abs(count - 100) < 50 for count in counts)  # standard deviation 9.7


def test_what_is_done_depends_on_seed_and_sample_alone() -> None:
    picture, cfg = noise(), RandAugment(layers=3, magnitude=9)
    results = [rand_augment(picture, cfg, Draws(seed, sample, "randaugment")) for seed in (0, 1) for sample in range(8)]
    again = [rand_augment(picture, cfg, Draws(seed, sample, "randaugment")) for seed in (0, 1) for sample in range(8)]
    assert all(np.array_equal(a, b) for a, b in zip(results, again, strict=True))
    assert len({result.tobytes() for result in results}) == 16


def test_a_mirrored_picture_is_augmented_as_its_copy_and_stays_itself() -> None:
    picture, cfg = noise()[:, ::-1], RandAugment(layers=2, magnitude=10)
    before = picture.copy()
    for sample in range(30):
        result = rand_augment(picture, cfg, Draws(0, sample, "randaugment"))
        assert result.shape == picture.shape
        assert np.array_equal(result, rand_augment(before, cfg, Draws(0, sample, "randaugment")))
    assert np.array_equal(picture, before)


def test_a_stream_augments_what_its_transform_made_and_leaves_held_out_pictures_alone(numbered_shards) -> None:
    folder, cfg = str(numbered_shards(13)), RandAugment(layers=2, magnitude=10)
    crop = PaddedCrop(kind="padded_crop", padding=1, antialias=True, flip=True)
    both = [settings(train=folder, test=folder, train_transform=crop, randaugment=one) for one in (None, cfg)]
    sizes = {"image_size": 4, "num_classes": 10, "seed": 7, "rank": 0, "world": 1}
    plain, augmented = (next(iter(build_stream(one, global_batch=8, **sizes))) for one in both)
    for row, g in enumerate(augmented.sample_ids.tolist()):
        truth = rand_augment(plain.images[row].permute(1, 2, 0).numpy(), cfg, Draws(7, g, "randaugment"))
        assert np.array_equal(augmented.images[row].permute(1, 2, 0), truth)
    assert torch.equal(augmented.labels, plain.labels)
    held_out = [next(iter(build_eval_stream(one, batch_size=13, **sizes))).images for one in both]
    assert torch.equal(*held_out)


@pytest.mark.parametrize("magnitude", [-1, 20.5])
def test_a_magnitude_outside_the_released_range_is_refused(magnitude: float) -> None:
    with pytest.raises(ValidationError, match="magnitude"):
        RandAugment(layers=2, magnitude=magnitude)
