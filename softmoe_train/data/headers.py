"""This file owns what is read of a picture file without a decoder: which way is up, and whether few bytes ask for hours of work.

Orientation is one entry among the thousands that EXIF may hold. Pillow reads them all, and warns of each that is damaged;
here only its own twelve bytes are looked at.
"""

import re
import struct
from collections.abc import Iterator

_ORIENTATION = 0x0112
_INTEGERS = {3: "H", 4: "L", 8: "h", 9: "l"}  # types of an EXIF value
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_METADATA_WITHIN = 1 << 17  # bytes from the start of a JPEG in which its metadata is looked for
_SCANS = 500  # of a progressive JPEG; encoders make about ten
_SCANS_AT_LIMIT = 16  # of one with as many pixels as are allowed: each scan walks over all of them
_LETTERS = 1 << 20  # bytes of a PNM that writes its pixels as decimal numbers: about a second
# A magic number, then width and height, each after spaces and comments, near the beginning.
_PNM = re.compile(rb"P[1-6](?:(?:\s|#[^\n\r]*[\n\r])+[0-9]+){2}\s")
_PNM_WITHIN = 1 << 16


def costs_too_much(data: bytes, pixels: int, max_pixels: int) -> str | None:
    """Why a picture of `pixels` pixels would keep a decoder busy beyond measure; None where it does not."""
    if data.startswith(b"\xff\xd8"):
        most = min(_SCANS, _SCANS_AT_LIMIT * max_pixels // max(pixels, 1))
        # Inside of compressed pixels a byte 0xff is never followed by this one.
        scans = data.count(b"\xff\xda")
        return None if scans <= most else f"a JPEG of {pixels} pixels in {scans} scans, more than {most}"
    return None


def pnm_problem(data: bytes) -> str | None:
    """Why a PNM is not given to Pillow, which reads comments and numbers letter by letter; None where it is, or is none."""
    if not data.startswith((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")):
        return None
    if _PNM.match(data, 0, _PNM_WITHIN) is None:
        return "not a readable picture (a PNM without width and height)"
    if data[1:2] in b"123" and len(data) > _LETTERS:
        return f"a PNM of {len(data)} bytes that are written as numbers: more than {_LETTERS}; write it as binary"
    return None


def jpeg_orientation(data: bytes) -> int:
    """The orientation (1 to 8) that a JPEG's EXIF asks for, or its XMP where the EXIF has none; 1 where there is no EXIF."""
    for segment in _segments(data):
        if segment.startswith(b"Exif\0\0"):
            found = exif_orientation(segment[6:])
            return found or xmp_orientation(data[:_METADATA_WITHIN])
    return 1


def exif_orientation(tiff: bytes) -> int | None:
    """The orientation in a block of EXIF; None where it is absent, damaged or none of 1 to 8."""
    tiff = tiff.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return None
        (at,) = struct.unpack_from(f"{order}L", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHL", tiff, entry)
            if tag == _ORIENTATION:
                if count != 1 or kind not in _INTEGERS:
                    return None
                (value,) = struct.unpack_from(order + _INTEGERS[kind], tiff, entry + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:  # it breaks off
        pass
    return None


def xmp_orientation(metadata: bytes) -> int:
    """The orientation in a block of XMP, or 1."""
    found = _XMP.search(metadata)
    return int(found[1]) if found and b"1" <= found[1] <= b"8" else 1


def _segments(data: bytes) -> Iterator[bytes]:
    """What the segments of application data before the pixels of a JPEG hold."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xFF:  # padding
            at += 1
            continue
        (size,) = struct.unpack_from(">H", data, at + 2)
        if data[at + 1] == 0xDA or size < 2:
            return
        if data[at + 1] == 0xE1:
            yield data[at + 4 : at + 2 + size]
        at += 2 + size
