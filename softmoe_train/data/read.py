"""This file owns reading one stored sample: its bytes at an offset, its decoded picture, its labels and its text."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from softmoe_train.data.batch import Broken
from softmoe_train.data.decode import UnreadableSampleError, decode_image
from softmoe_train.data.fields import MAX_JSON_BYTES, MAX_TEXT_BYTES, text_of
from softmoe_train.data.index import Samples, Shard, samples_of
from softmoe_train.data.labels import Labels
from softmoe_train.data.records import path_of

_OPEN_FILES = 64
_KEPT_INDEXES = 256

Kept = TypeVar("Kept")


class Sample(NamedTuple):
    """A sample as it is stored: its picture (H x W x 3), its classes and its text, where these are asked for."""

    picture: NDArray[np.uint8]
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
        *,
        labels: Labels | None,
        text: str | None,
        max_pixels: int,
        kept: Sequence[NDArray[np.int64] | None] | None = None,
    ) -> None:
        self.shards, self.labels, self.text, self.max_pixels = shards, labels, text, max_pixels
        self._kept = kept if kept is not None else [None] * len(shards)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indexes: OrderedDict[int, Samples] = OrderedDict()

    @property
    def counts(self) -> list[int]:
        """How many samples of each shard remain."""
        return [one.count if kept is None else len(kept) for one, kept in zip(self.shards, self._kept, strict=True)]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict(), "_indexes": OrderedDict()}

    def read(self, shard: int, index: int) -> Sample:
        """A sample; raises UnreadableSampleError with the reason."""
        classes = [] if self.labels is None else self.labels.classes_of(self.label(shard, index))
        text = "" if self.text is None else text_of(self._text(shard, index), path_of(self.text))
        # Raw pixels at 16 bits are the most that a picture within the limit can take.
        picture = self._member(shard, index, "image", 6 * self.max_pixels + (1 << 20), "picture")
        return Sample(decode_image(picture, max_pixels=self.max_pixels), classes, text)

    def label(self, shard: int, index: int) -> bytes:
        """The member that holds a sample's labels; raises UnreadableSampleError where there is none."""
        assert self.labels is not None
        return self._member(shard, index, self.labels.part, self.labels.limit, f"label (.{self.labels.part})")

    def describe(self, shard: int, index: int, g: int, reason: str) -> Broken:
        """The report of a sample that could not be read in the place of `g`."""
        return Broken(*self.name(shard, index), reason, self.shards[shard].sha256, g)

    def name(self, shard: int, index: int) -> tuple[str, str]:
        """The base name of a sample's shard, and its key there."""
        return os.path.basename(self.shards[shard].path), self._samples(shard).key(self._stored(shard, index))

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _text(self, shard: int, index: int) -> bytes:
        if self.text == "txt":
            return self._member(shard, index, "txt", MAX_TEXT_BYTES, "text (.txt)")
        return self._member(shard, index, "json", MAX_JSON_BYTES, "text (.json)")

    def _member(self, shard: int, index: int, part: str, limit: int, what: str) -> bytes:
        return self._bytes(shard, self._samples(shard).where[part][self._stored(shard, index)], limit, what)

    def _stored(self, shard: int, index: int) -> int:
        """The number in its tar of the sample that is `index`-th of those that remain."""
        kept = self._kept[shard]
        return index if kept is None else int(kept[index])

    def _bytes(self, shard: int, where: NDArray[np.int64], limit: int, what: str) -> bytes:
        offset, size = where.tolist()
        if offset < 0:
            raise UnreadableSampleError(f"it has no {what}")
        if size > limit:
            raise UnreadableSampleError(f"its {what} is {size} bytes, more than {limit}")
        data = os.pread(self._file(shard), size, offset)
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
