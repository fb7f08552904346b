"""This file owns hostile pictures and labels: each way that bytes in a sample may be cut, damaged, swollen or forged, drawn from a seed."""

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

Draw = np.random.Generator
KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "ppm": "PPM"}
HUGE = 65_500  # pixels a side: 4.3 billion in all


def picture(draw: Draw, suffix: str, side: int = 24, **options: object) -> bytes:
    """A good picture file of noise."""
    file = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8)).save(file, KINDS[suffix], **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    """A PNG of forged measures and chunks."""
    head = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """A stream of so many zeros: a thousandth of them."""
    return zlib.compress(bytes(count), 9)


@cache
def swollen() -> bytes:
    """A stream of 128 MiB in 128 KiB."""
    return zeros(1 << 27)


def segment(marker: int, body: bytes) -> bytes:
    """One segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def behind(data: bytes, *segments: bytes) -> bytes:
    """A JPEG with segments put behind its beginning."""
    return data[:2] + b"".join(segments) + data[2:]


def measured(data: bytes, width: int, height: int) -> bytes:
    """A JPEG that says of itself to be so large."""
    at = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def exif(entries: int, kind: int, count: int, offset: int, *, tag: int | None = None) -> bytes:
    """EXIF whose entries all point at the same bytes."""
    rows = b"".join(struct.pack(">HHII", tag or (0x9000 + i) % 65_536, kind, count, offset) for i in range(entries))
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", entries) + rows + b"\0\0\0\0"


def swollen_exif(draw: Draw) -> bytes:
    """Five thousand entries of 60 KB each in a segment of 64 KB."""
    body = exif(5000, 7, 60_000, 8)
    return behind(picture(draw, "jpg"), segment(0xE1, body))


def swollen_exif_in_png(draw: Draw) -> bytes:
    """The same with a megabyte: 65,000 entries of 800 KB."""
    body = exif(65_000, 7, 760_000, 8)[6:]
    return picture(draw, "png").replace(b"\0\0\0\0IEND", chunk(b"eXIf", body) + b"\0\0\0\0IEND", 1)


def scans(draw: Draw, count: int, side: int) -> bytes:
    """A progressive JPEG that refines the same coefficients again and again."""
    file = io.BytesIO()
    Image.new("L", (side, side), int(draw.integers(256))).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def animated(draw: Draw, frames: int) -> bytes:
    """A WebP of many pictures."""
    file, noise = io.BytesIO(), draw.integers(0, 256, (frames, 8, 8, 3), np.uint8)
    first, *others = map(Image.fromarray, noise)
    first.save(file, "WEBP", save_all=True, append_images=others)
    return file.getvalue()


def wide_webp(width: int, height: int) -> bytes:
    """A WebP that says of its canvas to be so large."""
    canvas = struct.pack("<I", 0x02) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frame = bytes(6) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + bytes(4)
    pixels = b"VP8L" + struct.pack("<I", 10) + b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(5)
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", 16 + len(pixels)) + frame + pixels
    return b"RIFF" + struct.pack("<I", len(body)) + body


def cut(draw: Draw) -> bytes:
    data = any_picture(draw)
    return data[: draw.integers(len(data))]


def flipped(draw: Draw) -> bytes:
    data = bytearray(any_picture(draw))
    for at in draw.integers(0, len(data), draw.integers(1, 12)):
        data[at] ^= 1 << int(draw.integers(8))
    return bytes(data)


def replaced(draw: Draw) -> bytes:
    data = bytearray(any_picture(draw))
    at, size = draw.integers(len(data)), draw.integers(1, 64)
    data[at : at + size] = draw.integers(0, 256, draw.integers(0, 64), np.uint8).tobytes()
    return bytes(data)


def any_picture(draw: Draw) -> bytes:
    return picture(draw, list(KINDS)[draw.integers(len(KINDS))])


def saved(mode: str, kind: str, **options: object) -> bytes:
    """A plain picture of a mode, as Pillow writes it."""
    file = io.BytesIO()
    Image.new(mode, (24, 24)).save(file, kind, **options)
    return file.getvalue()


MANY = b"\0" * 200
PICTURES: dict[str, Callable[[Draw], bytes]] = {
    "cut": cut,
    "bits flipped": flipped,
    "bytes replaced": replaced,
    "empty": lambda _: b"",
    "noise": lambda draw: draw.bytes(500),
    "a GIF": lambda _: saved("P", "GIF"),
    "a TIFF": lambda _: saved("RGB", "TIFF"),
    "PostScript": lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n(x) print quit",
    "an SVG": lambda _: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "CMYK": lambda _: saved("CMYK", "JPEG"),
    "sixteen bits": lambda _: saved("I;16", "PNG"),
    "PNG of a billion pixels": lambda _: png(HUGE, HUGE, chunk(b"IDAT", zeros(100_000))),
    "PNG of negative size": lambda _: png(-1, -1, chunk(b"IDAT", zeros(1000))),
    "PNG of no size": lambda _: png(0, 0, chunk(b"IDAT", zeros(1000))),
    "PNG of a long line": lambda _: png(999_999, 1, chunk(b"IDAT", zeros(3_000_000))),
    "PNG that unpacks to far more than its pixels": lambda _: png(100, 100, chunk(b"IDAT", swollen())),
    "PNG with a swollen zTXt": lambda _: png(9, 9, chunk(b"zTXt", b"a\0\0" + swollen()), chunk(b"IDAT", zeros(300))),
    "PNG with a swollen iTXt": lambda _: png(
        9, 9, chunk(b"iTXt", b"a\0\1\0\0\0" + swollen()), chunk(b"IDAT", zeros(300))
    ),
    "PNG with a swollen profile": lambda _: png(9, 9, chunk(b"iCCP", b"a\0\0" + swollen()), chunk(b"IDAT", zeros(300))),
    "PNG with ten thousand texts": lambda _: png(
        9, 9, chunk(b"zTXt", b"a\0\0" + zeros(900_000)) * 10_000, chunk(b"IDAT", zeros(300))
    ),
    "PNG with a swollen EXIF": swollen_exif_in_png,
    "interlaced PNG of a megapixel": lambda _: png(1000, 1000, chunk(b"IDAT", zeros(5_000_000)), depth=16, interlace=1),
    "PNG of an unknown chunk": lambda draw: png(9, 9, chunk(b"ABCD", draw.bytes(50)), chunk(b"IDAT", zeros(300))),
    "PNG with escapes in a chunk's name": lambda _: png(9, 9, chunk(b"\x1b[2J", b""), chunk(b"IDAT", zeros(300))),
    "JPEG of a billion pixels": lambda draw: measured(picture(draw, "jpg"), HUGE, HUGE),
    "JPEG of a megapixel without pixels": lambda draw: measured(picture(draw, "jpg"), 1000, 1000),
    "JPEG of no size": lambda draw: measured(picture(draw, "jpg"), 0, 0),
    "JPEG with ten thousand scans": lambda draw: scans(draw, 10_000, 1000),
    "JPEG with a hundred thousand scans": lambda draw: scans(draw, 100_000, 64),
    "JPEG with a swollen EXIF": swollen_exif,
    "JPEG with a swollen EXIF and a broken body": lambda draw: swollen_exif(draw)[:-200],
    "JPEG with a broken EXIF": lambda draw: behind(picture(draw, "jpg"), segment(0xE1, b"Exif\0\0" + draw.bytes(60))),
    "JPEG with EXIF that points at itself": lambda draw: behind(
        picture(draw, "jpg"), segment(0xE1, exif(3, 4, 1, 8, tag=0x8769))
    ),
    "JPEG with an orientation of nonsense": lambda draw: behind(
        picture(draw, "jpg"), segment(0xE1, exif(1, 3, 0xFFFFFFFF, 0xFFFFFFFF, tag=0x0112))
    ),
    "JPEG that says it is many": lambda draw: behind(
        picture(draw, "jpg"), segment(0xE2, b"MPF\0MM\0*\0\0\0\x08" + struct.pack(">H", 5000) + MANY * 300)
    ),
    "JPEG with a profile in pieces": lambda draw: behind(
        picture(draw, "jpg"), *(segment(0xE2, b"ICC_PROFILE\0\x01\xff" + draw.bytes(60_000)) for _ in range(20))
    ),
    "JPEG with resources of nonsense": lambda draw: behind(
        picture(draw, "jpg"), segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + draw.bytes(400))
    ),
    "WebP of many pictures": lambda draw: animated(draw, 300),
    "WebP of 268 megapixels": lambda _: wide_webp(16_383, 16_383),
    "WebP that lies of its length": lambda draw: b"RIFF\xff\xff\xff\xff" + picture(draw, "webp")[8:],
    "PNM of a billion pixels": lambda _: b"P6 65500 65500 255\n" + bytes(300),
    "PNM of a number without end": lambda _: b"P6 " + b"9" * 5000 + b" 1 255\n",
    "PNM of a comment without end": lambda _: b"P6 #" + b"x" * 400_000,
    "PNM of negative size": lambda _: b"P6 -5 -5 255\n" + bytes(75),
    "PNM in letters": lambda _: b"P3 200 200 255\n" + b"7 " * 120_000,
    "PNM in letters without end": lambda _: b"P3 500 500 255\n" + b"7 " * 750_000,
    "PFM of nonsense": lambda draw: b"Pf 9 9 nan\n" + draw.bytes(324),
}

LABELS: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\t\0",
    "negative": b"-1",
    "too large": b"10",
    "a number without end": b"9" * 100_000,
    "just too many digits": b"1" * 19,
    "two megabytes": b"1 " * (1 << 20),
    "a fraction": b"1.0",
    "a power": b"1e0",
    "underscored": b"1_0",
    "in another script": "٣".encode(),
    "not text": b"\xff\xfe1\0",
    "with an escape": b"\x1b]0;owned\x07\x1b[2J",
    "with lines": b"1\r\nWARNING: all is well\n",
    "turned around": "\u202e3".encode(),
    "two of them": b"1 2",
    "hexadecimal": b"0x1",
    "code": b"__import__('os').system('true')",
}
