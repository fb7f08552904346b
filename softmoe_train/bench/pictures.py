"""This file owns the pictures that `bench stream` measures: copies of the first of data.train, in temporary shards."""

import io
import math
import tarfile
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from softmoe_train.bench.settings import StreamSettings
from softmoe_train.config import ConfigError
from softmoe_train.data import WebDatasetConfig, build_stream
from softmoe_train.data.decode import decode_image
from softmoe_train.data.stream import WebDatasetStream
from softmoe_train.settings import RunConfig


def copy_pictures(settings: StreamSettings, config: RunConfig, folder: Path) -> WebDatasetConfig:
    """The first pictures of data.train in shards of their own, enlarged if wanted; returns the data configuration that reads them."""
    data = cast(WebDatasetConfig, config.data)
    plain = {"streams": math.gcd(data.streams, settings.images), "randaugment": None, "mixup": None, "max_broken": 0}
    data = data.model_copy(update=plain)
    try:
        stream = build_stream(
            data,
            image_size=config.model.image_size,
            num_classes=10**6,
            seed=0,
            global_batch=settings.images,
            rank=0,
            world=1,
        )
    except ValueError as error:  # a filter that leaves nothing, say
        raise ConfigError([str(error)]) from None
    reader = cast(WebDatasetStream, stream).pictures.reader
    pictures: list[bytes] = []
    for shard in range(len(reader.shards)):
        for index in range(reader.counts[shard]):
            if len(pictures) < settings.images * settings.batches:
                image = reader.stored(shard, index)[0]
                if image.startswith(b"\xff\xd8\xff"):
                    pictures.append(image if settings.megapixels is None else _enlarged(image, settings.megapixels))
    paths = [str(folder / f"bench-{number:06d}.tar") for number in range(2 * data.workers)]
    if len(pictures) < len(paths):
        raise ConfigError([f"data.train={data.train} has {len(pictures)} JPEGs to measure; {len(paths)} are the least"])
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for place in range(number, len(pictures), len(paths)):
                for suffix, content in (("jpg", pictures[place]), ("cls", b"0")):
                    member = tarfile.TarInfo(f"{place:08d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    # The copies are labelled 0, and all are read.
    keep = data.keep.model_copy(update={"labels": None, "keys": None, "renumber": False})
    as_copied = {"train": paths, "label": "cls", "classes": None, "text": None, "keep": keep, "quarantine": None}
    return data.model_copy(update=as_copied)


def _enlarged(data: bytes, megapixels: float) -> bytes:
    """A JPEG of at least so many pixels: the picture at twice its size, mirrored and repeated, as a camera would save it."""
    picture = Image.fromarray(decode_image(data, max_pixels=1 << 28))
    tile = np.asarray(picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC))
    block = np.concatenate([tile, tile[:, ::-1]], 1)
    block = np.concatenate([block, block[::-1]], 0)
    times = math.ceil(math.sqrt(megapixels * 1e6 / (tile.shape[0] * tile.shape[1])))
    whole = np.tile(block, (-(-times // 2), -(-times // 2), 1))[: times * tile.shape[0], : times * tile.shape[1]]
    file = io.BytesIO()
    Image.fromarray(whole).save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()
