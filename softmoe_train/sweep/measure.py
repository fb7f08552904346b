"""This file owns by what the points of a sweep are compared."""

from collections.abc import Iterable

from softmoe_train.checkpoint.best import metric_of
from softmoe_train.config import ConfigError
from softmoe_train.evals.measures import measures_of
from softmoe_train.plain import the_first
from softmoe_train.settings import RunConfig
from softmoe_train.sweep.points import Point

USUAL = ("highest finetune/val/top1", "highest upstream/test/top1", "lowest train/loss")
NAMED = 6  # points
KNOWN = 24  # metrics


def measure_of(asked: str | None, points: Iterable[Point]) -> str:
    """The rule by which points are compared, as in `highest upstream/test/top1`; raises ConfigError where one would not measure it."""
    points = list(points)
    known = [_measured(point.config) for point in points]
    if asked is None:
        return next(rule for rule in USUAL if all(metric_of(rule) in one for one in known))
    metric = metric_of(asked)
    lacking = [point.label for point, one in zip(points, known, strict=True) if metric not in one]
    if lacking:
        use = the_first(sorted(set.intersection(*known)), KNOWN)
        raise ConfigError(
            [f"sweep.measure={asked}: {the_first(lacking, NAMED)} would not measure {metric}; use one of {use}"]
        )
    return asked


def _measured(config: RunConfig) -> set[str]:
    averaged, held_out = config.average is not None, config.data.holdout is not None
    known = measures_of(config.evals, config.model.num_classes, averaged=averaged, held_out=held_out)
    return {"train/loss", *known, *(f"finetune/{name}/top1" for name in config.finetune)}
