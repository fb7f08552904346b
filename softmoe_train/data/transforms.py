"""This file owns what is done to a decoded picture before it is a row of a batch: crops, resizes and flips on uint8.

Random choices come from `Draws` keyed by (seed, global sample), so a sample looks the same on every layout.
Resizing follows the paper's pipeline (section 5; big_vision's ops on TensorFlow): bilinear with half-pixel centres and
without antialias unless asked, area averages in evaluation, and the result cast to uint8 by truncation. Pillow rounds,
filters with antialias always and has no exact area average, so this is torch's bilinear in float32 and an area average
of our own.

Letters: H W height and width in pixels, S side of the result.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from softmoe_train.data.keyed import Draws
from softmoe_train.data.records import InceptionCrop, PaddedCrop, Resize, ResizeCentralCrop, TransformConfig

Picture = NDArray[np.uint8]  # H x W x 3
Transform = Callable[[Picture, Draws], Picture]

_ATTEMPTS = 100  # TensorFlow's default
# Truncation would turn a constant 255 that float32 gives as 254.99998 into 254; real fractions this close are lost.
_ROUNDING = 2.0**-12


def build_transform(cfg: TransformConfig, image_size: int) -> Transform:
    """The transform from a picture of any size to S x S x 3; it draws nothing unless its kind is random."""
    match cfg:  # partials and not lambdas: a transform is sent to worker processes
        case InceptionCrop():
            return partial(_inception_crop, cfg=cfg, side=image_size)
        case PaddedCrop():
            return partial(_padded_crop, cfg=cfg, side=image_size)
        case ResizeCentralCrop():
            return partial(_resize_central_crop, cfg=cfg, side=image_size)
        case Resize():
            return partial(_resize, cfg=cfg, side=image_size)


def check_transform(cfg: TransformConfig, image_size: int, *, key: str) -> list[str]:
    """What is wrong with `cfg` for square images of `image_size` pixels; `key` names it in the message."""
    if isinstance(cfg, (Resize, ResizeCentralCrop)) and cfg.resize is not None and cfg.resize < image_size:
        return [
            f"{key}.resize={cfg.resize} is below the image size {image_size}: the central crop is cut out of the "
            f"resized picture; use {image_size} or more."
        ]
    return []


def sample_crop(height: int, width: int, cfg: InceptionCrop, draws: Draws) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, as by TensorFlow's sample_distorted_bounding_box.

    The aspect is uniform, then the height among those that keep area and picture; after 100 misses, the whole picture.
    (TensorFlow never draws the last row or column as the crop's edge; we do.)
    """
    area = height * width
    for _ in range(_ATTEMPTS):
        aspect = cfg.min_aspect + (cfg.max_aspect - cfg.min_aspect) * draws.uniform()
        highest = min(height, int((width + 0.5) / aspect), round((cfg.max_area * area / aspect) ** 0.5))
        lowest = min(highest, round((cfg.min_area * area / aspect) ** 0.5))
        crop_height = lowest + draws.below(highest - lowest + 1)
        crop_width = round(crop_height * aspect)
        fits = 0 < crop_height <= height and 0 < crop_width <= width
        if fits and cfg.min_area * area <= crop_height * crop_width <= cfg.max_area * area:
            top, left = draws.below(height - crop_height + 1), draws.below(width - crop_width + 1)
            return top, left, crop_height, crop_width
    return 0, 0, height, width


def resize_bilinear(picture: Picture, side: int, *, antialias: bool) -> Picture:
    """The picture at side x side pixels, whatever its aspect; itself where it has that size."""
    if picture.shape[:2] == (side, side):
        return picture
    planes = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    planes = interpolate(planes, (side, side), mode="bilinear", align_corners=False, antialias=antialias)
    return planes.add_(_ROUNDING).clamp_(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()


def resize_small_and_crop(picture: Picture, small: int, side: int) -> Picture:
    """The central side x side square of the picture whose shorter side was resized to `small` by area averages."""
    height, width = picture.shape[:2]
    if min(height, width) == small:
        return _central(picture, side)
    factor = small / min(height, width)
    rows = _average(picture, _central_edges(height, round(height * factor), side))
    both = _average(rows.transpose(1, 0, 2), _central_edges(width, round(width * factor), side)).transpose(1, 0, 2)
    return (both + _ROUNDING).astype(np.uint8)


def _central_edges(old: int, new: int, side: int) -> NDArray[np.float64]:
    """The side + 1 edges, in input pixels, of the central `side` of `new` pixels that `old` input pixels become."""
    first = (new - side) // 2
    return np.arange(first, first + side + 1, dtype=np.float64) * (old / new)


def _average(values: NDArray, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The means of `values` along their first dim between edges; a pixel cut by an edge counts by its part inside."""
    whole = np.minimum(edges.astype(np.int64), len(values))
    begin, end = int(whole[0]), min(int(whole[-1]) + 1, len(values))
    integral = np.zeros((end - begin + 2, *values.shape[1:]))  # up to each pixel's edge, the last one twice
    np.cumsum(values[begin:end], axis=0, dtype=np.float64, out=integral[1:-1])
    integral[-1] = integral[-2]
    below, above = integral[whole - begin], integral[whole - begin + 1]
    at_edges = below + (edges - whole)[:, None, None] * (above - below)
    return np.diff(at_edges, axis=0) / np.diff(edges)[:, None, None]


def _inception_crop(picture: Picture, draws: Draws, cfg: InceptionCrop, side: int) -> Picture:
    top, left, height, width = sample_crop(picture.shape[0], picture.shape[1], cfg, draws)
    crop = picture[top : top + height, left : left + width]
    return _flipped(resize_bilinear(crop, side, antialias=cfg.antialias), draws, cfg.flip)


def _padded_crop(picture: Picture, draws: Draws, cfg: PaddedCrop, side: int) -> Picture:
    picture = resize_bilinear(picture, side, antialias=cfg.antialias)
    padded = np.pad(picture, ((cfg.padding, cfg.padding), (cfg.padding, cfg.padding), (0, 0)))
    top, left = draws.below(2 * cfg.padding + 1), draws.below(2 * cfg.padding + 1)
    return _flipped(padded[top : top + side, left : left + side], draws, cfg.flip)


def _resize_central_crop(picture: Picture, _: Draws, cfg: ResizeCentralCrop, side: int) -> Picture:
    return resize_small_and_crop(picture, cfg.resize, side)


def _resize(picture: Picture, _: Draws, cfg: Resize, side: int) -> Picture:
    return _central(resize_bilinear(picture, cfg.resize or side, antialias=cfg.antialias), side)


def _flipped(picture: Picture, draws: Draws, flip: bool) -> Picture:
    return picture[:, ::-1] if flip and draws.uniform() < 0.5 else picture


def _central(picture: Picture, side: int) -> Picture:
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return picture[top : top + side, left : left + side]
