"""This file owns reading one stored sample: its bytes at an offset, its decoded picture and its label."""

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from softmoe_train.data.batch import Broken
from softmoe_train.data.decode import Encoded, UnreadableSampleError, open_image
from softmoe_train.data.index import Samples, Shard, samples_of
from softmoe_train.data.labels import MAX_LABEL_BYTES, classes_of

_OPEN_FILES = 64
_KEPT_INDEXES = 256

Kept = TypeVar("Kept")


class SampleReader:
    """Reads samples by shard number and index, with a bounded number of open files and indexes.

    One is made in each process that reads: it is sent to worker processes without its open files.
    """

    def __init__(self, shards: list[Shard], *, labels: str, num_classes: int, max_pixels: int) -> None:
        self.shards, self.labels, self.num_classes, self.max_pixels = shards, labels, num_classes, max_pixels
        self.bytes_read = 0  # of pictures and labels, by this process
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indexes: OrderedDict[int, Samples] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict(), "_indexes": OrderedDict()}

    def read(self, shard: int, index: int) -> tuple[Encoded, list[int]]:
        """The picture, not yet decoded, and the labels of a sample; raises UnreadableSampleError with the reason."""
        picture, label = self.stored(shard, index)
        classes = classes_of(label, labels=self.labels, num_classes=self.num_classes)
        return open_image(picture, max_pixels=self.max_pixels), classes

    def stored(self, shard: int, index: int) -> tuple[bytes, bytes]:
        """The bytes of a sample's picture and label; raises UnreadableSampleError where one is missing or too large."""
        samples = self._samples(shard)
        label = self._bytes(shard, samples.where["cls"][index], MAX_LABEL_BYTES, "label (.cls)")
        # Raw pixels at 16 bits are the most that a picture within the limit can take.
        return self._bytes(shard, samples.where["image"][index], 6 * self.max_pixels + (1 << 20), "picture"), label

    def describe(self, shard: int, index: int, reason: str) -> Broken:
        """The report of a sample that could not be read."""
        return Broken(*self.name(shard, index), reason)

    def name(self, shard: int, index: int) -> tuple[str, str]:
        """The base name of a sample's shard, and its key there."""
        return os.path.basename(self.shards[shard].path), self._samples(shard).key(index)

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _bytes(self, shard: int, where: NDArray[np.int64], limit: int, what: str) -> bytes:
        offset, size = where.tolist()
        if offset < 0:
            raise UnreadableSampleError(f"it has no {what}")
        if size > limit:
            raise UnreadableSampleError(f"its {what} is {size} bytes, more than {limit}")
        data = os.pread(self._file(shard), size, offset)
        self.bytes_read += len(data)
        if len(data) != size:
            raise UnreadableSampleError(f"its {what} breaks off after {len(data)} of {size} bytes")
        return data

    def _file(self, shard: int) -> int:
        def open_shard() -> int:
            file = os.open(self.shards[shard].path, os.O_RDONLY | os.O_CLOEXEC)
            facts, known = os.fstat(file), self.shards[shard]
            if (facts.st_size, facts.st_mtime_ns) != (known.size, known.mtime_ns):
                os.close(file)
                raise ValueError(
                    f"{known.path} has changed since this run indexed it: shards must stay as they are; start again."
                )
            return file

        return _recent(self._files, shard, open_shard, _OPEN_FILES, os.close)

    def _samples(self, shard: int) -> Samples:
        return _recent(self._indexes, shard, lambda: samples_of(self.shards[shard]), _KEPT_INDEXES, lambda _: None)


def _recent(
    kept: OrderedDict[int, Kept], key: int, make: Callable[[], Kept], limit: int, drop: Callable[[Kept], object]
) -> Kept:
    """The value under `key`, made if absent; beyond `limit` values the one unused for longest is dropped."""
    if key in kept:
        kept.move_to_end(key)
        return kept[key]
    if len(kept) >= limit:
        drop(kept.popitem(last=False)[1])
    kept[key] = make()
    return kept[key]
