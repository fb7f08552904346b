"""This file owns the linear probe: a softmax classifier on the features of a whole train part, by L-BFGS.

N training images  D features  C classes
"""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

from softmoe_train.data.records import Count
from softmoe_train.dist import sum_over_world
from softmoe_train.evals.draws import draw
from softmoe_train.evals.features import Over, Shared, gathered, totals
from softmoe_train.evals.knn import PoolSet
from softmoe_train.evals.ridge import hit, standards
from softmoe_train.evals.sets import MeasuredSet, SetsConfig
from softmoe_train.loop import TrainState

SOURCE = "probe"
_HISTORY = 20
_EACH = 10  # iterations between two signs of life

logger = logging.getLogger(__name__)


class ProbeConfig(SetsConfig):
    """How the classifier is fitted, and which strengths of the penalty are tried."""

    l2: list[Annotated[int, Field(ge=-60, le=60)]]  # exponents: the loss is the mean cross entropy + 2^i / 2 |W|^2
    heldout: Annotated[float, Field(gt=0, lt=1)]  # of each class, to choose by
    seed: Count  # of what is held out
    iterations: PositiveInt  # at most, for one strength
    tolerance: Annotated[float, Field(gt=0)]  # of the largest gradient of any weight

    @field_validator("l2")
    @classmethod
    def _some_strengths(cls, l2: list[int]) -> list[int]:
        if not l2 or len(set(l2)) != len(l2):
            raise ValueError(
                f"evals.probe.l2={l2} must list exponents, each once, as in [-20,-10,0]; one alone is taken as it is"
            )
        return l2


class Probe(NamedTuple):
    """A fitted classifier, and how far the fit came."""

    mean: Float[Tensor, " D"]
    std: Float[Tensor, " D"]
    weights: Float[Tensor, "D1 C"]  # the last row is the bias, which nothing holds down
    iterations: int
    gradient: float  # the largest of any weight

    def scores(self, features: Float[Tensor, "n D"]) -> Float[Tensor, "n C"]:
        """The logits of each class."""
        return _standard(features.double(), self.mean, self.std) @ self.weights


def fit_probe(
    features: Float[Tensor, "N D"],
    classes: Int64[Tensor, " N"],
    num_classes: int,
    exponent: int,
    config: ProbeConfig,
    over: Over,
    start: Tensor | None = None,
) -> Probe:
    """Minimise mean cross entropy + 2^exponent / 2 |W|^2 over standardised features, in float64, by torch's L-BFGS (strong Wolfe)."""
    features = features.double()
    mean, std = standards(features)
    X, l2 = _standard(features, mean, std), 2.0**exponent
    weights = X.new_zeros(X.shape[1], num_classes) if start is None else start.clone()
    weights.requires_grad_()
    lbfgs = torch.optim.LBFGS(
        [weights], max_iter=_EACH, history_size=_HISTORY, tolerance_grad=config.tolerance, tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        lbfgs.zero_grad()
        value = cross_entropy(X @ weights, classes) + 0.5 * l2 * weights[:-1].square().sum()
        value.backward()
        return value

    iterations, gradient = 0, math.inf
    for _ in over(range(math.ceil(config.iterations / _EACH))):
        before = weights.detach().clone()
        with torch.enable_grad():
            lbfgs.step(loss)
            loss()
        assert weights.grad is not None
        iterations, gradient = lbfgs.state[weights]["n_iter"], weights.grad.abs().max().item()
        if gradient <= config.tolerance or before.equal(weights):  # or it cannot come nearer in float64
            break
    return Probe(mean, std, weights.detach(), iterations, gradient)


class ProbeEvaluator:
    """Measures `<set>/top1` of a linear classifier on the features; every rank fits the same one, to the same images in the same order."""

    def __init__(self, config: ProbeConfig, sets: Sequence[PoolSet], shared: Shared, over: Over) -> None:
        self.every = config.every
        self.config, self.sets, self.shared, self.over = config, sets, shared, over

    @property
    def told(self) -> tuple[str, dict[str, Any]]:
        """What is to be known of the sets, for people and as facts."""
        facts = {one.measured.name: one.measured.facts for one in self.sets}
        chosen = f"the best of 2^{self.config.l2} on {self.config.heldout:.0%} of the train images, then fitted to all"
        l2 = f"2^{self.config.l2[0]}" if len(self.config.l2) == 1 else chosen
        lines = [
            f"{name}: {of['train']} train images, {of['test']} test images ({of['test_hash']})"
            for name, of in facts.items()
        ]
        return f"linear probe by L-BFGS, l2 {l2}; {'; '.join(lines)}", {"l2": self.config.l2, "sets": facts}

    def run(self, state: TrainState) -> Iterator[tuple[str, float]]:
        """`<set>/top1`, `/l2` (the exponent), `/iterations` and `/gradient` (the largest of any weight, where the fit ended)."""
        device = state.engine.device
        for one in self.sets:
            name, measured = one.measured.name, one.measured
            of_test = self.shared.featurised(SOURCE, one.test, state, self.over)
            of_train = self.shared.featurised(SOURCE, one.train, state, self.over)
            total = totals(of_test, of_train, one.test, device)
            broken = total.broken + measured.unlabelled
            if broken:
                yield f"{name}/broken_images", broken
            features, numbers = gathered(of_train, device)
            if not total.finite:
                yield f"{name}/top1", math.nan
                continue
            classes = torch.from_numpy(measured.class_of(measured.train_pool, numbers)).to(device)
            exponent = self._choose(measured, features, numbers, classes)
            probe = fit_probe(features, classes, len(measured.classes), exponent, self.config, self.over)
            if probe.gradient > self.config.tolerance:
                logger.warning(
                    "the probe on %s has not converged: its largest gradient is %.1e after %d iterations (evals.probe.tolerance=%g)",
                    name, probe.gradient, probe.iterations, self.config.tolerance,
                )  # fmt: skip
            own, own_numbers = of_test.own
            truth = torch.from_numpy(measured.class_of(measured.test_pool, own_numbers)).to(device)
            hits = hit(probe.scores(own.to(device)), truth).sum()
            yield f"{name}/top1", sum_over_world(hits).item() / total.images
            yield f"{name}/l2", float(exponent)
            yield f"{name}/iterations", float(probe.iterations)
            yield f"{name}/gradient", probe.gradient

    def _choose(self, measured: MeasuredSet, features: Tensor, numbers: np.ndarray, classes: Tensor) -> int:
        """The exponent that is best on what is held out, of equal ones the largest; each fit starts where that of the next larger ended."""
        exponents = sorted(self.config.l2, reverse=True)
        if len(exponents) == 1:
            return exponents[0]
        kept = torch.from_numpy(np.isin(numbers, heldout_numbers(self.config, measured))).to(features.device)
        hits, weights = [], None
        for exponent in exponents:
            probe = fit_probe(
                features[~kept], classes[~kept], len(measured.classes), exponent, self.config, self.over, weights
            )
            weights = probe.weights
            hits.append(int(hit(probe.scores(features[kept]), classes[kept]).sum()))
        return exponents[hits.index(max(hits))]


def heldout_numbers(config: ProbeConfig, measured: MeasuredSet) -> np.ndarray:
    """The train images to choose by: a part of each class, at least one where that leaves another to learn from."""
    every = draw(
        measured.train_pool.labels, measured.train, purpose=SOURCE, seed=config.seed, repeat=0, most=len(measured.train)
    )
    sizes = measured.class_sizes()
    quota = np.where(sizes > 1, np.maximum(1, (config.heldout * sizes).astype(np.int64)), 0)
    return every.numbers[every.places < quota[measured.class_of(measured.train_pool, every.numbers)]]


def probe_problems(config: ProbeConfig, one: MeasuredSet) -> list[str]:
    """Why a set cannot be measured so."""
    if len(config.l2) == 1 or len(heldout_numbers(config, one)):
        return []
    return [
        f"evals.probe.l2={config.l2}: {one.named.key}.train has one image of each class, so none can be held out to choose by; give one exponent"
    ]


def _standard(features: Float[Tensor, "n D"], mean: Tensor, std: Tensor) -> Float[Tensor, "n D1"]:
    standard = (features - mean) / std
    return torch.cat([standard, standard.new_ones(len(standard), 1)], dim=1)
