"""This file owns which checkpoint is the best so far: the rule, the record that resumes, and the comparison."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.manifest import JSON

RULE = re.compile(r"(highest|lowest) (\S+)")


class Best(NamedTuple):
    """The step whose checkpoint is the best of the run, and its value of what `rule` names."""

    rule: str  # as in `highest upstream/test/top1`
    step: int
    value: float

    def to_json(self) -> dict[str, JSON]:
        """For the loop document."""
        return {"rule": self.rule, "step": self.step, "value": self.value}

    @classmethod
    def from_json(cls, document: JSON) -> "Best | None":
        """What `to_json` gave, or None for none; raises CheckpointError for anything else."""
        match document:
            case None:
                return None
            case {"rule": str(rule), "step": int(step), "value": float(value)} if RULE.fullmatch(rule):
                return cls(rule, step, value)
        raise CheckpointError("not a best checkpoint", [f"best: {document}"])


def metric_of(rule: str) -> str:
    """The metric that a rule names."""
    return rule.partition(" ")[2]


def best_of(rule: str | None, so_far: Best | None, step: int, measured: Mapping[str, float]) -> Best | None:
    """The best after a checkpoint at `step`, where `measured` was measured; a record of another rule is forgotten.

    Of equal ones the first stays. A step without the metric, or whose value is not finite, is never the best.
    """
    if rule is None:
        return None
    if so_far is not None and so_far.rule != rule:
        so_far = None
    value = measured.get(metric_of(rule), math.nan)
    if not math.isfinite(value):
        return so_far
    sign = 1 if rule.startswith("highest") else -1
    return Best(rule, step, float(value)) if so_far is None or sign * value > sign * so_far.value else so_far
