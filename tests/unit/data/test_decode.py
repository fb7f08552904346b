"""Every kind of picture becomes upright 8-bit RGB, and what cannot is refused with a reason."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from softmoe_train.data.decode import UnreadableSampleError, decode_image
from tests.unit.data.conftest import encoded

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
SMOOTH = np.stack(np.meshgrid(np.arange(0, 160, 4), np.arange(0, 240, 4)), -1).astype(np.uint8)
SMOOTH = np.concatenate([SMOOTH, SMOOTH[..., :1] // 2], -1)  # 60 x 40: JPEG keeps it within a few levels


def decode(data: bytes, max_pixels: int = 10_000) -> np.ndarray:
    image = decode_image(data, max_pixels=max_pixels)
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    return image


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_lossless_rgb_keeps_every_pixel(kind: str) -> None:
    assert np.array_equal(decode(encoded(PIXELS, kind)), PIXELS)


def test_lossless_webp_keeps_every_pixel() -> None:
    assert np.array_equal(decode(encoded(PIXELS, "WEBP", lossless=True)), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_gray_is_repeated_over_rgb(kind: str) -> None:
    assert np.array_equal(decode(encoded(PIXELS[..., 0], kind)), np.repeat(PIXELS[..., :1], 3, 2))


def test_one_bit_pixels_are_black_and_white() -> None:
    bits = PIXELS[..., 0] > 127
    assert np.array_equal(decode(saved(Image.fromarray(bits), "PNG"))[..., 1], np.where(bits, 255, 0))


def test_palette_pixels_get_their_colours() -> None:
    picture = Image.fromarray(PIXELS).quantize(16)
    assert np.array_equal(decode(saved(picture, "PNG")), np.asarray(picture.convert("RGB")))


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_decodes_without_a_warning() -> None:
    picture = Image.fromarray(PIXELS).quantize(16)
    data = saved(picture, "PNG", transparency=bytes(range(16)))
    assert np.array_equal(decode(data), np.asarray(picture.convert("RGB")))


def test_alpha_is_dropped_and_not_blended() -> None:
    alpha = PIXELS[..., :1]
    assert np.array_equal(decode(encoded(np.concatenate([PIXELS, alpha], 2))), PIXELS)
    gray = encoded(np.concatenate([PIXELS[..., 1:2], alpha], 2))
    assert np.array_equal(decode(gray), np.repeat(PIXELS[..., 1:2], 3, 2))


def test_sixteen_bit_gray_is_scaled_to_eight() -> None:
    gray = np.asarray([[0, 128, 257, 32768, 65534, 65535]], np.uint16)
    assert decode(encoded(gray))[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_of_each_colour_space_is_decoded_as_pillow_does(mode: str) -> None:
    picture = Image.fromarray(SMOOTH).convert(mode)
    data = saved(picture, "JPEG", quality=95)
    truth = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode(data).astype(int) - truth).max() <= 2  # two libjpegs differ in rounding
    assert np.abs(truth - np.asarray(picture.convert("RGB"))).mean() < 3


def test_progressive_jpeg_is_decoded() -> None:
    data = saved(Image.fromarray(SMOOTH), "JPEG", quality=95, progressive=True)
    assert np.abs(decode(data).astype(int) - SMOOTH).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    # How a viewer turns the stored picture upright, by the EXIF standard.
    turned = {
        1: SMOOTH,
        2: np.fliplr(SMOOTH),
        3: np.rot90(SMOOTH, 2),
        4: np.flipud(SMOOTH),
        5: SMOOTH.transpose(1, 0, 2),
        6: np.rot90(SMOOTH, -1),
        7: np.rot90(SMOOTH, 2).transpose(1, 0, 2),
        8: np.rot90(SMOOTH, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(saved(Image.fromarray(SMOOTH), kind, exif=exif, quality=95))
    assert image.shape == turned.shape
    assert np.abs(image.astype(int) - turned).mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "PPM"])
def test_a_picture_above_the_pixel_limit_is_refused(kind: str) -> None:
    with pytest.raises(UnreadableSampleError, match=r"40x60 pixels are more than data\.max_pixels=2399"):
        decode(encoded(SMOOTH, kind), max_pixels=2399)
    assert decode(encoded(SMOOTH, kind), max_pixels=2400).shape == (60, 40, 3)


def test_the_pixel_limit_is_read_from_the_header_and_not_after_decoding() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"no pixels at all") + chunk(b"IEND", b"")
    with pytest.raises(UnreadableSampleError, match="9000x9000 pixels"):
        decode(bomb)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "PPM"])
def test_a_cut_off_picture_is_refused(kind: str) -> None:
    data = encoded(SMOOTH, kind)
    with pytest.raises(UnreadableSampleError, match="not a readable picture"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0"])
def test_bytes_that_are_no_picture_are_refused(data: bytes) -> None:
    with pytest.raises(UnreadableSampleError, match="not a readable picture"):
        decode(data)


def test_damaged_bytes_are_decoded_or_refused_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "PPM"):
        data = encoded(SMOOTH, kind)
        for _ in range(100):
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
            with contextlib.suppress(UnreadableSampleError):
                decode(damaged.tobytes())
