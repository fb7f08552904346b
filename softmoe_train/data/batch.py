"""This file owns data on its way to the model: the position that resumes, the batch, and what a stream promises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int64, UInt8
    from torch import Tensor

# Letters: B images of this rank's batch, H W height and width in pixels, C classes.


@dataclass(frozen=True)
class Cursor:
    """The next global sample: the same on any number of ranks and workers."""

    position: int

    def to_json(self) -> dict[str, int]:
        """The cursor as a JSON object."""
        return {"position": self.position}

    @classmethod
    def from_json(cls, value: object) -> Cursor:
        """The cursor that `to_json` wrote; raises ValueError on anything else."""
        if isinstance(value, dict) and value.keys() == {"position"}:
            position = value["position"]
            if type(position) is int and position >= 0:  # a bool is an int too
                return cls(position)
        raise ValueError(
            f'cursor={value!r} is not {{"position": <a count of samples>}}; the saved loop state is damaged.'
        )


class Broken(NamedTuple):
    """A sample that could not be read: its shard, its key in the shard and why, the shard's hash, and for which number it was read."""

    shard: str
    key: str
    reason: str
    sha256: str
    sample: int


class StoredSample(NamedTuple):
    """A global sample and where it is stored: its shard and its key in the shard."""

    number: int
    shard: str
    key: str


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: RGB images, labels, and the cursor that resumes after the whole batch.

    `labels` are class numbers, or rows over the classes: 0 and 1, or weights where images were mixed. `mask` is False on padding and unreadable rows,
    which only evaluation has. `sample_ids` are global sample numbers in training and image numbers in evaluation (-1 on
    padding). `broken` names the samples of this batch that could not be read. `texts` has one for each row where
    `data.text` asks for them ("" on padding and unreadable rows). Labels are -1 where `data.labels` is none.
    """

    images: UInt8[Tensor, "B 3 H W"]
    labels: Int64[Tensor, " B"] | Float32[Tensor, "B C"]
    mask: Bool[Tensor, " B"]
    sample_ids: Int64[Tensor, " B"]
    cursor: Cursor
    broken: tuple[Broken, ...]
    texts: tuple[str, ...] | None = None  # most batches have none, and most that make them need not say so

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            mask=self.mask.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, from which `to` a CUDA device does not wait; torch's loader calls it."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            mask=self.mask.pin_memory(),
            sample_ids=self.sample_ids.pin_memory(),
        )

    def split(self, n: int) -> list[Batch]:
        """`n` equal consecutive micro-batches, the first of which carries `broken`; raises ValueError if uneven."""
        if n < 1 or len(self) % n:
            legal = [d for d in range(1, len(self) + 1) if len(self) % d == 0]
            raise ValueError(
                f"a batch of {len(self)} rows does not split into {n} equal micro-batches; use one of {legal}."
            )
        size = len(self) // n
        return [
            Batch(
                self.images[start : start + size],
                self.labels[start : start + size],
                self.mask[start : start + size],
                self.sample_ids[start : start + size],
                self.cursor,
                self.broken if start == 0 else (),
                None if self.texts is None else self.texts[start : start + size],
            )
            for start in range(0, len(self), size)
        ]


class ImageStream(Protocol):
    """An endless sequence of batches whose order is arithmetic on (seed, global sample)."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the position last given to `seek`, for ever."""
        ...

    def seek(self, cursor: Cursor) -> None:
        """Make the next `iter` start at `cursor`; raises ValueError where no batch can start."""
        ...

    def samples(self, cursor: Cursor, rank: int) -> list[StoredSample]:
        """What `rank` gets of the batch that begins at `cursor`, by arithmetic and index alone: no image is read."""
        ...

    def measures(self, cursor: Cursor) -> dict[str, float]:
        """What is to be told of the samples before `cursor`, as source/measure, the same on every rank."""
        ...

    def fingerprint(self) -> dict[str, object]:
        """What decides the order and content of the sequence, as JSON; equal where the sequences are."""
        ...
