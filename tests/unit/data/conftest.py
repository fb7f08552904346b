"""Shards made on the spot for the tests of data, an index cache of their own, and the real shards if there are any."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softmoe_train.data.records import InceptionCrop, Resize, WebDatasetConfig

Member = tuple[str, bytes]
SHARED = Path(os.environ.get("SOFTMOE_SHARED", Path(__file__).resolve().parents[4] / "shared")) / "data"
# The paper's.
INCEPTION = InceptionCrop(
    kind="inception_crop",
    min_area=0.05,
    max_area=1.0,
    min_aspect=0.75,
    max_aspect=1.33,
    antialias=False,
    flip=True,
    arithmetic="float32",
)


@pytest.fixture(autouse=True)
def index_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty index cache, not the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def shared() -> Path:
    """The folder of real shards; skips where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"no real shards at {SHARED}; set SOFTMOE_SHARED")
    return SHARED


def write_tar(path: Path, members: Iterable[Member], **options: int) -> Path:
    """A tar of plain members, written by tarfile alone."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """The pixels as a picture file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def numbered_picture(number: int, size: int = 4) -> np.ndarray:
    """A picture that says which it is: its number in the first pixel, noise of its own in the others."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    pixels[0, 0] = number // 65536, number // 256 % 256, number % 256
    return pixels


def numbers_of(images: np.ndarray) -> list[int]:
    """The numbers of the pictures in a batch (B, 3, H, W)."""
    first = np.asarray(images)[:, :, 0, 0].astype(int)
    return (first @ [65536, 256, 1]).tolist()


@pytest.fixture
def numbered_shards(tmp_path: Path) -> Callable[..., Path]:
    """A function from samples a shard to a folder of shards with numbered pictures, labelled number mod 10."""

    def make(*counts: int) -> Path:
        folder = tmp_path / "numbered"
        folder.mkdir()
        number = 0
        for shard, count in enumerate(counts):
            members = []
            for _ in range(count):
                key = f"sample-{number:06d}"
                members += [(f"{key}.cls", b"%d" % (number % 10)), (f"{key}.png", encoded(numbered_picture(number)))]
                number += 1
            write_tar(folder / f"train-{shard:06d}.tar", members)
        return folder

    return make


CACHE = {"folder": None, "max_gib": 1.0, "prefetch": 2, "attempts": 3, "timeout": 2.0}


def settings(**changes: object) -> WebDatasetConfig:
    """A plain configuration for small pictures without augmentation, with `changes`."""
    plain = Resize(kind="resize", resize=None, antialias=True)
    values = {
        "kind": "webdataset",
        "train": None,
        "mixture": None,
        "test": None,
        "cache": CACHE,
        "streams": 4,
        "shuffle_window": 8,
        "block": 4,
        "workers": 0,
        "prefetch": 2,
        "label": "cls",
        "classes": None,
        "labels": "hard",
        "text": None,
        "keep": {"labels": None, "keys": None, "renumber": False},
        "holdout": None,
        "quarantine": None,
        "train_transform": plain,
        "test_transform": plain,
        "randaugment": None,
        "mixup": None,
        "scaled_decode": False,
        "max_pixels": 1_000_000,
        "max_broken": 0,
        "max_broken_fraction": None,
    }
    return WebDatasetConfig.model_validate({**values, **changes})
