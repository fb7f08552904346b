"""This file owns what is done to a picture before it is a row of a batch: crops, resizes and flips on uint8.

Random choices come from `Draws` keyed by (seed, global sample), so a sample looks the same on every layout.
Resizing follows the paper's pipeline (section 5; big_vision's ops on TensorFlow): bilinear with half-pixel centres and
without antialias unless asked, area averages in evaluation, and the result cast to uint8 by truncation. Pillow rounds,
filters with antialias always and has no exact area average, so this is torch's bilinear in float32 and an area average
of our own. A random crop may have torch's integer kernel instead (`arithmetic: uint8`), which rounds to the nearest level.

A random crop is known from the picture's size alone, so a JPEG may be decoded at a half, a quarter or an eighth of its size where the crop keeps at
least S pixels along both sides (`scaled`). The crop then has edges inside a pixel, and its resize reads exactly that box: nothing is shifted.

Letters: H W height and width in pixels, S side of the result.
"""

from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from softmoe_train.data.decode import Encoded, Reduced
from softmoe_train.data.keyed import Draws
from softmoe_train.data.records import InceptionCrop, PaddedCrop, Resize, ResizeCentralCrop, TransformConfig
from softmoe_train.data.resize import ROUNDING, Picture, Planes, resize_bilinear_into, taps, whole

_ATTEMPTS = 100  # TensorFlow's default
_REDUCTIONS = (8, 4, 2)
_ADD = {"float32": ROUNDING, "uint8": 0.5}  # before truncation


class Transform(Protocol):
    """Writes a picture of any size as S x S planes."""

    def __call__(self, picture: Encoded, draws: Draws, out: Planes) -> None:
        """Nothing is written where the picture cannot be decoded, which raises UnreadableSampleError."""
        ...


def build_transform(cfg: TransformConfig, image_size: int, *, scaled: bool = False) -> Transform:
    """The transform to S x S; it draws nothing unless its kind is random. `scaled` lets it decode a JPEG at less than its size."""
    match cfg:  # partials and not lambdas: a transform is sent to worker processes
        case InceptionCrop():
            return partial(_inception_crop, cfg=cfg, scaled=scaled and may_scale(cfg))
        case PaddedCrop():
            return partial(_padded_crop, cfg=cfg, side=image_size)
        case ResizeCentralCrop():
            return partial(_resize_central_crop, cfg=cfg, side=image_size)
        case Resize():
            return partial(_resize, cfg=cfg, side=image_size)


def may_scale(cfg: TransformConfig) -> bool:
    """Whether it cuts out its part before it resizes, and reads single pixels of it: filters need them all."""
    return isinstance(cfg, InceptionCrop) and not cfg.antialias


def check_transform(cfg: TransformConfig, image_size: int, *, key: str) -> list[str]:
    """What is wrong with `cfg` for square images of `image_size` pixels; `key` names it in the message."""
    match cfg:
        case Resize():
            side = cfg.side(image_size)
        case ResizeCentralCrop():
            side = cfg.resize
        case _:
            return []
    if side >= image_size:
        return []
    more = f"{image_size} or more" if isinstance(cfg.resize, int) else "a ratio of 1/1 or more"
    return [
        f"{key}.resize={cfg.resize} is below the image size {image_size}: the central crop is cut out of the resized picture; use {more}."
    ]


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
    if not antialias:
        out = np.empty((3, side, side), np.uint8)
        resize_bilinear_into(out, picture, whole(picture.shape[0], side), whole(picture.shape[1], side))
        return out.transpose(1, 2, 0)
    planes = interpolate(
        _as_planes(picture).float(), (side, side), mode="bilinear", align_corners=False, antialias=True
    )
    return planes.add_(ROUNDING).clamp_(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()


def resize_small_and_crop(picture: Picture, small: int, side: int) -> Picture:
    """The central side x side square of the picture whose shorter side was resized to `small` by area averages."""
    height, width = picture.shape[:2]
    if min(height, width) == small:
        return _central(picture, side)
    factor = small / min(height, width)
    rows = _average(picture, _central_edges(height, round(height * factor), side))
    both = _average(rows.transpose(1, 0, 2), _central_edges(width, round(width * factor), side)).transpose(1, 0, 2)
    return (both + ROUNDING).astype(np.uint8)


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


def reduction(height: int, width: int, side: int) -> int:
    """The largest of 8, 4, 2 and 1 that leaves a crop at least `side` pixels along both sides."""
    return next((by for by in _REDUCTIONS if min(height, width) >= by * side), 1)


def inception_crop(
    picture: Encoded, out: Planes, box: tuple[int, int, int, int], mirrored: bool, cfg: InceptionCrop, scaled: bool
) -> None:
    """Write the box (top, left, height, width) of a picture, resized as `cfg` says."""
    top, left, height, width = box
    side = out.shape[1]
    reduced = picture.reduced(reduction(height, width, side) if scaled else 1)
    if reduced.by > 1:
        _resize_reduced(out, reduced, box, mirrored, cfg)
        return
    crop = reduced.pixels[top : top + height, left : left + width]
    if cfg.arithmetic == "float32" and not cfg.antialias:
        resize_bilinear_into(out, crop, whole(height, side), whole(width, side, mirrored=mirrored))
        return
    if cfg.arithmetic == "float32":
        result = resize_bilinear(crop, side, antialias=True).transpose(2, 0, 1)
    else:
        planes, size = _as_planes(crop), (side, side)
        result = interpolate(planes, size, mode="bilinear", align_corners=False, antialias=cfg.antialias)[0].numpy()
    out[...] = result[:, :, ::-1] if mirrored else result


def _inception_crop(picture: Encoded, draws: Draws, out: Planes, cfg: InceptionCrop, scaled: bool) -> None:
    box = sample_crop(picture.height, picture.width, cfg, draws)
    mirrored = cfg.flip and draws.uniform() < 0.5
    inception_crop(picture, out, box, mirrored, cfg, scaled)


def _resize_reduced(
    out: Planes, reduced: Reduced, box: tuple[int, int, int, int], mirrored: bool, cfg: InceptionCrop
) -> None:
    """What the box of the whole picture (top, left, height, width) holds, out of the reduced one."""
    top, left, height, width = box
    parts, slices = [], []
    for begin, extent, flip in (
        (reduced.above + top / reduced.by, height, False),
        (reduced.left + left / reduced.by, width, mirrored),
    ):
        first, extent = int(begin), extent / reduced.by
        count = -int(-(begin + extent) // 1) - first
        slices.append(slice(first, first + count))
        parts.append(taps(begin - first, extent, count, out.shape[1], flip))
    resize_bilinear_into(out, reduced.pixels[slices[0], slices[1]], *parts, add=_ADD[cfg.arithmetic])


def _padded_crop(picture: Encoded, draws: Draws, out: Planes, cfg: PaddedCrop, side: int) -> None:
    resized = resize_bilinear(picture.pixels(), side, antialias=cfg.antialias)
    padded = np.pad(resized, ((cfg.padding, cfg.padding), (cfg.padding, cfg.padding), (0, 0)))
    top, left = draws.below(2 * cfg.padding + 1), draws.below(2 * cfg.padding + 1)
    shifted = padded[top : top + side, left : left + side]
    _write(out, shifted[:, ::-1] if cfg.flip and draws.uniform() < 0.5 else shifted)


def _resize_central_crop(picture: Encoded, _: Draws, out: Planes, cfg: ResizeCentralCrop, side: int) -> None:
    _write(out, resize_small_and_crop(picture.pixels(), cfg.resize, side))


def _resize(picture: Encoded, _: Draws, out: Planes, cfg: Resize, side: int) -> None:
    _write(out, _central(resize_bilinear(picture.pixels(), cfg.side(side), antialias=cfg.antialias), side))


def _as_planes(picture: Picture) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]


def _write(out: Planes, picture: Picture) -> None:
    out[...] = picture.transpose(2, 0, 1)


def _central(picture: Picture, side: int) -> Picture:
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return picture[top : top + side, left : left + side]
