"""This file owns what the header of a picture says: its format, size and number of frames, without decoding a pixel."""

import io
import re
import warnings
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from softmoe_train.data.decode import UnreadableSampleError

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "PPM": "ppm"}  # MPO: a JPEG with more behind it


class Header(NamedTuple):
    """What a picture says of itself: the suffix of its format, pixels, and frames (more than one of an animation)."""

    suffix: str
    height: int
    width: int
    frames: int

    @property
    def pixels(self) -> int:
        """As many as decoding would make."""
        return self.height * self.width


def probe(data: bytes) -> Header:
    """The header at the start of `data`; raises UnreadableSampleError where there is none of a format that we read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # who asks has a limit of pixels of their own
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "PPM")) as picture:
                frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
                return Header(_SUFFIXES[str(picture.format)], picture.height, picture.width, frames)
    except UnidentifiedImageError:  # its message holds a memory address
        raise UnreadableSampleError("not a readable picture (neither JPEG, PNG, WebP nor PNM)") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\((\d+) pixels", str(error))
        raise UnreadableSampleError(f"a decompression bomb ({pixels[1] if pixels else 'too many'} pixels)") from None
    except MemoryError:
        raise
    except Exception as error:  # parsers raise a dozen types on damaged bytes, and each means the same
        raise UnreadableSampleError(f"not a readable picture ({type(error).__name__}: {error})") from None
