"""This file owns making a picture smaller for its shard: upright pixels in, an encoded picture out. The same bytes under the same Pillow."""

import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from softmoe_train.data.probe import Header

_LOSSLESS = ("png", "ppm")  # stay so; JPEG and WebP become JPEG


class Resize(NamedTuple):
    """The pixels that are left of the short or the long side, and the quality of JPEG."""

    pixels: int
    side: str
    quality: int

    def changes(self, header: Header) -> bool:
        """Whether a picture is larger."""
        return self._side(header.height, header.width) > self.pixels

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the smaller picture, of the same aspect."""
        factor = self.pixels / self._side(height, width)
        return max(1, round(height * factor)), max(1, round(width * factor))

    def _side(self, height: int, width: int) -> int:
        return min(height, width) if self.side == "short" else max(height, width)


def resized(pixels: NDArray[np.uint8], suffix: str, resize: Resize) -> tuple[bytes, str]:
    """The picture (H x W x 3) made smaller with antialias and encoded, and its suffix."""
    height, width = resize.size(*pixels.shape[:2])
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if suffix in _LOSSLESS:
        picture.save(file, "PNG")
        return file.getvalue(), "png"
    picture.save(file, "JPEG", quality=resize.quality)
    return file.getvalue(), "jpg"
