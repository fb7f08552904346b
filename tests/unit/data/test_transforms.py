"""Crops, resizes and flips follow the paper's pipeline, and depend on (seed, sample) alone."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from softmoe_train.data.decode import Encoded, Reduced, decoded, open_image
from softmoe_train.data.keyed import Draws
from softmoe_train.data.records import InceptionCrop, PaddedCrop, Resize, ResizeCentralCrop, TransformConfig
from softmoe_train.data.transforms import (
    build_transform,
    check_transform,
    resize_bilinear,
    resize_small_and_crop,
    sample_crop,
)
from tests.unit.data.conftest import INCEPTION, encoded

PADDED = PaddedCrop(kind="padded_crop", padding=4, antialias=True, flip=True)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def transformed(cfg: TransformConfig, side: int, image: np.ndarray, draws: Draws) -> np.ndarray:
    """What the transform makes of the picture, as S x S x 3."""
    out = np.empty((3, side, side), np.uint8)
    build_transform(cfg, side)(decoded(image), draws, out)
    return out.transpose(1, 2, 0)


def draws(sample: int, seed: int = 0) -> Draws:
    return Draws(seed, sample, "augment")


def bilinear_at(image: np.ndarray, y: float, x: float) -> float:
    """One value between pixel centres, by the definition."""
    y, x = np.clip(y, 0, image.shape[0] - 1), np.clip(x, 0, image.shape[1] - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, image.shape[0] - 1), min(x0 + 1, image.shape[1] - 1)
    top = image[y0, x0] + (x - x0) * (image[y0, x1] - image[y0, x0])
    bottom = image[y1, x0] + (x - x0) * (image[y1, x1] - image[y1, x0])
    return top + (y - y0) * (bottom - top)


@pytest.mark.parametrize(("height", "width", "side"), [(37, 53, 16), (5, 7, 24), (9, 9, 8)])
def test_bilinear_without_antialias_is_the_interpolation_between_pixel_centres_truncated(height, width, side) -> None:
    image = noise(height, width)
    plane = image[..., 1].astype(np.float64)
    result = resize_bilinear(image, side, antialias=False)[..., 1]
    for row in range(side):
        for column in range(side):
            truth = bilinear_at(plane, (row + 0.5) * height / side - 0.5, (column + 0.5) * width / side - 0.5)
            # float32 weights: 255 * 2**-24 * the width in pixels is below 0.001.
            assert truth - 1.001 < result[row, column] < truth + 0.001


def test_bilinear_with_antialias_agrees_with_pillow_within_a_level() -> None:
    image = noise(61, 45)
    truth = np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR))
    difference = resize_bilinear(image, 20, antialias=True).astype(int) - truth
    assert set(np.unique(difference)) <= {-1, 0}  # Pillow rounds, the paper's pipeline truncates


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("level", [0, 1, 77, 254, 255])
def test_a_flat_picture_keeps_its_level(level: int, antialias: bool) -> None:
    image = np.full((97, 131, 3), level, np.uint8)
    assert (resize_bilinear(image, 50, antialias=antialias) == level).all()
    assert (resize_small_and_crop(image, 61, 50) == level).all()


def test_a_picture_of_the_wanted_size_stays_exactly_as_it_is() -> None:
    image = noise(32, 32)
    for cfg in (
        Resize(kind="resize", resize=None, antialias=True),
        Resize(kind="resize", resize=None, antialias=False),
        ResizeCentralCrop(kind="resize_central_crop", resize=32),
    ):
        assert np.array_equal(transformed(cfg, 32, image, draws(0)), image)


@pytest.mark.parametrize(("height", "width", "small", "side"), [(12, 18, 6, 6), (12, 18, 6, 4), (42, 24, 8, 8)])
def test_area_resize_by_a_whole_factor_is_the_mean_of_blocks(height: int, width: int, small: int, side: int) -> None:
    image, factor = noise(height, width), min(height, width) // small
    blocks = image.reshape(height // factor, factor, width // factor, factor, 3).sum((1, 3)) // factor**2
    top, left = (blocks.shape[0] - side) // 2, (blocks.shape[1] - side) // 2
    assert np.array_equal(resize_small_and_crop(image, small, side), blocks[top : top + side, left : left + side])


@pytest.mark.parametrize(("height", "width", "small", "side"), [(23, 31, 7, 5), (9, 8, 20, 16), (50, 33, 32, 32)])
def test_area_resize_by_any_factor_is_the_mean_over_the_covered_area(height, width, small, side) -> None:
    image = noise(height, width)
    new = [round(old * small / min(height, width)) for old in (height, width)]
    weights = []
    for old, count in zip((height, width), new):
        edges = np.arange(count + 1) * old / count
        overlap = np.minimum(edges[1:, None], np.arange(1, old + 1)) - np.maximum(edges[:-1, None], np.arange(old))
        weights.append(overlap.clip(0) / (old / count))
    truth = np.einsum("hH,wW,HWc->hwc", *weights, image)
    top, left = (new[0] - side) // 2, (new[1] - side) // 2
    truth = truth[top : top + side, left : left + side]
    result = resize_small_and_crop(image, small, side)
    assert (truth - 1.001 < result).all()
    assert (result < truth + 0.001).all()


def test_a_square_resize_ignores_the_aspect_and_crops_the_centre() -> None:
    image = noise(40, 20)
    result = transformed(Resize(kind="resize", resize=12, antialias=False), 8, image, draws(0))
    assert np.array_equal(result, resize_bilinear(image, 12, antialias=False)[2:10, 2:10])


@pytest.mark.parametrize(("height", "width"), [(480, 640), (100, 37), (8, 8), (33, 500)])
def test_inception_crops_keep_their_bounds(height: int, width: int) -> None:
    for sample in range(300):
        top, left, crop_height, crop_width = sample_crop(height, width, INCEPTION, draws(sample))
        assert 0 <= top <= height - crop_height
        assert 0 <= left <= width - crop_width
        if (crop_height, crop_width) != (height, width):
            assert 0.05 <= crop_height * crop_width / (height * width) <= 1
            assert abs(crop_width - crop_height * (0.75 + 1.33) / 2) <= crop_height * (1.33 - 0.75) / 2 + 0.5


def test_inception_crops_vary_over_the_whole_range_of_areas() -> None:
    areas = []
    for sample in range(500):
        _, _, height, width = sample_crop(300, 300, INCEPTION, draws(sample))
        areas.append(height * width / 300**2)
    assert min(areas) < 0.07
    assert max(areas) > 0.9
    assert 0.2 < np.mean(areas) < 0.5  # the height is uniform, so the area leans to the small side


def test_where_no_crop_fits_the_whole_picture_is_taken() -> None:
    narrow = INCEPTION.model_copy(update={"min_area": 0.9})
    assert sample_crop(10, 200, narrow, draws(0)) == (0, 0, 10, 200)


def test_a_padded_crop_is_a_shifted_and_maybe_mirrored_picture_on_black() -> None:
    image = noise(32, 32)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    shifted = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    possible = {one.tobytes() for one in shifted} | {one[:, ::-1].tobytes() for one in shifted}
    seen = {np.ascontiguousarray(transformed(PADDED, 32, image, draws(g))).tobytes() for g in range(2000)}
    assert seen == possible


def test_half_of_the_pictures_are_mirrored() -> None:
    image = noise(8, 8)
    cfg = PADDED.model_copy(update={"padding": 0})
    kept = sum(np.array_equal(transformed(cfg, 8, image, draws(g)), image) for g in range(1000))
    assert abs(kept - 500) < 5 * 16  # standard deviation 15.8


@pytest.mark.parametrize("cfg", [INCEPTION, PADDED])
def test_what_is_done_depends_on_seed_and_sample_alone(cfg) -> None:
    image = noise(50, 40)
    first = transformed(cfg, 16, image, draws(5, seed=1))
    assert np.array_equal(transformed(cfg, 16, image, draws(5, seed=1)), first)
    assert not np.array_equal(transformed(cfg, 16, image, draws(6, seed=1)), first)
    assert not np.array_equal(transformed(cfg, 16, image, draws(5, seed=2)), first)


def test_a_resize_below_the_image_size_is_refused_with_its_key() -> None:
    for cfg in (
        ResizeCentralCrop(kind="resize_central_crop", resize=200),
        Resize(kind="resize", resize=200, antialias=True),
    ):
        [problem] = check_transform(cfg, 224, key="data.test_transform")
        assert problem.startswith("data.test_transform.resize=200 is below the image size 224")
        assert check_transform(cfg, 200, key="data.test_transform") == []


def test_crossed_bounds_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"min_area=0\.5 is above max_area=0\.25"):
        InceptionCrop.model_validate({**INCEPTION.model_dump(), "min_area": 0.5, "max_area": 0.25})


SCALES = [(1, 300, 310), (1, 447, 500), (2, 448, 460), (2, 700, 448), (4, 900, 896), (8, 1800, 2000)]


@pytest.mark.parametrize(("by", "height", "width"), SCALES)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_leaves_the_crop_enough_pixels(by, height, width) -> None:
    asked = []

    def decode(by: int) -> Reduced:
        asked.append(by)
        return Reduced(np.zeros((-(-height // by), -(-width // by), 3), np.uint8), by, 0.0, 0.0)

    cfg = INCEPTION.model_copy(update={"min_area": 1.0, "min_aspect": width / height, "max_aspect": width / height})
    build_transform(cfg, 224, scaled=True)(Encoded(height, width, decode), draws(0), np.empty((3, 224, 224), np.uint8))
    assert asked == [by]
    for other in (
        cfg.model_copy(update={"antialias": True}),
        PADDED,
        Resize(kind="resize", resize=None, antialias=False),
    ):
        asked.clear()
        build_transform(other, 224, scaled=True)(
            Encoded(height, width, decode), draws(0), np.empty((3, 224, 224), np.uint8)
        )
        assert asked == [1]


@pytest.mark.parametrize("arithmetic", ["float32", "uint8"])
def test_a_crop_of_a_reduced_picture_is_not_shifted(arithmetic: str) -> None:
    height, width, side = 1203, 1605, 64
    y, x = np.mgrid[:height, :width] + 0.5
    waves = np.stack([128 + 100 * np.sin(x / 60 + c) * np.cos(y / 70 - c) for c in range(3)], -1)
    picture = open_image(encoded(waves.astype(np.uint8), "JPEG", quality=95), max_pixels=10**7)
    cfg = INCEPTION.model_copy(update={"arithmetic": arithmetic})
    out = np.empty((3, side, side), np.uint8)
    for sample in range(12):
        build_transform(cfg, side, scaled=True)(picture, draws(sample), out)
        own = draws(sample)
        top, left, crop_height, crop_width = sample_crop(height, width, cfg, own)
        columns = left + (np.arange(side) + 0.5) * crop_width / side
        rows = top + (np.arange(side)[:, None] + 0.5) * crop_height / side
        columns = columns[::-1] if own.uniform() < 0.5 else columns
        truth = 128 + 100 * np.sin(columns / 60) * np.cos(rows / 70)
        inside = (out[0] - truth)[2:-2, 2:-2]  # at an edge the last pixel is repeated
        assert np.abs(inside).max() < 6
        assert np.abs(inside.mean()) < 1.2  # truncated twice
        slope = (100 / 60) * np.cos(columns / 60) * np.cos(rows / 70)  # levels a pixel along the width
        shift = (inside * slope[2:-2, 2:-2]).sum() / (slope[2:-2, 2:-2] ** 2).sum()
        assert abs(shift) < 0.25, "pixels of the whole picture, of which a result pixel covers 4 or more"


def test_integer_arithmetic_is_float32_rounded_to_the_nearest_level_within_one() -> None:
    image = noise(150, 190)
    exact = transformed(INCEPTION, 64, image, draws(3)).astype(int)
    rounded = transformed(INCEPTION.model_copy(update={"arithmetic": "uint8"}), 64, image, draws(3)).astype(int)
    assert set(np.unique(rounded - exact)) <= {-1, 0, 1, 2}
    assert 0.4 < (rounded - exact).mean() < 0.6
