"""This file owns the few-shot measures: a ridge classifier on the features of k images a class, over several sets (paper.md 6.1).

L strengths  K shot counts  P repeats of the draw
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, PositiveInt, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from softmoe_train.data.records import Count
from softmoe_train.dist import World, sum_over_world
from softmoe_train.evals.draws import Drawn, draw
from softmoe_train.evals.features import Images, Over, Shared, gathered, images_of, totals
from softmoe_train.evals.ridge import EXPONENTS, best_strength, count_hits, solve_ridge
from softmoe_train.evals.sets import MeasuredSet, SetsConfig, samples_hash
from softmoe_train.loop import TrainState

SOURCE = "fewshot"
_LARGEST = 60  # exponent


def _a_choice(value: object) -> object:
    if value in ("test", "heldout") or (type(value) is int and abs(value) <= _LARGEST):
        return value
    raise PydanticCustomError(
        "l2", "input should be test, heldout, or a whole number i for a strength of 2^i ({n} at most)", {"n": _LARGEST}
    )


class FewshotConfig(SetsConfig):
    """How many images of each class are learned from, how often they are drawn, and how the strength of the ridge is chosen."""

    shots: list[PositiveInt]
    seed: Count  # of the draws: the run's own seed does not change them
    seeds: PositiveInt  # draws, whose mean and deviation are told
    l2: Annotated[Literal["test", "heldout"] | int, BeforeValidator(_a_choice)]
    heldout: Annotated[int, Field(ge=1)]  # images a class to choose by, drawn after the largest shot

    @field_validator("shots")
    @classmethod
    def _some_shots(cls, shots: list[int]) -> list[int]:
        if not shots or sorted(set(shots)) != shots:
            raise ValueError(
                f"evals.fewshot.shots={shots} must list numbers of images a class, each once, as in [1,5,10,25]"
            )
        return shots


def measures(config: FewshotConfig) -> list[str]:
    """The names that every evaluation has a value for."""
    return [f"{name}/{shots}shot" for name in sorted(config.sets) for shots in config.shots]


@dataclass(frozen=True)
class ShotSet:
    """A set with its draws: of the train part only the images of some draw are read."""

    measured: MeasuredSet
    draws: list[Drawn]
    train: Images
    test: Images


class FewshotEvaluator:
    """Measures `<set>/<k>shot`, the share of test images that k images of each class suffice for.

    Every number is the same in any layout, given the features: every rank solves for the same shots in the same order, and
    classifies the test images of its own.
    """

    def __init__(self, config: FewshotConfig, sets: Sequence[ShotSet], shared: Shared, over: Over) -> None:
        self.every = config.every
        self.config, self.sets, self.shared, self.over = config, sets, shared, over

    @property
    def told(self) -> tuple[str, dict[str, Any]]:
        """What is to be known of the sets, for people and as facts: equal hashes are equal splits."""
        facts = {
            one.measured.name: {
                **one.measured.facts,
                "drawn": [self._draw_hash(one, drawn) for drawn in one.draws],
            }
            for one in self.sets
        }
        lines = [
            f"{name}: {of['classes']} classes, {of['test']} test images ({of['test_hash']}), drawn {' '.join(of['drawn'])}"
            for name, of in facts.items()
        ]
        how = f"of 2^{EXPONENTS[0]} to 2^{EXPONENTS[-1]} that with the best mean rank over all sets"
        match self.config.l2:
            case "test":
                l2 = f"{how}, measured on test (as the paper does)"
            case "heldout":
                l2 = f"{how}, measured on up to {self.config.heldout} other train images a class"
            case exponent:
                l2 = f"2^{exponent}"
        return f"few-shot by ridge, l2 {l2}; {'; '.join(lines)}", {"l2": self.config.l2, "sets": facts}

    def _draw_hash(self, one: ShotSet, drawn: Drawn) -> str:
        shots = drawn.places < self.config.shots[-1]
        return samples_hash(one.measured.train_pool, drawn.numbers[shots], drawn.places[shots])

    def run(self, state: TrainState) -> Iterator[tuple[str, float]]:
        """`<set>/<k>shot` (the mean over draws), `_std` of several draws, and `_l2`, the exponent that was taken."""
        measured = [(one.measured.name, self._measure(one, state)) for one in self.sets]
        judged = [of.scores[1] for _, of in measured if of.scores is not None]
        for at, k in enumerate(self.config.shots):
            # Every draw of every set has a say, a row of L each.
            best = best_strength(torch.cat([of[:, at] for of in judged])) if judged else 0
            for name, of in measured:
                if of.scores is None:
                    yield f"{name}/{k}shot", math.nan
                    continue
                values = of.scores[0][:, at, best].tolist()
                yield f"{name}/{k}shot", statistics.mean(values)
                if len(values) > 1:
                    yield f"{name}/{k}shot_std", statistics.stdev(values)
                yield f"{name}/{k}shot_l2", float(self._exponents[best])
        for name, of in measured:
            if of.broken:
                yield f"{name}/broken_images", of.broken

    @property
    def _exponents(self) -> Sequence[int]:
        return (self.config.l2,) if isinstance(self.config.l2, int) else EXPONENTS

    def _measure(self, one: ShotSet, state: TrainState) -> "_Scores":
        device, measured = state.engine.device, one.measured
        of_train = one.train.featurise(state, self.over)
        of_test = self.shared.featurised(SOURCE, one.test, state, self.over)
        total = totals(of_test, of_train, one.test, device)
        train, numbers = gathered(of_train, device)
        broken = total.broken + measured.unlabelled
        if not total.finite:
            return _Scores(broken, None)
        learn = _Labelled(train, _on(device, measured.class_of(measured.train_pool, numbers)))
        own, own_numbers = of_test.own
        test = _Labelled(own.to(device), _on(device, measured.class_of(measured.test_pool, own_numbers)))
        hits, kept = [], []
        for drawn in one.draws:
            places = _places_of(numbers, drawn)
            for k in self.config.shots:
                on_test, on_heldout = self._hits(learn, places, k, test, len(measured.classes))
                hits.append(on_test)
                kept.append(on_heldout)
        shape = len(one.draws), len(self.config.shots), len(self._exponents)
        on_test = sum_over_world(torch.stack(hits)).cpu().double().view(shape) / total.images
        on_heldout = (
            torch.stack(kept).cpu().double().view(shape)
        )  # a count of as many images each: their ranks are those of the shares
        return _Scores(broken, (on_test, on_heldout if self.config.l2 == "heldout" else on_test))

    def _hits(
        self, learn: "_Labelled", places: NDArray[np.int64], k: int, test: "_Labelled", num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """At each strength, the hits of `k` shots among this rank's test images, and among the held-out ones."""
        none = torch.zeros(len(self._exponents), dtype=torch.int64, device=learn.features.device)
        shots = learn.rows((places >= 0) & (places < k))
        if not len(shots.classes):  # every one of them is broken
            return none, none
        ridge = solve_ridge(*shots, num_classes)
        heldout = learn.rows(places >= self.config.shots[-1])
        kept = count_hits(ridge, *heldout, self._exponents) if self.config.l2 == "heldout" else none
        return count_hits(ridge, *test, self._exponents), kept


class _Labelled(NamedTuple):
    """Features of images, and the class of each."""

    features: Float[Tensor, "n D"]
    classes: Int64[Tensor, " n"]

    def rows(self, wanted: NDArray[np.bool_]) -> "_Labelled":
        """Those of some of the images."""
        where = _on(self.classes.device, np.flatnonzero(wanted))
        return _Labelled(self.features[where], self.classes[where])


class _Scores(NamedTuple):
    """Of one set: how many images were left out; accuracies on test, and what the strength is chosen by. None: features were not finite."""

    broken: int
    scores: tuple[Float[Tensor, "P K L"], Float[Tensor, "P K L"]] | None


def _places_of(numbers: NDArray[np.int64], drawn: Drawn) -> NDArray[np.int64]:
    """The place in a draw of each of these images, -1 for those that it has not."""
    places = np.full(len(numbers), -1)
    _, here, there = np.intersect1d(numbers, drawn.numbers, return_indices=True)
    places[here] = drawn.places[there]
    return places


def _on(device: torch.device, values: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(values).to(device)


def shot_problems(config: FewshotConfig, one: MeasuredSet) -> list[str]:
    """Why a class of a set does not have enough images, as a message that names it."""
    sizes, most, key = one.class_sizes(), config.shots[-1], f"{one.named.key}.train"
    fewest = int(sizes.argmin())
    if sizes[fewest] < most:
        others = int((sizes < most).sum()) - 1
        also = f", and {others} other classes have too few" if others else ""
        return [
            f"evals.fewshot.shots={config.shots}: {key} has {sizes[fewest]} images of class {one.classes[fewest]}, fewer than {most} shots{also}; "
            f"use {sizes[fewest]} shots at most, or leave such classes out ({one.named.key}.keep.labels)"
        ]
    if config.l2 == "heldout" and (sizes == most).all():
        return [
            f"evals.fewshot.l2=heldout: {key} has no image beyond the {most} shots of a class, so there is none to choose by; use fewer shots, "
            f"test, or a fixed exponent"
        ]
    return []


def build_fewshot(
    config: FewshotConfig,
    sets: Sequence[MeasuredSet],
    shared: Shared,
    over: Over,
    *,
    image_size: int,
    world: World,
) -> FewshotEvaluator:
    """Draw the shots of every set; raises ValueError, which names every class that has too few images."""
    problems = [problem for one in sets for problem in shot_problems(config, one)]
    if problems:
        raise ValueError("\n".join(problems))
    made = []
    how = {"image_size": image_size, "batch_size": config.batch_size, "world": world}
    for one in sets:
        most = config.shots[-1] + (config.heldout if config.l2 == "heldout" else 0)
        draws = [
            draw(one.train_pool.labels, one.train, purpose=SOURCE, seed=config.seed, repeat=repeat, most=most)
            for repeat in range(config.seeds)
        ]
        drawn = np.unique(np.concatenate([each.numbers for each in draws]))
        test = images_of(one, one.test_pool, one.test, **how)
        shared.will_use(SOURCE, test)
        made.append(ShotSet(one, draws, images_of(one, one.train_pool, drawn, **how), test))
    return FewshotEvaluator(config, made, shared, over)
