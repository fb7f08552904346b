"""This file owns pictures: from the bytes of a JPEG, PNG, WebP or PNM file to upright 8-bit RGB.

Gray and palette pictures become RGB, 16-bit gray is scaled to 8 bits, the EXIF orientation is applied, and alpha is
dropped (as Pillow's `convert("RGB")` does), not blended: there is no background to blend with. Of an animation the
first picture counts.
"""

import io
import warnings
from typing import Any

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


def decode_image(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """The picture as H x W x 3 RGB; raises UnreadableSampleError, and does so before decoding above `max_pixels`."""
    if data.startswith(b"\xff\xd8\xff"):
        image = _decode_jpeg(data, max_pixels)
        if image is not None:
            return image
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


def _decode_jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8] | None:
    """The picture by libjpeg-turbo, or None where Pillow has to judge: CMYK, or bytes that libjpeg-turbo objects to."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(int(height), int(width), max_pixels)
        if colorspace not in ("YCbCr", "RGB", "Gray"):
            return None
        _check_cost(data, int(height) * int(width), max_pixels)
        image = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    return _upright(image, jpeg_orientation(data))


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
