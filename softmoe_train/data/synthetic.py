"""This file owns pictures without files: a class-dependent pattern under noise, as a function of (seed, g) alone.

Letters: B images of this rank's batch, S image side, C classes, g a global sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from softmoe_train.data.batch import Batch, Cursor, StoredSample
from softmoe_train.data.keyed import chain, mix, place_number
from softmoe_train.data.mixup import Mixup
from softmoe_train.data.records import SyntheticConfig
from softmoe_train.data.stream import Share

_GRID = 4  # a class is a pattern of 4 x 4 colours
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class SyntheticPictures:
    """Images and labels of a set that is named by `place`; patterns are shared by all sets of one seed."""

    cfg: SyntheticConfig
    image_size: int
    num_classes: int
    seed: int
    place: str

    def images(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """uint8 (B, 3, S, S): the pattern of each image's class plus uniform noise of `cfg.noise` gray levels."""
        colours = _uniform(chain(self.seed, place_number("synthetic pattern"), self._classes(numbers)), 3 * _GRID**2)
        cell = np.arange(self.image_size) * _GRID // self.image_size
        patterns = colours.reshape(-1, 3, _GRID, _GRID)[:, :, cell][:, :, :, cell]
        noise = _uniform(
            chain(self.seed, place_number(f"synthetic noise {self.place}"), numbers), 3 * self.image_size**2
        )
        spread = 12**0.5 * self.cfg.noise  # a uniform number of width w has standard deviation w / sqrt(12)
        values = 32 + 192 * patterns + spread * (noise.reshape(patterns.shape) - 0.5)
        return torch.from_numpy(values.clip(0, 255).astype(np.uint8))

    def labels(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """int64 (B,) class numbers; as multi_hot float32 (B, C), half of the images have a second, arbitrary label."""
        first = torch.from_numpy(self._classes(numbers))
        if self.cfg.labels == "hard":
            return first
        hashed = chain(self.seed, place_number(f"synthetic second label {self.place}"), numbers)
        second = (hashed >> np.uint64(1)) % np.uint64(self.num_classes)
        second = np.where(hashed & np.uint64(1), second.astype(np.int64), first.numpy())
        rows = torch.zeros(len(numbers), self.num_classes)
        return rows.scatter_(1, torch.stack([first, torch.from_numpy(second)], 1), 1.0)

    def _classes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        hashed = chain(self.seed, place_number(f"synthetic class {self.place}"), numbers)
        return (hashed % np.uint64(self.num_classes)).astype(np.int64)


class SyntheticStream:
    """The endless synthetic training stream of one rank; satisfies `ImageStream`. Epochs repeat `num_train` images."""

    def __init__(self, pictures: SyntheticPictures, share: Share, mixup: Mixup | None) -> None:
        self._pictures, self._share, self._mixup, self._start = pictures, share, mixup, 0

    def seek(self, cursor: Cursor) -> None:
        """Make the next `iter` start at `cursor`; raises ValueError where no batch can start."""
        self._share.check_start(cursor)
        self._start = cursor.position

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the position last given to `seek`, for ever."""
        position = self._start
        while True:
            rows = self._share.rows(position)
            position += self._share.global_batch
            numbers = rows % self._pictures.cfg.num_train
            mask = torch.ones(len(rows), dtype=torch.bool)
            images, labels = self._pictures.images(numbers), self._pictures.labels(numbers)
            if self._mixup is not None:
                mixed, labels = self._mixup.mix(images.numpy(), labels, rows, self._share.apart)
                images = torch.from_numpy(mixed)
            yield Batch(images, labels, mask, torch.from_numpy(rows), Cursor(position), ())

    def samples(self, cursor: Cursor, rank: int) -> list[StoredSample]:
        """What `rank` gets of the batch that begins at `cursor`; a key is the number of the picture in its epoch."""
        numbers = replace(self._share, rank=rank).rows(cursor.position).tolist()
        return [StoredSample(g, "synthetic", str(g % self._pictures.cfg.num_train)) for g in numbers]

    def measures(self, cursor: Cursor) -> dict[str, float]:
        """None: there is one source."""
        return {}

    def fingerprint(self) -> dict[str, object]:
        """What decides the samples: the configuration, the image size, the classes and the seed."""
        pictures = self._pictures
        facts = {"image_size": pictures.image_size, "num_classes": pictures.num_classes, "seed": pictures.seed}
        return {**pictures.cfg.model_dump(exclude_none=True), **facts}


class SyntheticEvalStream:
    """One pass over the synthetic held-out images: each exactly once over all ranks, padded to equal batches."""

    def __init__(self, pictures: SyntheticPictures, num_images: int, *, batch_size: int, rank: int, world: int) -> None:
        self._pictures, self._batch_size, self._rank, self._world = pictures, batch_size, rank, world
        self.num_images = num_images

    def __len__(self) -> int:
        return (self.num_images - 1) // (self._batch_size * self._world) + 1

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            numbers = (step * self._world + self._rank) * self._batch_size + np.arange(self._batch_size)
            real = torch.from_numpy(numbers < self.num_images)
            images, labels = self._pictures.images(numbers), self._pictures.labels(numbers)
            images[~real], labels[~real] = 0, 0
            ids = torch.from_numpy(np.where(numbers < self.num_images, numbers, -1))
            yield Batch(images, labels, real, ids, Cursor((step + 1) * self._world * self._batch_size), ())


def _uniform(keys: NDArray[np.uint64], count: int) -> NDArray[np.float32]:
    """(rows, count) numbers of [0, 1), the i-th of a row from the row's key and i."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (mix(keys[:, None] + steps) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
