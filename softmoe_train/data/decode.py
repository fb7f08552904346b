"""This file owns pictures: from the bytes of a JPEG, PNG, WebP or PNM file to upright 8-bit RGB.

Gray and palette pictures become RGB, 16-bit gray is scaled to 8 bits, the EXIF orientation is applied, and alpha is
dropped (as Pillow's `convert("RGB")` does), not blended: there is no background to blend with. Of an animation the
first picture counts.
"""

import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from softmoe_train.data.headers import (
    costs_too_much,
    exif_orientation,
    jpeg_orientation,
    pnm_problem,
    xmp_orientation,
)

_FORMATS = ("JPEG", "PNG", "WEBP", "PPM")
_EIGHT_BITS = ((np.arange(1 << 16) * 255 + 32767) // 65535).astype(np.uint8)  # of 16


class UnreadableSampleError(Exception):
    """A sample that cannot be used; the message is the reason, for the report of broken samples."""


class Reduced(NamedTuple):
    """The pixels of a picture at 1 / `by` of its size, each the mean of by x by of its pixels, as JPEG's own arithmetic gives it.

    `above` and `left`, in reduced pixels, are where the picture begins: not at 0 where it was stored the other way round
    and its size is no multiple of `by`.
    """

    pixels: NDArray[np.uint8]
    by: int
    above: float
    left: float


class Encoded:
    """A picture whose size is known and whose pixels are decoded when they are asked for, since a crop may not need them all."""

    def __init__(self, height: int, width: int, decode: Callable[[int], Reduced]) -> None:
        self.height, self.width = height, width
        self._decode = decode

    def pixels(self) -> NDArray[np.uint8]:
        """All of the picture, as H x W x 3 RGB; raises UnreadableSampleError."""
        return self._decode(1).pixels

    def reduced(self, by: int) -> Reduced:
        """The picture at 1 / `by` (1, 2, 4 or 8) of its size where its format can do that, or else whole; raises UnreadableSampleError."""
        return self._decode(by)


def decoded(image: NDArray[np.uint8]) -> Encoded:
    """Pixels that are there already."""
    return Encoded(image.shape[0], image.shape[1], lambda _: Reduced(image, 1, 0.0, 0.0))


def decode_image(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """The picture as H x W x 3 RGB; raises UnreadableSampleError, and does so before decoding above `max_pixels`."""
    return open_image(data, max_pixels=max_pixels).pixels()


def open_image(data: bytes, *, max_pixels: int) -> Encoded:
    """The upright picture, not yet decoded if it is a JPEG; raises UnreadableSampleError, and does so before decoding above `max_pixels`."""
    if data.startswith(b"\xff\xd8\xff"):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(int(height), int(width), max_pixels)
            _check_cost(data, int(height) * int(width), max_pixels)
        except ValueError:
            colorspace = None
        if colorspace in ("YCbCr", "RGB", "Gray"):
            return _open_jpeg(data, int(height), int(width), max_pixels)
    return decoded(_decode_by_pillow(data, max_pixels))  # CMYK too


def _open_jpeg(data: bytes, height: int, width: int, max_pixels: int) -> Encoded:
    orientation = jpeg_orientation(data)

    def decode(by: int) -> Reduced:
        try:
            image, by = _decode_jpeg(data, height, width, by)
        except ValueError:  # libjpeg-turbo objects: Pillow has to judge
            return Reduced(_decode_by_pillow(data, max_pixels), 1, 0.0, 0.0)
        rows, columns = (
            -(-size // by) - size / by for size in (height, width)
        )  # of the last pixel, outside the picture
        if orientation >= 5:
            rows, columns = columns, rows
        from_below, from_right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
        return Reduced(_upright(image, orientation), by, rows if from_below else 0.0, columns if from_right else 0.0)

    return Encoded(*((width, height) if orientation >= 5 else (height, width)), decode)


def _decode_jpeg(data: bytes, height: int, width: int, by: int) -> tuple[NDArray[np.uint8], int]:
    """The picture by libjpeg-turbo, and what it was reduced by; raises ValueError."""
    if by > 1:
        # Of its scales, eighths, the smallest with at least so many pixels is taken: this one, unless the picture is tiny.
        size = (-(-height // by), -(-width // by))
        image = simplejpeg.decode_jpeg(data, "RGB", min_height=size[0], min_width=size[1])
        if image.shape[:2] == size:
            return image, by
    return simplejpeg.decode_jpeg(data, "RGB"), 1


def _decode_by_pillow(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    problem = pnm_problem(data)
    if problem is not None:
        raise UnreadableSampleError(problem)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of damaged metadata, by the thousand, changes nothing here
            with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                _check_size(picture.height, picture.width, max_pixels)
                _check_cost(data, picture.height * picture.width, max_pixels)
                return _upright(_to_rgb(picture), _orientation(picture.info))
    except Image.DecompressionBombError:  # Pillow's own limit, looked at before ours
        raise UnreadableSampleError(f"it has more pixels than Pillow or data.max_pixels={max_pixels} allow") from None
    except (UnreadableSampleError, MemoryError):
        raise
    except UnidentifiedImageError:  # its message holds a memory address
        raise UnreadableSampleError("not a readable picture (neither JPEG, PNG, WebP nor PNM)") from None
    except Exception as error:  # decoders raise a dozen types on damaged bytes, and each means the same
        raise UnreadableSampleError(f"not a readable picture ({type(error).__name__}: {error})") from None


def _orientation(info: dict[str | tuple[int, int], Any]) -> int:
    """Which way is up, by what Pillow has found beside the pixels."""
    exif = info.get("exif")
    if exif is None and "Raw profile type exif" in info:
        exif = bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    return exif_orientation(exif or b"") or xmp_orientation(xmp.encode() if isinstance(xmp, str) else xmp)


def _check_cost(data: bytes, pixels: int, max_pixels: int) -> None:
    problem = costs_too_much(data, pixels, max_pixels)
    if problem is not None:
        raise UnreadableSampleError(problem)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise UnreadableSampleError(f"{width}x{height} pixels are more than data.max_pixels={max_pixels}")


def _to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode.startswith("I"):  # 16-bit gray: "I;16", or "I" in older Pillow
        gray = _EIGHT_BITS[np.asarray(picture).clip(0, 65535)]
        return np.repeat(gray[:, :, None], 3, axis=2)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB warns
    return np.array(picture.convert("RGB"))


def _upright(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The picture turned and mirrored as the EXIF orientation (1 to 8) asks."""
    match orientation:
        case 2:
            image = image[:, ::-1]
        case 3:
            image = image[::-1, ::-1]
        case 4:
            image = image[::-1]
        case 5:
            image = image.transpose(1, 0, 2)
        case 6:
            image = image[::-1].transpose(1, 0, 2)
        case 7:
            image = image[::-1, ::-1].transpose(1, 0, 2)
        case 8:
            image = image.transpose(1, 0, 2)[::-1]
    return np.ascontiguousarray(image)
