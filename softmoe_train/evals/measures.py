"""This file owns what the evaluators of a run measure at each evaluation: the metrics that a best checkpoint may be judged by."""

from typing import NamedTuple

from softmoe_train.evals.on_sets import FeatureConfigs, feature_measures
from softmoe_train.evals.upstream import MEASURES, UpstreamConfig


class Measure(NamedTuple):
    """Who measures something, and every how many steps."""

    source: str
    every: int


def measures_of(upstream: UpstreamConfig | None, on_sets: FeatureConfigs, *, averaged: bool) -> dict[str, Measure]:
    """Every metric that each evaluation of these evaluators has a value for, those of averaged weights included."""
    found: dict[str, Measure] = {}
    if upstream is not None:
        found |= {f"upstream/{name}": Measure("upstream", upstream.every) for name in MEASURES}
    for source, names in feature_measures(on_sets).items():
        found |= {f"{source}/{name}": Measure(source, on_sets[source].every) for name in names}
    if averaged:
        found |= {metric.replace("/", "_average/", 1): measure for metric, measure in found.items()}
    return found
