"""This file owns the k-nearest-neighbour measure: each test image by the votes of the train images whose features point most its way.

The weighted vote is DINO's: a neighbour of cosine similarity s has the weight exp(s / temperature).

n test images of this rank  k neighbours  D features  C classes
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int64
from pydantic import Field, PositiveInt
from torch import Tensor

from softmoe_train.dist import World, sum_over_world
from softmoe_train.evals.features import Featurised, Images, Over, Shared, gathered_blocks, images_of, totals
from softmoe_train.evals.ridge import hit
from softmoe_train.evals.sets import MeasuredSet, SetsConfig
from softmoe_train.loop import TrainState

SOURCE = "knn"
_ROWS = 2048  # test images that are compared with a block together
_STEPS = 10**9  # of a similarity: what is equal in exact arithmetic is equal in any layout
_NUMBERS = 1 << 32  # of train images, at most


class KnnConfig(SetsConfig):
    """How many neighbours vote, and how."""

    k: PositiveInt
    temperature: Annotated[float, Field(gt=0)] | None  # null: one vote each


@dataclass(frozen=True)
class PoolSet:
    """A set of which all of the train part is read."""

    measured: MeasuredSet
    train: Images
    test: Images


class KnnEvaluator:
    """Measures `<set>/top1`; every train image may be a neighbour, and they come by in blocks: no rank holds all of them."""

    def __init__(self, config: KnnConfig, sets: Sequence[PoolSet], shared: Shared, over: Over) -> None:
        self.every = config.every
        self.config, self.sets, self.shared, self.over = config, sets, shared, over

    @property
    def told(self) -> tuple[str, dict[str, Any]]:
        """What is to be known of the sets, for people and as facts."""
        facts = {one.measured.name: one.measured.facts for one in self.sets}
        votes = "one vote each" if self.config.temperature is None else f"temperature {self.config.temperature:g}"
        lines = [
            f"{name}: {of['train']} train images, {of['test']} test images ({of['test_hash']})"
            for name, of in facts.items()
        ]
        return f"{self.config.k} nearest neighbours by cosine, {votes}; {'; '.join(lines)}", {"sets": facts}

    def run(self, state: TrainState) -> Iterator[tuple[str, float]]:
        """The share of test images whose class has most of the votes, of every set."""
        device = state.engine.device
        for one in self.sets:
            test = self.shared.featurised(SOURCE, one.test, state, self.over)
            train = self.shared.featurised(SOURCE, one.train, state, self.over)
            total = totals(test, train, one.test, device)
            broken = total.broken + one.measured.unlabelled
            if total.finite:
                hits = self._hits(one.measured, train, test, device)
                yield f"{one.measured.name}/top1", sum_over_world(hits).item() / total.images
            else:
                yield f"{one.measured.name}/top1", math.nan
            if broken:
                yield f"{one.measured.name}/broken_images", broken

    def _hits(self, measured: MeasuredSet, train: Featurised, test: Featurised, device: torch.device) -> Tensor:
        own, own_numbers = test.own
        nearest = Nearest(own.to(device), self.config.k)
        # Every batch of a pass is a block: as many on every rank.
        for features, numbers in self.over(gathered_blocks(train, device)):
            nearest.meet(features, numbers)
        similarity, numbers = nearest.found
        pool = measured.train_pool
        voters = torch.from_numpy(measured.class_of(pool, numbers.cpu().numpy().ravel())).to(device).view_as(numbers)
        truth = torch.from_numpy(measured.class_of(measured.test_pool, own_numbers)).to(device)
        return hit(votes(similarity, voters, len(measured.classes), self.config.temperature), truth).sum()


class Nearest:
    """The k train images nearest to each test image among those that have come by; of equally near ones those of lower number."""

    def __init__(self, test: Float[Tensor, "n D"], k: int) -> None:
        self._parts = [_unit(rows) for rows in test.split(_ROWS)]
        self._best = [torch.zeros(len(rows), 0, dtype=torch.int64, device=rows.device) for rows in self._parts]
        self._k = k

    def meet(self, features: Float[Tensor, "N D"], numbers: Int64[Tensor, " N"]) -> None:
        """Let some train images come by."""
        units = _unit(features)
        for at, (rows, best) in enumerate(zip(self._parts, self._best, strict=True)):
            steps = (rows @ units.mT * _STEPS).round().long()
            # One whole number that is larger for what is nearer, then for what has the lower number: no two are alike.
            met = torch.cat([best, steps * _NUMBERS + (_NUMBERS - 1 - numbers)], dim=1)
            self._best[at] = met.topk(min(self._k, met.shape[1]), dim=1).values

    @property
    def found(self) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
        """The similarities of the nearest, falling, and their numbers."""
        best = torch.cat(self._best)
        steps = best.div(_NUMBERS, rounding_mode="floor")
        return steps.double() / _STEPS, _NUMBERS - 1 - (best - steps * _NUMBERS)


def votes(
    similarity: Float[Tensor, "n k"], voters: Int64[Tensor, "n k"], num_classes: int, temperature: float | None
) -> Float[Tensor, "n C"]:
    """The votes for each class, relative to those of a neighbour that points exactly the same way."""
    weights = torch.ones_like(similarity) if temperature is None else ((similarity - 1) / temperature).exp()
    return torch.zeros(len(voters), num_classes, dtype=torch.float64, device=voters.device).scatter_add_(
        1, voters, weights
    )


def _unit(features: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    return torch.nn.functional.normalize(features.double(), dim=-1)


def build_pool_sets(
    source: str,
    batch_size: int,
    sets: Sequence[MeasuredSet],
    shared: Shared,
    *,
    image_size: int,
    world: World,
) -> list[PoolSet]:
    """The sets of an evaluator that learns from all of the train part."""
    made = []
    how = {"image_size": image_size, "batch_size": batch_size, "world": world}
    for one in sets:
        train, test = (
            images_of(one, pool, numbers, **how)
            for pool, numbers in ((one.train_pool, one.train), (one.test_pool, one.test))
        )
        shared.will_use(source, train)
        shared.will_use(source, test)
        made.append(PoolSet(one, train, test))
    return made


def neighbour_problems(config: KnnConfig, one: MeasuredSet) -> list[str]:
    """Why a set cannot be measured so."""
    if config.k <= len(one.train):
        return []
    return [
        f"evals.knn.k={config.k} is more than the {len(one.train)} images of {one.named.key}.train; use fewer neighbours"
    ]
