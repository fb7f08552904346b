"""This file owns the way from stored samples to batches: the endless training stream and one pass of evaluation.

Which samples a batch holds is arithmetic on its position, so what a worker process is asked for is a whole batch, named
by its first global sample: the number of workers cannot change the order.

Letters: B images of this rank's batch, L streams, W ranks, g a global sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from softmoe_train.data.ahead import Ahead
from softmoe_train.data.batch import Batch, Broken, Cursor, StoredSample
from softmoe_train.data.decode import UnreadableSampleError
from softmoe_train.data.keyed import Draws
from softmoe_train.data.mixture import Mixture
from softmoe_train.data.mixup import Mixup
from softmoe_train.data.order import Location, Order
from softmoe_train.data.randaugment import rand_augment
from softmoe_train.data.read import SampleReader
from softmoe_train.data.records import RandAugment
from softmoe_train.data.transforms import Transform
from softmoe_train.data.workers import Decoding, load_batches, shared_bytes
from softmoe_train.plain import plain

_WORTH_KEEPING = 1 / 8  # of a shard's samples, below which ranges of it are read where it is not in the cache
_TOGETHER, _TOGETHER_ROWS = 32, 1 << 13  # batches, and their rows in all, that are located together
_GRACE_BATCHES = 2  # with too many broken samples that a run takes while its ranks agree to end together
_TRIES = 32  # broken samples in a row after which a stream is given up


@dataclass(frozen=True)
class Share:
    """A rank's part of every global batch of `global_batch` images: the L / W consecutive streams from r L / W on."""

    global_batch: int
    streams: int
    rank: int
    world: int

    def rows(self, position: int) -> NDArray[np.int64]:
        """This rank's global samples of the batch that begins at `position`, ascending."""
        streams = self.rank * self.apart + np.arange(self.apart)
        return (position + np.arange(0, self.global_batch, self.streams)[:, None] + streams).reshape(-1)

    @property
    def rank_batch(self) -> int:
        """How many rows of a batch are this rank's."""
        return self.global_batch // self.world

    @property
    def apart(self) -> int:
        """How many rows further on this rank has the next image of the same stream: L / W."""
        return self.streams // self.world

    def check_start(self, cursor: Cursor) -> None:
        """Raise ValueError unless a batch can start at `cursor`."""
        if cursor.position < 0 or cursor.position % self.streams:
            raise ValueError(
                f"cursor={cursor.position} is not a multiple of data.streams={self.streams}: a batch begins where all "
                f"streams have given equally many samples; continue with the data.streams of the run that saved it."
            )


class Rows(NamedTuple):
    """What a batch is made in."""

    images: torch.Tensor
    labels: torch.Tensor
    texts: list[str] | None

    def batch(self, mask: torch.Tensor, ids: torch.Tensor, cursor: Cursor, broken: list[Broken]) -> Batch:
        """The finished batch."""
        texts = None if self.texts is None else tuple(self.texts)
        return Batch(self.images, self.labels, mask, ids, cursor, tuple(broken), texts)


@dataclass(frozen=True)
class Pictures:
    """Stored samples as rows of a batch: read, transformed, augmented and labelled."""

    reader: SampleReader
    transform: Transform
    image_size: int
    seed: int
    randaugment: RandAugment | None
    scaled_decode: bool

    def empty(self, rows: int) -> Rows:
        """Room for `rows` images, where the training process can read them too, labels of nothing (-1 if not read), empty texts."""
        images = shared_bytes((rows, 3, self.image_size, self.image_size))
        texts = None if self.reader.text is None else [""] * rows
        kept = self.reader.labels
        if kept is None:
            return Rows(images, torch.full((rows,), -1), texts)
        if kept.kind == "hard":
            return Rows(images, torch.zeros(rows, dtype=torch.int64), texts)
        return Rows(images, torch.zeros(rows, kept.num_classes), texts)

    def fill(self, made: Rows, at: int, shard: int, index: int, g: int) -> None:
        """Write a stored sample in sample g's place into row `at`; raises UnreadableSampleError, and the row may be written again."""
        sample = self.reader.read(shard, index)
        out = made.images[at].numpy()
        self.transform(sample.picture, Draws(self.seed, g, "augment"), out)
        if self.randaugment is not None:
            upright = np.ascontiguousarray(out.transpose(1, 2, 0))
            out[...] = rand_augment(upright, self.randaugment, Draws(self.seed, g, "randaugment")).transpose(2, 0, 1)
        if made.labels.ndim == 2:
            made.labels[at, sample.classes] = 1.0
        elif sample.classes:
            made.labels[at] = sample.classes[0]
        if made.texts is not None:
            made.texts[at] = sample.text


class TrainBatches(Dataset[Batch]):
    """This rank's part of each global batch, by the position where the batch begins."""

    def __init__(self, pictures: Pictures, order: Order | Mixture, share: Share, mixup: Mixup | None) -> None:
        self.pictures, self.order, self.share, self.mixup = pictures, order, share, mixup
        files, shards = pictures.reader.files, pictures.reader.shards
        horizon = 2 * order.window * order.streams  # samples
        self.ahead = Ahead(files, shards, self.shards_at, step=share.global_batch, horizon=horizon)
        self.position = 0
        files.worth_keeping = self.is_worth_keeping
        self._located: dict[int, Location] = {}
        self._last: int | None = None
        self._batches_ahead = 1

    def shards_at(self, position: int) -> list[int]:
        """The shards that this rank's part of the batch at `position` is read from."""
        return np.unique(self.order.locate(self.share.rows(position)).shard).tolist()

    def is_worth_keeping(self, shard: int) -> bool:
        """Whether this rank reads enough of a shard, in the epoch it is in, to have all of it fetched."""
        first = self.share.rank * self.share.apart
        streams = range(first, first + self.share.apart)
        return self.order.share_of(shard, self.position, streams) >= _WORTH_KEEPING

    def __getitem__(self, position: int) -> Batch:
        self.position = position
        self.ahead.reached(position)
        rows = self.share.rows(position)
        where = self.located(position)
        made = self.pictures.empty(len(rows))
        broken: list[Broken] = []
        for at, (g, shard, index) in enumerate(zip(rows.tolist(), *where, strict=True)):
            try:
                self.pictures.fill(made, at, shard, index, g)
            except UnreadableSampleError as error:
                broken.append(self.pictures.reader.describe(shard, index, g, str(error)))
                self._replace(made, at, g, broken[-1])
        if self.mixup is not None:
            mixed, labels = self.mixup.mix(made.images.numpy(), made.labels, rows, self.share.apart)
            made = Rows(torch.from_numpy(mixed), labels, made.texts)
        mask = torch.ones(len(rows), dtype=torch.bool)
        cursor = Cursor(position + self.share.global_batch)
        return made.batch(mask, torch.from_numpy(rows), cursor, broken)

    def located(self, position: int) -> Location:
        """Where the rows of the batch at `position` are stored.

        Most of the time of `locate` is a fixed part. So where this process goes on in equal steps, more and more batches are located together;
        the answer is the same.
        """
        if position not in self._located:
            step = position - self._last if self._last is not None else 0
            if step <= 0:  # the first position, or a new iteration
                step, self._batches_ahead = 0, 1
            starts = [position + i * step for i in range(self._batches_ahead if step else 1)]
            self._batches_ahead = min(2 * self._batches_ahead, _TOGETHER, 1 + _TOGETHER_ROWS // self.share.rank_batch)
            where = self.order.locate(np.concatenate([self.share.rows(start) for start in starts]))
            shards, indexes = (np.split(part, len(starts)) for part in where)
            self._located = {at: Location(*both) for at, *both in zip(starts, shards, indexes, strict=True)}
        self._last = position
        return self._located.pop(position)

    def _replace(self, made: Rows, at: int, g: int, first: Broken) -> None:
        """Write the first good one of g's stand-ins, augmented as g: the same on every layout."""
        others = list(self.order.stand_ins(g, _TRIES))
        for other in others:
            shard, index = self.order.locate(np.asarray([other]))
            try:
                self.pictures.fill(made, at, int(shard[0]), int(index[0]), g)
            except UnreadableSampleError:
                continue
            return
        raise RuntimeError(
            f"sample {plain(first.key)} of {plain(first.shard)} cannot be read ({plain(first.reason)}), and neither can the {len(others)} "
            f"samples that follow it: these shards do not hold what `data` says; check them."
        )


class WebDatasetStream:
    """The endless training stream of one rank over tar shards; satisfies `ImageStream`."""

    def __init__(
        self,
        pictures: Pictures,
        order: Order | Mixture,
        share: Share,
        mixup: Mixup | None,
        decoding: Decoding,
        facts: dict[str, object],
    ) -> None:
        self._batches = TrainBatches(pictures, order, share, mixup)
        self._decoding, self._facts, self._start = decoding, facts, 0

    @property
    def pictures(self) -> Pictures:
        """How its samples become rows."""
        return self._batches.pictures

    @property
    def order(self) -> Order | Mixture:
        """Which they are."""
        return self._batches.order

    def seek(self, cursor: Cursor) -> None:
        """Make the next `iter` start at `cursor`; raises ValueError where no batch can start."""
        self._batches.share.check_start(cursor)
        self._start = cursor.position

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the position last given to `seek`, for ever; raises RuntimeError above `max_broken`."""
        positions = Positions(self._start, self._batches.share.global_batch)
        return load_batches(self._batches, positions, self._decoding, grace=_GRACE_BATCHES)

    def samples(self, cursor: Cursor, rank: int) -> list[StoredSample]:
        """What `rank` gets of the batch that begins at `cursor`; one that is broken is named, not what replaced it."""
        numbers = replace(self._batches.share, rank=rank).rows(cursor.position)
        where = self._batches.order.locate(numbers)
        name = self._batches.pictures.reader.name
        rows = zip(numbers.tolist(), where.shard.tolist(), where.index.tolist(), strict=True)
        return [StoredSample(number, *name(shard, index)) for number, shard, index in rows]

    def measures(self, cursor: Cursor) -> dict[str, float]:
        """Of each source of a mixture, the samples taken before `cursor` and how often that is all of them."""
        order = self._batches.order
        if not isinstance(order, Mixture):
            return {}
        taken = zip(order.names, order.taken(cursor.position), order.orders, strict=True)
        counts = {name: (count, count / one.total) for name, count, one in taken}
        return {
            f"{name}/{measure}": value
            for name, values in counts.items()
            for measure, value in zip(("samples", "epochs"), values, strict=True)
        }

    def fingerprint(self) -> dict[str, object]:
        """What decides the order and what is mixed: the shards' contents, the keys of the permutations, the augmentation."""
        mixup, randaugment = self._batches.mixup, self._batches.pictures.randaugment
        # Only what is on: a checkpoint from before there was a choice has the same fingerprint.
        augmentation = {} if randaugment is None else {"randaugment": randaugment.model_dump()}
        augmentation |= {} if mixup is None else {"mixup": mixup.p}
        augmentation |= {"scaled_decode": True} if self._batches.pictures.scaled_decode else {}
        return {"kind": "webdataset", **self._facts, **augmentation}


class Positions:
    """Where the batches of the endless sequence begin."""

    def __init__(self, start: int, step: int) -> None:
        self.start, self.step = start, step

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while True:
            yield position
            position += self.step


class _EvalBatches(Dataset[Batch]):
    def __init__(self, pictures: Pictures, rank_batch: int, rank: int, world: int) -> None:
        self.pictures, self.rank_batch, self.rank, self.world = pictures, rank_batch, rank, world
        reader = pictures.reader
        self.counts = reader.counts
        self.ends = np.cumsum(self.counts)
        self.ahead = Ahead(reader.files, reader.shards, self.shards_at, step=1, horizon=len(self))

    def shards_at(self, step: int) -> list[int]:
        """The shards that this rank's batch `step` is read from."""
        start = (step * self.world + self.rank) * self.rank_batch
        numbers = np.arange(start, min(start + self.rank_batch, int(self.ends[-1])))
        return np.unique(np.searchsorted(self.ends, numbers, side="right")).tolist()

    def __len__(self) -> int:
        return (int(self.ends[-1]) - 1) // (self.rank_batch * self.world) + 1

    def __getitem__(self, step: int) -> Batch:
        self.ahead.reached(step)
        start = (step * self.world + self.rank) * self.rank_batch
        made = self.pictures.empty(self.rank_batch)
        made.images.zero_()  # where there is no picture it is black
        mask = torch.zeros(self.rank_batch, dtype=torch.bool)
        ids = torch.full((self.rank_batch,), -1)
        broken: list[Broken] = []
        for at, g in enumerate(range(start, min(start + self.rank_batch, int(self.ends[-1])))):
            shard = int(np.searchsorted(self.ends, g, side="right"))
            index = g - int(self.ends[shard]) + self.counts[shard]
            ids[at] = g
            try:
                self.pictures.fill(made, at, shard, index, g)
                mask[at] = True
            except UnreadableSampleError as error:
                broken.append(self.pictures.reader.describe(shard, index, g, str(error)))
        cursor = Cursor((step + 1) * self.world * self.rank_batch)
        return made.batch(mask, ids, cursor, broken)


class EvalStream:
    """One pass over a held-out set: each image exactly once over all ranks, padded so that ranks have equal batches.

    Image number i is the i-th in the shards' order. A broken image is left out by the mask, never replaced.
    """

    def __init__(self, pictures: Pictures, decoding: Decoding, *, batch_size: int, rank: int, world: int) -> None:
        self._batches = _EvalBatches(pictures, batch_size, rank, world)
        self._decoding = decoding
        self.num_images = int(self._batches.ends[-1])

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return load_batches(self._batches, range(len(self)), self._decoding)
