"""This file owns RandAugment: `layers` operations in a row on a picture, each one of 16 by a keyed draw, all at one magnitude.

The operations, their ranges and their slips are those of the code that V-MoE's public recipes ran (big_vision's `randaug`, from the
TensorFlow EfficientNet; Cubuk et al. 2019), since their accuracies came with them. With m = magnitude / 10:

    AutoContrast, Equalize, Invert            of each channel, at any m
    Rotate                                    by 30 m degrees, either way
    ShearX, ShearY                            by 0.3 m about the upper left pixel, either way
    TranslateX, TranslateY                    by 100 m pixels, either way
    Posterize                                 to int(4 m) bits, at least 1: no change at a magnitude of 20
    Solarize                                  inverts levels from int(256 m) mod 256 on: all of them at 10 and at 20
    SolarizeAdd                               adds int(110 m) to levels below 128
    Color, Contrast, Brightness, Sharpness    blend by 1.8 m + 0.1 (0: none of the picture, 1: no change) from gray, flat gray, black, smoothed
    Cutout                                    a square of 2 int(40 m) pixels about a random one, as far as it lies inside

The slips: 256 overflows in Solarize (big_vision issue 110), and Contrast blends from the number of pixels / 256, which is 196 at 224 pixels,
and not from the mean level. What comes in from outside, and Cutout's square, is gray (128). Lengths in pixels are those of a picture
of 224, in proportion for other sizes, where TensorFlow's stay (and would empty a small picture); the 196 stays.

Pillow computes as TensorFlow does in Equalize, Invert, Posterize, Solarize, Brightness and the blends, and moves nearest pixels to 16 bits of
fraction. It does not in AutoContrast (float64), Color and Sharpness (rounded) and Contrast (the mean), which are written out here. What is
left beside TensorFlow 2.16 at 224 pixels: of two equally near pixels the other one may be taken, and some sums of Color and Sharpness,
whole numbers but for the rounding of float32, differ by a level (before the blend).
"""

import math

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from softmoe_train.data.keyed import Draws
from softmoe_train.data.records import RandAugment
from softmoe_train.data.transforms import Picture

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness",
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
)  # fmt: skip

_GRAY = (128, 128, 128)
_SIDE = 224  # of the pictures whose pixels the lengths are in
_CONTRAST = (_SIDE * _SIDE // 256,) * 3
_LUMA = tuple(255.5 / 255 * weight for weight in (0.2989, 0.5870, 0.1140))  # TensorFlow's way to and from [0, 1]
# Sums are whole thirteenths: half of one keeps a whole number that float32 gives as a little less; the rest undoes Pillow's rounding.
_SMOOTH = ImageFilter.Kernel((3, 3), (1, 1, 1, 1, 5, 1, 1, 1, 1), scale=13, offset=0.5 / 13 - 0.5)


def rand_augment(picture: Picture, cfg: RandAugment, draws: Draws) -> Picture:
    """The square picture after `cfg.layers` operations, drawn with replacement."""
    image = Image.fromarray(picture)
    for _ in range(cfg.layers):
        image = operate(OPERATIONS[draws.below(len(OPERATIONS))], image, cfg.magnitude / 10, draws)
    return np.asarray(image)


def operate(operation: str, image: Image.Image, m: float, draws: Draws) -> Image.Image:
    """The RGB `image` after one of OPERATIONS at m = magnitude / 10; signs and places are drawn."""
    factor, pixels = 1.8 * m + 0.1, image.width / _SIDE
    match operation:
        case "AutoContrast":
            return _auto_contrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Invert":
            return ImageOps.invert(image)
        case "Rotate":
            return _rotate(image, math.radians(_either_way(30 * m, draws)))
        case "Posterize":
            return ImageOps.posterize(image, max(1, int(4 * m)))
        case "Solarize":
            return ImageOps.solarize(image, int(256 * m) % 256)
        case "Color":
            return Image.blend(image.convert("L", (*_LUMA, -0.5)).convert("RGB"), image, factor)
        case "Contrast":
            return Image.blend(Image.new("RGB", image.size, _CONTRAST), image, factor)
        case "Brightness":
            return Image.blend(Image.new("RGB", image.size), image, factor)
        case "Sharpness":
            return Image.blend(image.filter(_SMOOTH), image, factor)
        case "ShearX":
            return _move(image, (1, _either_way(0.3 * m, draws), 0), (0, 1, 0))
        case "ShearY":
            return _move(image, (1, 0, 0), (_either_way(0.3 * m, draws), 1, 0))
        case "TranslateX":
            return _move(image, (1, 0, _either_way(100 * m * pixels, draws)), (0, 1, 0))
        case "TranslateY":
            return _move(image, (1, 0, 0), (0, 1, _either_way(100 * m * pixels, draws)))
        case "Cutout":
            return _cut_out(image, int(40 * m * pixels), draws)
        case "SolarizeAdd":
            return image.point([min(level + int(110 * m), 255) if level < 128 else level for level in range(256)] * 3)
    raise AssertionError(operation)


def _either_way(value: float, draws: Draws) -> float:
    return value if draws.uniform() < 0.5 else -value


def _auto_contrast(image: Image.Image) -> Image.Image:
    """Each channel's levels spread over 0 to 255, in float32 and cut off; a flat channel stays."""
    levels, tables = np.arange(256, dtype=np.float32), []
    for low, high in image.getextrema():  # pyright: ignore[reportGeneralTypeIssues] (a pair for each of three bands)
        scale = np.float32(255) / np.float32(max(high - low, 1))
        spread = (levels * scale - np.float32(low) * scale).clip(0, 255) if low < high else levels
        tables += spread.astype(np.uint8).tolist()
    return image.point(tables)


def _rotate(image: Image.Image, angle: float) -> Image.Image:
    cos, sin, last = math.cos(angle), math.sin(angle), image.width - 1
    return _move(image, (cos, -sin, last * (1 - cos + sin) / 2), (sin, cos, last * (1 - sin - cos) / 2))


def _move(image: Image.Image, x: tuple[float, float, float], y: tuple[float, float, float]) -> Image.Image:
    """Pixel (i, j) becomes the one nearest to (x, y) with x = x[0] i + x[1] j + x[2] and y alike, or gray outside."""
    # Pillow counts from the pixels' edges, and takes the whole part.
    data = [part for a, b, c in (x, y) for part in (a, b, c + (1 - a - b) / 2)]
    return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.NEAREST, fillcolor=_GRAY)


def _cut_out(image: Image.Image, reach: int, draws: Draws) -> Image.Image:
    row, column = draws.below(image.height), draws.below(image.width)
    image = image.copy()
    image.paste(_GRAY, (column - reach, row - reach, column + reach, row + reach))
    return image
