"""Which way is up, and what would take hours, is told from a picture's bytes without a decoder."""

import io
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from softmoe_train.data.decode import UnreadableSampleError, decode_image
from softmoe_train.data.headers import exif_orientation, jpeg_orientation, pnm_problem
from tests.hostile_pictures import behind, exif, picture, scans, segment, swollen_exif
from tests.unit.data.conftest import encoded

DRAW = np.random.default_rng(0)
PIXELS = DRAW.integers(0, 256, (8, 12, 3), np.uint8)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_the_orientation_is_the_one_that_pillow_reads(order: str, orientation: int) -> None:
    block = Image.Exif()
    block.endian = order
    block[0x010F], block[0x0112], block[0x0132] = "a maker", orientation, "2026:01:01 00:00:00"
    data = encoded(PIXELS, "JPEG", exif=block)
    with Image.open(io.BytesIO(data)) as theirs:
        assert theirs.getexif()[0x0112] == orientation
    assert jpeg_orientation(data) == (orientation if 1 <= orientation <= 8 else 1)


def test_damaged_exif_turns_nothing_and_raises_nothing() -> None:
    whole = exif(3, 3, 1, 6 << 16, tag=0x0112)
    assert exif_orientation(whole) == 6
    for cut in range(len(whole)):
        assert exif_orientation(whole[:cut]) in (None, 6)
    for _ in range(2000):
        damaged = bytearray(whole)
        damaged[int(DRAW.integers(len(whole)))] = int(DRAW.integers(256))
        assert exif_orientation(bytes(damaged)) in (None, *range(1, 9))


def test_an_orientation_in_xmp_counts_where_the_exif_has_none() -> None:
    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="3"/>')
    other = segment(0xE1, exif(1, 3, 1, 1 << 16, tag=0x0128))
    for segments, want in (
        ([other, xmp], 3),
        ([xmp], 1),
        ([segment(0xE1, exif(1, 3, 1, 8 << 16, tag=0x0112)), xmp], 8),
    ):
        assert jpeg_orientation(behind(picture(DRAW, "jpg"), *segments)) == want


def test_thousands_of_damaged_entries_are_passed_over_in_silence_and_no_time() -> None:
    data = swollen_exif(DRAW)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(data, max_pixels=1000)
    assert time.process_time() - began < 0.05


def test_a_jpeg_of_ten_thousand_scans_is_refused_and_one_of_sixteen_is_not() -> None:
    with pytest.raises(UnreadableSampleError, match="a JPEG of 65536 pixels in 10005 scans, more than 500"):
        decode_image(scans(DRAW, 10_000, 256), max_pixels=89_000_000)
    with pytest.raises(UnreadableSampleError, match="scans, more than 16"):
        decode_image(scans(DRAW, 12, 256), max_pixels=256 * 256)
    assert decode_image(scans(DRAW, 10, 256), max_pixels=256 * 256).shape == (256, 256, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"P6 2 2 255\n" + bytes(12), None),
        (b"P5\n# a comment\n2 2\n# another\n255\n" + bytes(4), None),
        (b"P3 1 1 255\n1 2 3\n", None),
        (b"P1 9 9\n" + b"1 " * (3 << 20), "written as numbers"),
        (b"P6 #" + b"x" * 100_000 + b"\n2 2 255\n" + bytes(12), "without width and height"),
        (b"P6 -2 2 255\n" + bytes(12), "without width and height"),
        (b"\x89PNG", None),
    ],
)
def test_a_pnm_is_given_to_pillow_only_where_it_is_read_in_no_time(data: bytes, reason: str | None) -> None:
    found = pnm_problem(data)
    assert found is None if reason is None else reason in str(found)


def test_sixteen_bits_become_eight_by_rounding() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    want = np.round(every.astype(np.float64) * 255 / 65535).astype(np.uint8)
    assert np.array_equal(decode_image(encoded(every), max_pixels=1 << 16)[..., 0], want)
