"""This file owns the upstream measures: how well the head knows held-out images of the training classes, and how well it knows that.

B images  C classes  N bins of confidence
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from softmoe_train.config import Record
from softmoe_train.data.batch import Batch
from softmoe_train.dist import sum_over_world
from softmoe_train.loop import TrainState
from softmoe_train.model.loss import LossKind, classification_loss, one_hot
from softmoe_train.plain import plain

logger = logging.getLogger(__name__)

MEASURES = (
    "top1",
    "loss",
    "calibration_error",
)  # of each set at every evaluation, and top5 where there are more than 5 classes
BINS = 15  # as Guo et al. (arXiv 1706.04599) and those after them


class UpstreamConfig(Record):
    """When to measure on `data.test` and other sets of its classes, and with how many images of each rank at a time."""

    every: Annotated[int, Field(ge=0)]  # steps; 0 only at the end
    batch_size: Annotated[int, Field(ge=1)]
    sets: dict[str, dict[str, Any]]  # by name: the keys of `data` that are another set's

    @field_validator("sets")
    @classmethod
    def _named(cls, sets: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, own in sets.items():
            if name == "test" or "/" in name:
                raise ValueError(
                    f"evals.upstream.sets.{name}: `test` is data.test itself, and a name goes into those of metrics; use another"
                )
            if "test" not in own:
                raise ValueError(f"evals.upstream.sets.{name} has no shards; give evals.upstream.sets.{name}.test=...")
        return sets

    def measures(self, num_classes: int) -> list[str]:
        """The names of all that is measured, each as set/measure."""
        kinds = [*MEASURES, *(["top5"] if num_classes > 5 else [])]
        return [f"{name}/{kind}" for name in ("test", *self.sets) for kind in kinds]


class UpstreamEvaluator:
    """Measures each set, exact on every layout: each image counts once, padding never.

    Images that cannot be read are left out, named in the log and counted in `<set>/broken_images`.
    """

    def __init__(
        self, config: UpstreamConfig, sets: Mapping[str, Iterable[Batch]], loss: LossKind, num_classes: int
    ) -> None:
        self.every = config.every
        self.sets = sets
        self.num_classes = num_classes
        self.loss: LossKind = loss

    def run(self, state: TrainState) -> Iterator[tuple[str, float]]:
        """Precision@1 (the likeliest class is among the image's labels, paper.md 5), the same of the five likeliest, mean loss and
        expected calibration error, over all images of all ranks."""
        for name, batches in self.sets.items():
            for measure, value in self._measure(name, batches, state).items():
                yield f"{name}/{measure}", value

    @torch.no_grad()
    def _measure(self, name: str, batches: Iterable[Batch], state: TrainState) -> dict[str, float]:
        device = state.engine.device
        sums = torch.zeros(5, dtype=torch.float64, device=device)  # top-1, top-5, loss, images, broken
        bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # images, their confidence, how many are right
        for batch in batches:
            for sample in batch.broken:
                logger.warning(
                    "left out a broken held-out image: %s %s: %s",
                    *map(plain, (sample.shard, sample.key, sample.reason)),
                )
            sums[4] += len(batch.broken)
            batch = batch.to(device)
            logits = state.engine.module(batch.images, None, batch.mask).logits
            best, loss = hits(logits, batch.labels), classification_loss(logits, batch.labels, self.loss)
            five = hits(logits, batch.labels, among=5)
            sums[:4] += torch.stack([_masked(of, batch) for of in (best, five, loss, torch.ones_like(loss))])
            bins += in_bins(confidence(logits, self.loss), best, batch.mask)
        right, right5, loss, images, broken = sum_over_world(sums).tolist()
        if not images:
            key = "data.test" if name == "test" else f"evals.upstream.sets.{name}.test"
            raise ValueError(
                f"none of the {broken:.0f} images of {key} could be read; repair the shards or name others"
            )
        values = {"top1": right / images, "loss": loss / images}
        if self.num_classes > 5:
            values["top5"] = right5 / images
        values["calibration_error"] = calibration_error(sum_over_world(bins))
        return values | ({"broken_images": broken} if broken else {})


def hits(logits: Tensor, labels: Tensor, *, among: int = 1) -> Tensor:
    """1 where one of the likeliest classes, `among` so many, is one of the image's labels, else 0."""
    # Sorted, and not topk, which says nothing of equal logits: they are taken in the order of their classes.
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :among]
    return one_hot(labels, logits.shape[-1]).gather(1, best).gt(0).any(1)


def confidence(logits: Tensor, loss: LossKind) -> Tensor:
    """The probability that the model gives its likeliest class, float64: of a softmax, or of that class's sigmoid, as it was trained."""
    wide = logits.double()
    return wide.softmax(-1).amax(-1) if loss == "softmax" else wide.amax(-1).sigmoid()


def in_bins(confidence: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    """Of the images in each of BINS equal parts of (0, 1]: how many, their confidence and how many are right; "3 N"."""
    known = torch.where(mask, confidence, 0.0).nan_to_num(0.0)  # padding may hold anything, a broken model says nan
    place = (known * BINS).ceil().long().clamp(1, BINS) - 1
    weights = torch.stack([torch.ones_like(known), known, right.double()]) * mask
    return weights.new_zeros(3, BINS).index_add_(1, place, weights)


def calibration_error(bins: Tensor) -> float:
    """The mean over images of |confidence - share that is right| of their bin (expected calibration error)."""
    images, confident, right = bins
    return ((confident - right).abs().sum() / images.sum()).item()


def _masked(values: Tensor, batch: Batch) -> Tensor:
    # where(), not a product: a padding row may hold anything, NaN included.
    return torch.where(batch.mask, values.double(), 0.0).sum()
