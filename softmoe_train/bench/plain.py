"""This file owns what `bench stream` is compared with: the plain webdataset pipeline, Pillow and torch's collation, with given crops."""

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import batched
from webdataset.pipeline import DataPipeline
from webdataset.tariterators import group_by_keys, tar_file_expander


class Crop(NamedTuple):
    """A part of a picture in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


class PlainSamples(IterableDataset):
    """Images (3 x S x S) and labels of shards, for ever; the n-th time that a key is met it is cut by the n-th of its crops, in a ring.

    The shards are opened here and handed over as files: `webdataset.gopen` is never called.
    """

    def __init__(self, paths: Sequence[str], crops: Mapping[str, Sequence[Crop]], side: int) -> None:
        self.paths, self.crops, self.side = list(paths), crops, side

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The samples of this worker's shards."""
        info, met = get_worker_info(), Counter[str]()
        paths = self.paths if info is None else self.paths[info.id :: info.num_workers]
        while True:
            for sample in group_by_keys(tar_file_expander(_opened(paths))):
                key = sample["__key__"]
                crop = self.crops[key][met[key] % len(self.crops[key])]
                met[key] += 1
                yield cut(sample["jpg"], crop, self.side), int(sample["cls"])


def cut(data: bytes, crop: Crop, side: int) -> torch.Tensor:
    """The crop of an encoded picture as Pillow resizes it."""
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    with Image.open(io.BytesIO(data)) as picture:
        picture = picture.convert("RGB").crop(box).resize((side, side), Image.Resampling.BILINEAR)
        if crop.mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def plain_batches(samples: PlainSamples, images: int, workers: int, prefetch: int) -> Iterator[Any]:
    """Batches as webdataset's own examples make them."""
    pipeline: IterableDataset = DataPipeline(samples, batched(images, collation_fn=_collated))  # pyright: ignore[reportAssignmentType]
    loader = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_single_threaded,
    )
    return iter(loader)


def _opened(paths: Sequence[str]) -> Iterator[dict[str, str | BinaryIO]]:
    for path in paths:
        with open(path, "rb") as file:
            yield {"url": path, "stream": file}


def _collated(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def _single_threaded(_: int) -> None:
    torch.set_num_threads(1)
