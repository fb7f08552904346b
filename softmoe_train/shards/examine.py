"""This file owns the look through one shard: every byte of it read, every picture decoded, every label understood."""

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from softmoe_train.data.damage import damage_of, is_harmless, is_truncation
from softmoe_train.data.decode import UnreadableSampleError, decode_image
from softmoe_train.data.index import Samples, Shard, index_shards, samples_of, sum_of
from softmoe_train.data.labels import Labels
from softmoe_train.data.probe import Header, probe
from softmoe_train.shards.findings import Finding
from softmoe_train.shards.spread import Spread


class Task(NamedTuple):
    """A shard to look through: of which split it is, where, and what its published index says of its content."""

    split: str
    path: str
    published: str | None


class Examined(NamedTuple):
    """What is in a shard."""

    task: Task
    shard: Shard | None  # None where it is no tar
    good: int  # samples that training can use
    findings: list[Finding]
    keys: NDArray[np.uint64]  # hashes
    labels: dict[int, int]
    pixels: Spread
    bytes: Spread
    aspect: Spread


@dataclass(frozen=True)
class Examine:
    """How to look through shards; sent to worker processes."""

    labels: Labels | None  # None: training reads none
    kept: set[int] | None  # labels that training reads; None: all
    keys: str | None  # what is in the keys that it reads
    max_pixels: int

    def __call__(self, task: Task) -> Examined:
        """Look through a shard; whatever is wrong with it is a finding."""
        none = Spread.of([])
        base = os.path.basename(task.path)
        try:
            [shard] = index_shards([task.path])
            samples = samples_of(shard)
            with open(task.path, "rb") as file:
                looking = _Looking(self, task, shard, samples, file.fileno())
                looking.content(hashlib.file_digest(file, "sha256").hexdigest())
                looking.samples()
        except (ValueError, OSError) as error:
            reason = str(error).removeprefix(f"{task.path} ")
            return Examined(
                task,
                None,
                0,
                [Finding("broken tar", task.split, base, "", "", reason)],
                np.zeros(0, np.uint64),
                {},
                none,
                none,
                none,
            )
        spreads = map(Spread.of, (looking.pixels, looking.sizes, looking.aspects))
        return Examined(task, shard, looking.good, looking.findings, looking.hashes(), dict(looking.classes), *spreads)


class _Looking:
    """One shard being looked through."""

    def __init__(self, how: Examine, task: Task, shard: Shard, samples: Samples, file: int) -> None:
        self._how, self._task, self._shard, self._samples, self._file = how, task, shard, samples, file
        self._keys = samples.keys()
        self.findings: list[Finding] = []
        self.good = 0
        self.classes: Counter[int] = Counter()
        self.pixels: list[float] = []
        self.sizes: list[float] = []
        self.aspects: list[float] = []

    def content(self, sha256: str) -> None:
        """Whether the tar is what the indexes say."""
        for known, index in ((self._shard.sha256, "its index"), (self._task.published, "index.json")):
            if known is not None and known != sha256:
                reason = f"its SHA-256 is {sha256[:12]}, and by {index} {known[:12]}; copy it again, or index it again"
                self._find("not what its index says", "", reason)

    def samples(self) -> None:
        """Every sample."""
        seen: set[str] = set()
        for index, key in enumerate(self._keys):
            if key in seen:
                self._find("duplicate key", key, "an earlier sample of this shard has it")
            seen.add(key)
            if self._how.keys is not None and not re.search(self._how.keys, key):
                continue
            before = len(self.findings)
            how = self._how.labels
            label = None if how is None else self._member(index, key, how.part, "label", how.limit)
            picture = self._member(index, key, "image", "picture", 6 * self._how.max_pixels + (1 << 20))
            used = how is None or label is None or self._look_at_label(key, how, label)
            if picture is not None:
                self._look_at_picture(key, picture)
            self.good += used and all(finding.kind in _USABLE for finding in self.findings[before:])

    def hashes(self) -> NDArray[np.uint64]:
        """Of the keys, to find them in other shards."""
        return np.asarray([xxhash.xxh3_64_intdigest(key.encode()) for key in self._keys], np.uint64)

    def _find(self, kind: str, key: str, reason: str) -> None:
        base = os.path.basename(self._task.path)
        self.findings.append(Finding(kind, self._task.split, base, self._shard.sha256, key, reason))

    def _member(self, index: int, key: str, part: str, what: str, limit: int) -> bytes | None:
        """The bytes of a part of a sample, if they are what they should be."""
        offset, size = self._samples.where[part][index].tolist()
        if offset < 0:
            self._find(f"missing {what}", key, f"it has no {what}")
            return None
        if not size:
            self._find("empty member", key, f"its {what} has zero bytes")
            return None
        if size > limit:
            kind = "label malformed" if what == "label" else "decompression bomb"
            self._find(kind, key, f"its {what} is {size} bytes, more than {limit}")
            return None
        data = os.pread(self._file, size, offset)
        if len(data) != size or sum_of(data) != int(self._samples.sums[part][index]):
            self._find("changed since it was indexed", key, f"the bytes of its {what} are not those that were indexed")
            return None
        return data

    def _look_at_label(self, key: str, labels: Labels, member: bytes) -> bool:
        """Whether training would not leave the sample out by its label."""
        try:
            if self._how.kept is not None and self._how.kept.isdisjoint(labels.numbers_of(member)):
                return False
            self.classes.update(labels.classes_of(member))
        except UnreadableSampleError as error:
            kind = "label out of range" if "is outside" in str(error) else "label malformed"
            self._find(kind, key, str(error))
        return True

    def _look_at_picture(self, key: str, picture: bytes) -> None:
        try:
            header = probe(picture)
            if header.pixels > self._how.max_pixels:
                told = f"{header.width}x{header.height} pixels are more than data.max_pixels={self._how.max_pixels}"
                self._find("decompression bomb", key, told)
                return
            decode_image(picture, max_pixels=self._how.max_pixels)
        except UnreadableSampleError as error:
            reason = str(error)
            cut = "truncated" in reason or "Truncated" in reason
            kind = "decompression bomb" if "bomb" in reason else "truncated picture" if cut else "undecodable picture"
            self._find(kind, key, reason)
            return
        self._measure(header, len(picture))
        if header.frames > 1:
            self._find("animated picture", key, f"{header.frames} frames, of which the first counts")
        damage = damage_of(picture)
        if damage is not None:
            kind = "truncated picture" if is_truncation(damage) else "damaged picture"
            self._find("extraneous bytes in a JPEG" if is_harmless(damage) else kind, key, damage)

    def _measure(self, header: Header, size: int) -> None:
        self.pixels.append(header.pixels)
        self.sizes.append(size)
        self.aspects.append(header.width / header.height)


_USABLE = ("animated picture", "extraneous bytes in a JPEG", "duplicate key")
