"""This file owns pictures: from the bytes of a JPEG, PNG, WebP or PNM file to upright 8-bit RGB.

Gray and palette pictures become RGB, 16-bit gray is scaled to 8 bits, the EXIF orientation is applied, and alpha is
dropped (as Pillow's `convert("RGB")` does), not blended: there is no background to blend with. Of an animation the
first picture counts.
"""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

_FORMATS = ("JPEG", "PNG", "WEBP", "PPM")
_EXIF_WITHIN = 1 << 17  # bytes from the start of a JPEG in which its EXIF block is looked for
_ORIENTATION = 0x0112


class UnreadableSampleError(Exception):
    """A sample that cannot be used; the message is the reason, for the report of broken samples."""


def decode_image(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """The picture as H x W x 3 RGB; raises UnreadableSampleError, and does so before decoding above `max_pixels`."""
    if data.startswith(b"\xff\xd8\xff"):
        image = _decode_jpeg(data, max_pixels)
        if image is not None:
            return image
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            _check_size(picture.height, picture.width, max_pixels)
            orientation = picture.getexif().get(_ORIENTATION, 1)
            return _upright(_to_rgb(picture), orientation)
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
        image = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None
    if data.find(b"Exif\0\0", 0, _EXIF_WITHIN) < 0:
        return image
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
        return _upright(image, picture.getexif().get(_ORIENTATION, 1))


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise UnreadableSampleError(f"{width}x{height} pixels are more than data.max_pixels={max_pixels}")


def _to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.mode.startswith("I"):  # 16-bit gray: "I;16", or "I" in older Pillow
        gray = np.asarray(picture).astype(np.int64).clip(0, 65535)
        gray = ((gray * 255 + 32767) // 65535).astype(np.uint8)
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
