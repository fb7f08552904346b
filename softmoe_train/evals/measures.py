"""This file owns what the evaluators of a run measure at each evaluation: the metrics that a best checkpoint may be judged by."""

from typing import NamedTuple

from softmoe_train.evals.on_sets import feature_measures
from softmoe_train.evals.settings import EvalsConfig
from softmoe_train.evals.upstream import MEASURES


class Measure(NamedTuple):
    """Who measures something, and every how many steps."""

    source: str
    every: int


def measures_of(evals: EvalsConfig, num_classes: int, *, averaged: bool, held_out: bool) -> dict[str, Measure]:
    """Every metric that each evaluation of these evaluators has a value for, those of averaged weights included.

    `held_out` says whether the data has a held-out part.
    """
    found: dict[str, Measure] = {}
    if evals.upstream is not None:
        names = evals.upstream.measures(num_classes)
        found |= {f"upstream/{name}": Measure("upstream", evals.upstream.every) for name in names}
    if evals.finetune is not None and held_out:
        found |= {f"finetune/val/{name}": Measure("finetune", evals.finetune.every) for name in MEASURES}
    for source, names in feature_measures(evals.on_sets).items():
        found |= {f"{source}/{name}": Measure(source, evals.on_sets[source].every) for name in names}
    if averaged:
        found |= {metric.replace("/", "_average/", 1): measure for metric, measure in found.items()}
    return found
