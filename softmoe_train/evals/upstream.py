"""This file owns the upstream measures: precision@1 and loss on held-out images of the training classes.

B images  C classes
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from softmoe_train.config import Record
from softmoe_train.data.batch import Batch
from softmoe_train.dist import sum_over_world
from softmoe_train.loop import TrainState
from softmoe_train.model.loss import LossKind, classification_loss, one_hot
from softmoe_train.plain import plain

logger = logging.getLogger(__name__)

MEASURES = ("test/top1", "test/loss")  # at every evaluation


class UpstreamConfig(Record):
    """When to measure on `data.test`, and with how many images of each rank at a time."""

    every: Annotated[int, Field(ge=0)]  # steps; 0 only at the end
    batch_size: Annotated[int, Field(ge=1)]


class UpstreamEvaluator:
    """Measures `test/top1` and `test/loss`, exact on every layout: each image counts once, padding never.

    Images that cannot be read are left out, named in the log and counted in `test/broken_images`.
    """

    def __init__(self, config: UpstreamConfig, batches: Iterable[Batch], loss: LossKind) -> None:
        self.every = config.every
        self.batches = batches
        self.loss: LossKind = loss

    @torch.no_grad()
    def run(self, state: TrainState) -> Iterator[tuple[str, float]]:
        """Precision@1 (the likeliest class is among the image's labels) and mean loss, over all images of all ranks."""
        device = state.engine.device
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for batch in self.batches:
            for sample in batch.broken:
                logger.warning("left out a broken held-out image: %s %s: %s", *map(plain, sample))
            sums[3] += len(batch.broken)
            batch = batch.to(device)
            logits = state.engine.module(batch.images, None, batch.mask).logits
            loss = classification_loss(logits, batch.labels, self.loss)
            sums[:3] += torch.stack(
                [_masked(hits(logits, batch.labels), batch), _masked(loss, batch), batch.mask.double().sum()]
            )
        right, loss, images, broken = sum_over_world(sums).tolist()
        if not images:
            raise ValueError(
                f"none of the {broken:.0f} images of data.test could be read; repair the shards or name others"
            )
        yield "test/top1", right / images
        yield "test/loss", loss / images
        if broken:
            yield "test/broken_images", broken


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the likeliest class is one of the image's labels, else 0 (paper.md 5, precision@1)."""
    best = logits.argmax(dim=-1, keepdim=True)
    return one_hot(labels, logits.shape[-1]).gather(1, best).squeeze(1).gt(0)


def _masked(values: Tensor, batch: Batch) -> Tensor:
    # where(), not a product: a padding row may hold anything, NaN included.
    return torch.where(batch.mask, values.double(), 0.0).sum()
