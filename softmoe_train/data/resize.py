"""This file owns the bilinear resize without antialias, from a box of a picture straight into the planes of a batch.

In float32 it gives what torch's `interpolate` gives on one thread with fused multiply-add, plus 2**-12, truncated; but on every processor and any number
of threads, for boxes with edges
inside a pixel too, and faster. Interpolating along one dim and then along the other is two weighted sums of whole rows (`embedding_bag`, vectorised),
where `interpolate` works out each pixel by itself from its four neighbours. The two differ by rounding alone, which shows only where a value is as near
as that to a whole number: a few pixels in 100,000, which are computed again the way `interpolate` does it.

Letters: H W height and width of the picture in pixels, S side of the result.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # H x W x 3
Planes = NDArray[np.uint8]  # 3 x S x S, contiguous

# Truncation would turn a constant 255 that float32 gives as 254.99998 into 254; real fractions this close are lost.
ROUNDING = 2.0**-12
# Both ways of adding up err by at most half a unit in the last place (2**-17 below 256) an operation: together by less than 14 of these.
_DOUBT = 2.0**-13


class Taps(NamedTuple):
    """Where S result pixels lie along one dim: each between two of the input pixels, and how much it takes of either."""

    pixels: NDArray[np.int32]  # S x 2
    weights: NDArray[np.float32]  # S x 2


@lru_cache(maxsize=2048)
def taps(begin: float, extent: float, count: int, side: int, mirrored: bool) -> Taps:
    """The taps of `side` result pixels laid over `extent` input pixels from the edge `begin` on; beyond its `count` pixels there are no others.

    A result pixel's centre is at begin + (i + 1/2) extent / side, an input pixel's at its number and a half. `mirrored` lays
    them from the other end, so that a flip costs nothing.
    """
    scale = float(np.float32(extent) / np.float32(side))  # torch's, which then rounds once more: a fused multiply-add
    centre = (scale * (np.arange(side) + 0.5) + (begin - 0.5)).astype(np.float32).clip(0)
    first = np.minimum(centre.astype(np.int32), count - 1)
    far = (centre - first.astype(np.float32)).clip(0, 1)
    step = -1 if mirrored else 1
    pixels = np.stack([first, np.minimum(first + 1, count - 1)], 1)[::step]
    return Taps(np.ascontiguousarray(pixels), np.ascontiguousarray(np.stack([np.float32(1) - far, far], 1)[::step]))


def whole(count: int, side: int, *, mirrored: bool = False) -> Taps:
    """The taps of `side` result pixels over all of `count` input pixels."""
    return taps(0.0, float(count), count, side, mirrored)


def resize_bilinear_into(out: Planes, picture: Picture, rows: Taps, columns: Taps, *, add: float = ROUNDING) -> None:
    """Write what `rows` and `columns` say of the picture, plus `add`, truncated: 1/2 rounds to the nearest level."""
    picture, rows = _needed(picture, rows, 0)
    picture, columns = _needed(picture, columns, 1)
    height, width = picture.shape[:2]
    side = len(rows.pixels)
    turned = np.ascontiguousarray(picture.transpose(1, 2, 0)).reshape(width, 3 * height)
    across = _between_rows(torch.from_numpy(turned).float(), columns).reshape(side, 3, height)
    upright = np.ascontiguousarray(across.transpose(2, 1, 0)).reshape(height, 3 * side)
    values = _between_rows(torch.from_numpy(upright), rows)  # S x (3 S)
    values += np.float32(add - _DOUBT)
    low = values.astype(np.uint8)
    values += np.float32(2 * _DOUBT)
    doubtful = np.flatnonzero(values.astype(np.uint8) != low)
    if len(doubtful):
        low.reshape(-1)[doubtful] = _pixels(picture, rows, columns, add, *np.unravel_index(doubtful, (side, 3, side)))
    out[...] = low.reshape(side, 3, side).transpose(1, 0, 2)


def _needed(picture: Picture, along: Taps, dim: int) -> tuple[Picture, Taps]:
    """The picture without rows (or columns) that no result pixel reads, where that is many."""
    if picture.shape[dim] <= 3 * len(along.pixels):
        return picture, along
    read, places = np.unique(along.pixels, return_inverse=True)
    return np.take(picture, read, axis=dim), Taps(places.reshape(-1, 2).astype(np.int32), along.weights)


def _between_rows(table: torch.Tensor, along: Taps) -> NDArray[np.float32]:
    """Weighted sums of two rows of the table each."""
    pixels, weights = torch.from_numpy(along.pixels.reshape(-1)), torch.from_numpy(along.weights.reshape(-1))
    sums, *_ = torch.embedding_bag(table, pixels, _pairs(len(along.pixels)), per_sample_weights=weights)
    return sums.numpy()


@lru_cache
def _pairs(side: int) -> torch.Tensor:
    return torch.arange(0, 2 * side, 2, dtype=torch.int32)


def _pixels(
    picture: Picture,
    rows: Taps,
    columns: Taps,
    add: float,
    y: NDArray[np.int64],
    channel: NDArray[np.int64],
    x: NDArray[np.int64],
) -> NDArray[np.uint8]:
    """Single values the way torch adds them up: upper right, upper left, lower left, lower right, rounded after each."""
    corners = picture[rows.pixels[y][:, :, None], columns.pixels[x][:, None], channel[:, None, None]]
    weights = rows.weights[y][:, :, None] * columns.weights[x][:, None]
    parts = np.multiply(corners, weights, dtype=np.float64)  # which holds products and sums exactly
    total = parts[:, 0, 1].astype(np.float32)
    for part in (parts[:, 0, 0], parts[:, 1, 0], parts[:, 1, 1]):
        total = (part + total).astype(np.float32)
    return (total + np.float32(add)).astype(np.uint8)
