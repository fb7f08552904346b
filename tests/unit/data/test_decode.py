"""Every kind of picture becomes upright 8-bit RGB, and what cannot is refused with a reason."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from softmoe_train.data.decode import UnreadableSampleError, decode_image, open_image
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


def photograph(height: int, width: int) -> np.ndarray:
    """Waves of many pixels: what is left of them at an eighth of the size is known from their formula."""
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([128 + 100 * np.sin(x / 40 + c) * np.cos(y / 50 - c) for c in range(3)], -1).astype(np.uint8)


@pytest.mark.parametrize("by", [1, 2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (481, 643), (333, 500)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_a_reduced_jpeg_is_the_mean_of_blocks_of_the_whole_one(
    by: int, height: int, width: int, subsampling: str
) -> None:
    data = encoded(photograph(height, width), "JPEG", quality=95, subsampling=subsampling)
    reduced = open_image(data, max_pixels=10**6).reduced(by)
    assert reduced.by == by
    assert reduced.pixels.shape == (-(-height // by), -(-width // by), 3)
    whole = decode(data, 10**6).astype(float)[: height // by * by, : width // by * by]
    means = whole.reshape(height // by, by, width // by, by, 3).mean((1, 3))
    assert np.abs(reduced.pixels[: height // by, : width // by] - means).max() < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_picture_says_where_its_upright_edges_are(orientation: int) -> None:
    upright = photograph(483, 645)
    inverse = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's Transpose for each orientation
    stored = Image.fromarray(upright)
    if inverse > 1:
        stored = stored.transpose(Image.Transpose(turns[inverse]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = open_image(saved(stored, "JPEG", quality=95, exif=exif), max_pixels=10**6)
    assert (picture.height, picture.width) == (483, 645)
    reduced = picture.reduced(4)
    y, x = np.mgrid[:120, :160]
    # A reduced pixel's centre in pixels of the whole picture.
    y, x = (y + 1 + 0.5 - reduced.above) * 4, (x + 1 + 0.5 - reduced.left) * 4
    truth = 128 + 100 * np.sin(x / 40) * np.cos(y / 50)
    error = (reduced.pixels[1:121, 1:161, 0] - truth)[:118, :158]
    assert np.abs(error).max() < 5
    # A shift by a single pixel of the whole picture would show.
    assert np.abs(128 + 100 * np.sin((x + 1) / 40) * np.cos(y / 50) - truth).max() > 2
    assert np.abs(error.mean()) < 1


def test_what_cannot_be_reduced_comes_whole() -> None:
    pixels = photograph(96, 64)
    for data in (
        encoded(pixels, "PNG"),
        encoded(pixels, "WEBP", lossless=True),
        saved(Image.fromarray(pixels).convert("CMYK"), "JPEG"),
    ):
        reduced = open_image(data, max_pixels=10_000).reduced(4)
        assert (reduced.by, reduced.pixels.shape) == (1, (96, 64, 3))
    tiny = open_image(encoded(pixels[:1, :1], "JPEG"), max_pixels=10).reduced(8)
    assert tiny.pixels.shape == (1, 1, 3)


def test_a_gray_jpeg_is_reduced_too() -> None:
    data = encoded(photograph(96, 64)[..., 0], "JPEG", quality=95)
    reduced = open_image(data, max_pixels=10_000).reduced(2)
    assert (reduced.by, reduced.pixels.shape) == (2, (48, 32, 3))


def test_a_jpeg_cut_in_the_middle_is_refused_at_any_size() -> None:
    data = encoded(photograph(480, 640), "JPEG")
    for by in (1, 2, 8):
        with pytest.raises(UnreadableSampleError, match="truncated"):
            open_image(data[: len(data) // 2], max_pixels=10**6).reduced(by)


def test_a_jpeg_whose_exif_pillow_cannot_read_is_refused_with_a_reason() -> None:
    data = encoded(photograph(64, 64), "JPEG")
    block = b"Exif\0\0II*\0" + b"\xff" * 40
    broken = data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]
    with contextlib.suppress(UnreadableSampleError):  # or it is taken as it lies
        assert decode(broken).shape == (64, 64, 3)


def test_a_picture_has_the_size_of_its_pixels_whichever_decoder_reads_them() -> None:
    jpeg = saved(Image.fromarray(photograph(40, 90)), "JPEG")
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>'
    turned = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + jpeg[2:]
    mended_by_pillow = turned[:-2] + b"garbage" + turned[-2:]
    for data, size in ((jpeg, (40, 90)), (turned, (40, 90)), (mended_by_pillow, (90, 40))):
        picture = open_image(data, max_pixels=10_000)
        assert (picture.height, picture.width) == picture.pixels().shape[:2] == size
