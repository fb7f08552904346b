"""This file owns the first look at a part of a source: which of its items are pictures, what is left out, and pictures made smaller.

A part becomes a listing, a JSON line for each picture that goes into a shard, in the folder of the make. Bytes that lie in no file of the
source (a parquet's, a picture made smaller) go into a spool beside it. The listing gets its name last, so one that is there is whole.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from softmoe_train.data.damage import damage_of, is_harmless
from softmoe_train.data.decode import UnreadableSampleError, decode_image
from softmoe_train.data.probe import Header, probe
from softmoe_train.shards.resize import Resize, resized
from softmoe_train.shards.source import Item, LeftOut, Source, Stored, key_of, shown

_HEAD = 1 << 16  # bytes in which a header is looked for before the whole file is read


class Listed(NamedTuple):
    """A picture that goes into a shard; a line of a listing."""

    key: str
    suffix: str
    path: str  # of the source, or the base name of the part's spool
    offset: int
    size: int
    labels: list[int]
    classes: list[str]
    text: str | None
    extra: dict[str, Any] | None


class Looked(NamedTuple):
    """What became of a part."""

    number: int
    pictures: int
    left_out: int


@dataclass(frozen=True)
class Look:
    """How to look at the parts of a source; sent to worker processes."""

    source: Source[Any]
    folder: Path
    verify: bool
    resize: Resize | None
    max_pixels: int

    def __call__(self, task: tuple[int, Any]) -> Looked:
        """List a part under its number, unless that was done before."""
        number, part = task
        listing = listing_of(self.folder, number)
        if listing.exists():
            return Looked(number, _lines(listing), _lines(left_out_of(self.folder, number)))
        temporary, pictures, left = listing.with_suffix(".part"), 0, 0
        with (
            open(temporary, "w", encoding="utf-8") as good,
            open(left_out_of(self.folder, number), "w", encoding="utf-8") as bad,
            open(spool_of(self.folder, number), "wb") as spool,
        ):
            for item in self.source.items(part):
                found = item if isinstance(item, LeftOut) else self._listed(item, spool)
                if isinstance(found, LeftOut):
                    left += 1
                    bad.write(json.dumps(found._asdict()) + "\n")
                else:
                    pictures += 1
                    good.write(json.dumps(found) + "\n")
        if not os.path.getsize(spool_of(self.folder, number)):
            os.unlink(spool_of(self.folder, number))
        os.replace(temporary, listing)
        return Looked(number, pictures, left)

    def _listed(self, item: Item, spool: BinaryIO) -> Listed | LeftOut:
        name = shown(item.name)
        try:
            key = key_of(item.name)
            if item.text is not None:
                item.text.encode()
            header, data = self._examined(item.picture)
        except UnicodeEncodeError:
            return LeftOut(name, "its text is not Unicode")
        except (ValueError, UnreadableSampleError) as error:
            return LeftOut(name, str(error))
        except OSError as error:
            return LeftOut(name, f"cannot be read ({error.strerror})")
        suffix = header.suffix
        if data is not None:
            place, suffix = Stored(os.path.basename(spool.name), spool.tell(), len(data[0])), data[1]
            spool.write(data[0])
        else:
            assert isinstance(item.picture, Stored)
            place = item.picture._replace(path=os.path.abspath(item.picture.path))
        return Listed(key, suffix, *place, list(item.labels), list(item.classes), item.text, item.extra)

    def _examined(self, picture: Stored | bytes) -> tuple[Header, tuple[bytes, str] | None]:
        """The header of a picture; and what to spool, with its suffix, where that is not to be read from the source."""
        size = picture.size if isinstance(picture, Stored) else len(picture)
        if not size:
            raise ValueError("it has zero bytes")
        if size > 6 * self.max_pixels + (1 << 20):  # as the training's reader limits it
            raise ValueError(f"it has {size} bytes, more than a picture within max_pixels={self.max_pixels} takes")
        whole = picture if isinstance(picture, bytes) else None
        head = read(picture._replace(size=min(size, _HEAD))) if isinstance(picture, Stored) else picture
        try:
            header = probe(head)
        except UnreadableSampleError:
            if len(head) == size or not isinstance(picture, Stored):
                raise
            whole = read(picture)
            header = probe(whole)
        if header.pixels > self.max_pixels:
            raise ValueError(f"{header.width}x{header.height} pixels are more than max_pixels={self.max_pixels}")
        if self.verify or (self.resize is not None and self.resize.changes(header)):
            whole = whole or read(picture)  # type: ignore[arg-type]
            pixels = decode_image(whole, max_pixels=self.max_pixels)
            damage = damage_of(whole) if self.verify else None
            if damage is not None and not is_harmless(damage):
                raise ValueError(f"a damaged picture ({damage})")
            if self.resize is not None and self.resize.changes(header):
                return header, resized(pixels, header.suffix, self.resize)
        return header, (picture, header.suffix) if isinstance(picture, bytes) else None


def read(place: Stored) -> bytes:
    """The bytes at a place; raises ValueError where they are not all there."""
    with open(place.path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), place.size, place.offset)
    if len(data) != place.size:
        raise ValueError(f"it breaks off after {len(data)} of {place.size} bytes")
    return data


def listing_of(folder: Path, number: int) -> Path:
    """The listing of a part."""
    return folder / f"part-{number:06d}.jsonl"


def left_out_of(folder: Path, number: int) -> Path:
    """What was left out of a part."""
    return folder / f"part-{number:06d}.left_out.jsonl"


def spool_of(folder: Path, number: int) -> Path:
    """The bytes of a part's pictures that lie in no file of the source; absent where there are none."""
    return folder / f"part-{number:06d}.bin"


def read_listed(line: bytes) -> Listed:
    """A line of a listing."""
    return Listed(*json.loads(line))


def left_out_in(path: Path) -> Iterator[LeftOut]:
    """The lines of a file of what was left out; none where there is no such file."""
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield LeftOut(**json.loads(line))


def _lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)
