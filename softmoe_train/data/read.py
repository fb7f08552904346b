"""This file owns reading one stored sample: its bytes at an offset, its decoded picture, its labels and its text."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softmoe_train.data.batch import Broken
from softmoe_train.data.catalog import Catalog
from softmoe_train.data.decode import Encoded, NotAsIndexedError, UnreadableSampleError, open_image
from softmoe_train.data.fields import MAX_JSON_BYTES, MAX_TEXT_BYTES, text_of
from softmoe_train.data.files import ShardFiles, recent
from softmoe_train.data.index import Samples, Shard, sum_of
from softmoe_train.data.labels import Labels
from softmoe_train.data.records import path_of

_KEPT_INDEXES = 256


class Sample(NamedTuple):
    """A sample as it is stored: its picture, not yet decoded, its classes and its text, where these are asked for."""

    picture: Encoded
    classes: list[int]
    text: str


class SampleReader:
    """Reads samples by shard number and index among those that remain, with a bounded number of open files and indexes.

    `labels` and `text` say what is read beside the picture, None nothing; `kept` which samples of each shard remain, None all of
    them. One is made in each process that reads: it is sent to worker processes without its open files.
    """

    def __init__(
        self,
        shards: list[Shard],
        catalog: Catalog,
        *,
        labels: Labels | None,
        text: str | None,
        max_pixels: int,
        kept: Sequence[NDArray[np.int64] | None] | None = None,
    ) -> None:
        self.shards, self.labels, self.text, self.max_pixels = shards, labels, text, max_pixels
        self.bytes_read = 0  # of members, by this process, each counted once however often it is asked for
        of_label = () if labels is None else (labels.part,)
        of_text = () if text is None else ("txt" if text == "txt" else "json",)
        self._parts = ("image", *of_label, *of_text)  # what a sample is read from
        self._kept = kept if kept is not None else [None] * len(shards)
        self.files, self._catalog = ShardFiles(shards, catalog.remote), catalog
        self._indexes: OrderedDict[int, Samples] = OrderedDict()

    @property
    def counts(self) -> list[int]:
        """How many samples of each shard remain."""
        return [one.count if kept is None else len(kept) for one, kept in zip(self.shards, self._kept, strict=True)]

    def remaining(self, shard: int) -> float:
        """The part of a shard's samples that remains."""
        kept = self._kept[shard]
        return 1.0 if kept is None else len(kept) / max(1, self.shards[shard].count)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_indexes": OrderedDict()}

    def read(self, shard: int, index: int) -> Sample:
        """A sample; raises UnreadableSampleError with the reason."""
        picture, label, text = self.stored(shard, index)
        classes = [] if self.labels is None else self.labels.classes_of(label)
        words = "" if self.text is None else text_of(text, path_of(self.text))
        return Sample(open_image(picture, max_pixels=self.max_pixels), classes, words)

    def stored(self, shard: int, index: int) -> tuple[bytes, bytes, bytes]:
        """The bytes of a sample's picture, label and text, nothing where these are not asked for.

        Raises UnreadableSampleError where one is missing, too large or not what was indexed.
        """
        label = b"" if self.labels is None else self._label(shard, index, self._parts)
        text = b"" if self.text is None else self._text(shard, index)
        # Raw pixels at 16 bits are the most that a picture within the limit can take.
        picture = self._member(shard, index, "image", 6 * self.max_pixels + (1 << 20), "picture", self._parts)
        return picture, label, text

    def label(self, shard: int, index: int) -> bytes:
        """The member that holds a sample's labels, and nothing else of it; raises UnreadableSampleError where there is none."""
        assert self.labels is not None
        return self._label(shard, index, (self.labels.part,))

    def describe(self, shard: int, index: int, g: int, reason: str) -> Broken:
        """The report of a sample that could not be read in the place of `g`."""
        return Broken(*self.name(shard, index), reason, self.shards[shard].sha256, g)

    def name(self, shard: int, index: int) -> tuple[str, str]:
        """The base name of a sample's shard, and its key there."""
        return os.path.basename(self.shards[shard].path), self._samples(shard).key(self._stored(shard, index))

    def close(self) -> None:
        """Close every file."""
        self.files.close()

    def _label(self, shard: int, index: int, along: tuple[str, ...]) -> bytes:
        assert self.labels is not None
        part = self.labels.part
        return self._member(shard, index, part, self.labels.limit, f"label (.{part})", along)

    def _text(self, shard: int, index: int) -> bytes:
        if self.text == "txt":
            return self._member(shard, index, "txt", MAX_TEXT_BYTES, "text (.txt)", self._parts)
        return self._member(shard, index, "json", MAX_JSON_BYTES, "text (.json)", self._parts)

    def _stored(self, shard: int, index: int) -> int:
        """The number in its tar of the sample that is `index`-th of those that remain."""
        kept = self._kept[shard]
        return index if kept is None else int(kept[index])

    def _member(self, shard: int, index: int, part: str, limit: int, what: str, along: tuple[str, ...]) -> bytes:
        """The bytes of a member; those of the parts `along` may come with them."""
        samples, row = self._samples(shard), self._stored(shard, index)
        offset, size = samples.where[part][row].tolist()
        if offset < 0:
            raise UnreadableSampleError(f"it has no {what}")
        if size > limit:
            raise UnreadableSampleError(f"its {what} is {size} bytes, more than {limit}")
        wanted = int(samples.sums[part][row])
        try:
            data = self.files.read(shard, offset, size, around=lambda: _around(samples, row, along))
            self.bytes_read += len(data)
            if sum_of(data) == wanted:
                return data
            data = self.files.again(shard, offset, size, good=lambda data: sum_of(data) == wanted)
            self.bytes_read += len(data)
        except OSError as error:  # of a disk; what is at a URL has been tried again by now
            raise NotAsIndexedError(f"its {what} cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise NotAsIndexedError(f"its {what} breaks off after {len(data)} of {size} bytes")
        if sum_of(data) != wanted:
            raise NotAsIndexedError(f"its {what} is not the {size} bytes that were indexed at byte {offset}")
        return data

    def _samples(self, shard: int) -> Samples:
        return recent(self._indexes, shard, lambda: self._catalog.samples(self.shards[shard]), _KEPT_INDEXES)


def _around(samples: Samples, row: int, parts: tuple[str, ...]) -> tuple[int, int]:
    """The bytes (first, end) that hold these parts of a sample."""
    members = [samples.where[part][row].tolist() for part in parts]
    return min(at for at, _ in members if at >= 0), max(at + size for at, size in members)
