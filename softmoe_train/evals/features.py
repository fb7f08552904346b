"""This file owns features for evaluation: what the head sees of each image of a stream, and how ranks share them.

B images of a rank's batch  S batches of a pass  D features  W ranks  n images of all ranks
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from softmoe_train.data.build import build_pool_stream
from softmoe_train.data.pool import Pool
from softmoe_train.data.stream import EvalStream
from softmoe_train.dist import World, gather_over_world, sum_over_world
from softmoe_train.evals.sets import MeasuredSet
from softmoe_train.loop import TrainState
from softmoe_train.plain import plain

logger = logging.getLogger(__name__)

Over = Callable[[Iterable[Any]], Iterable[Any]]  # the same items with a sign of life for each


class Featurised(NamedTuple):
    """This rank's share of some images, on the host: their features, and each image's number in its pool, -1 where there is none."""

    features: Float[Tensor, "S B D"]
    numbers: Int64[Tensor, "S B"]
    broken: int  # images of this rank that could not be read

    @property
    def own(self) -> tuple[Float[Tensor, "n D"], NDArray[np.int64]]:
        """Features and numbers of this rank's images that could be read."""
        there = self.numbers >= 0
        return self.features[there], self.numbers[there].numpy()


@dataclass(frozen=True)
class Images:
    """Some samples of one part of a set (ascending numbers), to be read by all ranks together."""

    measured: MeasuredSet
    pool: Pool
    numbers: NDArray[np.int64]
    stream: EvalStream
    batch_size: int
    key: str  # of the setting that names them

    def featurise(self, state: TrainState, over: Over) -> Featurised:
        """Their features by the model as it is, each image once over all ranks; every rank must call it."""
        numbers, features, broken = [], [], 0
        device = state.engine.device
        with torch.no_grad(), _seen_by_head(state.engine.module) as seen:
            for batch in over(self.stream):
                for sample in batch.broken:
                    broken += 1
                    told = map(plain, (self.key, sample.shard, sample.key, sample.reason))
                    logger.warning("left out a broken image of %s: %s %s: %s", *told)
                state.engine.module(batch.images.to(device), None, batch.mask.to(device))
                features.append(seen.pop().float().cpu())
                ids = torch.from_numpy(self.numbers)[batch.sample_ids.clamp_min(0)]
                numbers.append(torch.where(batch.mask, ids, -1))
        return Featurised(torch.stack(features), torch.stack(numbers), broken)


def images_of(
    measured: MeasuredSet,
    pool: Pool,
    numbers: NDArray[np.int64],
    *,
    image_size: int,
    batch_size: int,
    world: World,
) -> Images:
    """The samples `numbers` of one of the pools of a set, ready to be read by this rank and the others."""
    stream = build_pool_stream(
        measured.named.data,
        pool,
        numbers,
        image_size=image_size,
        batch_size=batch_size,
        rank=world.rank,
        world=world.size,
    )
    part = "train" if pool is measured.train_pool else "test"
    return Images(measured, pool, numbers, stream, batch_size, f"{measured.named.key}.{part}")


@contextmanager
def _seen_by_head(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the head is given in each forward. The module itself is called: an engine gathers sharded weights around that call alone."""
    seen: list[Tensor] = []
    head = module.get_submodule("head")
    handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def gathered(share: Featurised, device: torch.device) -> tuple[Float[Tensor, "n D"], NDArray[np.int64]]:
    """Features and ascending numbers of all ranks' images that could be read, the same on every rank and in any layout."""
    features, numbers = [], []
    for block, ids in gathered_blocks(share, device):
        features.append(block)
        numbers.append(ids)
    return torch.cat(features), torch.cat(numbers).cpu().numpy()


def gathered_blocks(
    share: Featurised, device: torch.device
) -> Iterator[tuple[Float[Tensor, "n D"], Int64[Tensor, " n"]]]:
    """The same in blocks of one batch of every rank."""
    for features, numbers in zip(share.features, share.numbers, strict=True):
        # Rank r has the r-th B of these W B consecutive images: in order of ranks is in order of numbers.
        ids = gather_over_world(numbers.to(device)).flatten()
        block = gather_over_world(features.to(device)).flatten(0, 1)
        yield block[ids >= 0], ids[ids >= 0]


class Totals(NamedTuple):
    """Of all ranks: how many test images could be read, how many images could not, and whether every feature was finite."""

    images: int
    broken: int
    finite: bool


def totals(test: Featurised, train: Featurised, images: Images, device: torch.device) -> Totals:
    """Add up over ranks; raises ValueError on every rank where no image of the test part could be read."""
    own, _ = test.own
    of_train, _ = train.own
    wrong = (~own.isfinite()).sum() + (~of_train.isfinite()).sum()
    counts = torch.tensor([len(own), len(of_train), test.broken, train.broken, int(wrong)], device=device)
    there, learned, broken_test, broken_train, not_finite = sum_over_world(counts).tolist()
    if not there or not learned:
        part = "test" if not there else "train"
        raise ValueError(
            f"none of the images of {images.measured.named.key}.{part} could be read; repair the shards or name others"
        )
    if not_finite:
        logger.warning("%s: features are not finite, so nothing is measured there", images.measured.named.key)
    return Totals(there, broken_test + broken_train, not not_finite)


class Shared:
    """Features that several evaluators measure at one step of one kind of weights: read once, and kept on the host until the last has them."""

    def __init__(self) -> None:
        self._users: dict[str, list[str]] = {}
        self._kept: dict[str, tuple[tuple[int, int], Featurised]] = {}

    def will_use(self, source: str, images: Images) -> None:
        """Say beforehand, in the order in which evaluators run, what one of them will ask for."""
        self._users.setdefault(_what(images), []).append(source)

    def featurised(self, source: str, images: Images, state: TrainState, over: Over) -> Featurised:
        """Their features: those that another evaluator has had at this very state, or new ones."""
        what, moment = _what(images), (state.step, state.cursor.position)
        kept = self._kept.pop(what, None)
        share = kept[1] if kept is not None and kept[0] == moment else images.featurise(state, over)
        if source != self._users[what][-1]:
            self._kept[what] = moment, share
        return share


def _what(images: Images) -> str:
    part = images.key.rpartition(".")[2]
    return f"{part} {images.measured.named.data.model_dump_json()} {len(images.numbers)} {images.batch_size}"
