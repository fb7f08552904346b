"""The resize is torch's interpolation bit for bit, of any box, mirrored or not."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from softmoe_train.data.resize import resize_bilinear_into, taps, whole


def pictures(height: int, width: int) -> list[np.ndarray]:
    """Noise, a flat picture whose values are all whole, and a slope whose values often are."""
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    slope = np.add.outer(np.arange(height), np.arange(width)) % 256
    return [noise, np.full((height, width, 3), 255, np.uint8), np.repeat(slope[..., None], 3, 2).astype(np.uint8)]


def by_torch(image: np.ndarray, side: int) -> np.ndarray:
    """As a decode worker would have it: torch adds up in another order where it has several threads."""
    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    planes = interpolate(planes, (side, side), mode="bilinear", align_corners=False)
    torch.set_num_threads(threads)
    return planes.add_(2.0**-12).clamp_(0, 255).to(torch.uint8)[0].numpy()


def resized(image: np.ndarray, side: int, *, mirrored: bool = False) -> np.ndarray:
    out = np.empty((3, side, side), np.uint8)
    resize_bilinear_into(out, image, whole(image.shape[0], side), whole(image.shape[1], side, mirrored=mirrored))
    return out


SIZES = [
    (1, 1),
    (1, 40),
    (3, 500),
    (7, 5),
    (100, 224),
    (162, 166),
    (187, 223),
    (333, 500),
    (448, 448),
    (671, 90),
    (900, 701),
]


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch has no fused multiply-add here")
@pytest.mark.parametrize("side", [1, 7, 32, 224])
def test_every_byte_is_that_of_torchs_float32_interpolation(side: int) -> None:
    for size in SIZES:
        for image in pictures(*size):
            assert np.array_equal(resized(image, side), by_torch(image, side)), size
            if size[1] > 1:  # rows that do not follow each other in memory, as in a crop
                assert np.array_equal(resized(image[:, 1:], side), by_torch(image[:, 1:], side)), size


def test_mirroring_the_taps_mirrors_the_result() -> None:
    image = pictures(61, 83)[0]
    assert np.array_equal(resized(image, 32, mirrored=True), resized(image, 32)[:, :, ::-1])


@pytest.mark.parametrize(("begin", "extent"), [(0.0, 50.0), (0.25, 48.5), (0.875, 49.125), (0.5, 33.0)])
def test_a_box_with_edges_inside_pixels_is_read_where_it_lies(begin: float, extent: float) -> None:
    image, side = pictures(51, 50)[0], 24
    out = np.empty((3, side, side), np.uint8)
    resize_bilinear_into(out, image, whole(51, side), taps(begin, extent, 50, side, False), add=0.5)
    rows = (np.arange(side) + 0.5) * 51 / side - 0.5
    columns = begin + (np.arange(side) + 0.5) * extent / side - 0.5
    plane = image[..., 2].astype(np.float64)
    between = np.stack([np.interp(columns, np.arange(50), row) for row in plane])
    truth = np.stack([np.interp(rows, np.arange(51), column) for column in between.T], 1)
    assert np.abs(out[2] - truth).max() < 0.501
