"""This file owns reading one stored sample: its bytes at an offset, its decoded picture and its label."""

import os
from collections import OrderedDict

from softmoe_train.data.batch import Broken
from softmoe_train.data.catalog import Catalog
from softmoe_train.data.decode import Encoded, UnreadableSampleError, open_image
from softmoe_train.data.files import ShardFiles, recent
from softmoe_train.data.index import Samples, Shard, sum_of
from softmoe_train.data.labels import MAX_LABEL_BYTES, classes_of

_KEPT_INDEXES = 256
_READ = ("cls", "image")  # the parts that a sample is read from


class SampleReader:
    """Reads samples by shard number and index, with a bounded number of open files and indexes.

    One is made in each process that reads: it is sent to worker processes without its open files.
    """

    def __init__(
        self, shards: list[Shard], catalog: Catalog, *, labels: str, num_classes: int, max_pixels: int
    ) -> None:
        self.shards, self.labels, self.num_classes, self.max_pixels = shards, labels, num_classes, max_pixels
        self.bytes_read = 0  # of pictures and labels, by this process
        self.files, self._catalog = ShardFiles(shards, catalog.remote), catalog
        self._indexes: OrderedDict[int, Samples] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_indexes": OrderedDict()}

    def read(self, shard: int, index: int) -> tuple[Encoded, list[int]]:
        """The picture, not yet decoded, and the labels of a sample; raises UnreadableSampleError with the reason."""
        picture, label = self.stored(shard, index)
        classes = classes_of(label, labels=self.labels, num_classes=self.num_classes)
        return open_image(picture, max_pixels=self.max_pixels), classes

    def stored(self, shard: int, index: int) -> tuple[bytes, bytes]:
        """The bytes of a sample's picture and label; raises UnreadableSampleError where one is missing, too large or another than indexed."""
        label = self._bytes(shard, index, "cls", MAX_LABEL_BYTES, "label (.cls)")
        # Raw pixels at 16 bits are the most that a picture within the limit can take.
        return self._bytes(shard, index, "image", 6 * self.max_pixels + (1 << 20), "picture"), label

    def describe(self, shard: int, index: int, reason: str) -> Broken:
        """The report of a sample that could not be read."""
        return Broken(*self.name(shard, index), reason)

    def name(self, shard: int, index: int) -> tuple[str, str]:
        """The base name of a sample's shard, and its key there."""
        return os.path.basename(self.shards[shard].path), self._samples(shard).key(index)

    def close(self) -> None:
        """Close every file."""
        self.files.close()

    def _bytes(self, shard: int, index: int, part: str, limit: int, what: str) -> bytes:
        samples = self._samples(shard)
        offset, size = samples.where[part][index].tolist()
        if offset < 0:
            raise UnreadableSampleError(f"it has no {what}")
        if size > limit:
            raise UnreadableSampleError(f"its {what} is {size} bytes, more than {limit}")
        wanted = int(samples.sums[part][index])
        try:
            data = self.files.read(shard, offset, size, around=_around(samples, index))
            if sum_of(data) != wanted:
                data = self.files.again(shard, offset, size)
        except OSError as error:  # of a disk; what is at a URL has been tried again by now
            raise UnreadableSampleError(f"its {what} cannot be read ({error.strerror})") from None
        self.bytes_read += len(data)
        if len(data) != size:
            raise UnreadableSampleError(f"its {what} breaks off after {len(data)} of {size} bytes")
        if sum_of(data) != wanted:
            raise UnreadableSampleError(f"its {what} is not the {size} bytes that were indexed at byte {offset}")
        return data

    def _samples(self, shard: int) -> Samples:
        return recent(self._indexes, shard, lambda: self._catalog.samples(self.shards[shard]), _KEPT_INDEXES)


def _around(samples: Samples, index: int) -> tuple[int, int]:
    """The bytes (first, end) that hold every part of a sample that is read."""
    rows = [samples.where[part][index].tolist() for part in _READ]
    return min(at for at, _ in rows if at >= 0), max(at + size for at, size in rows)
