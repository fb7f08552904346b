"""This file owns what a run costs, as its configuration and its own clock say."""

import json
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from softmoe_train.config import parse
from softmoe_train.model.count import forward_flops
from softmoe_train.model.records import ModelConfig
from softmoe_train.model.vit import build_model
from softmoe_train.plan.cost import paper_training_flops
from softmoe_train.report.read import RunRead

# What a configuration may claim: counting is done on shapes, but each block and each choice of an expert is walked through.
DEEPEST = 256
MOST_EXPERTS = 2**16


class RunCost(NamedTuple):
    """Of one run; None where it cannot be told."""

    parameters: int | None
    forward_flops: int | None  # of an image, two a multiply-add: what is active for it
    train_exaflop: float | None  # so far, as the paper counts: one a multiply-add, times three (paper.md 2.2)
    images_per_second: float | None  # the median of its reports
    wall_seconds: float | None


def run_cost(run: RunRead) -> RunCost:
    """The cost of a run up to its last report."""
    cost = _model_cost(json.dumps(run.tree.get("model"), sort_keys=True, default=str))
    rates = run.curves.get("perf/images_per_second")
    finite = rates.values[np.isfinite(rates.values)] if rates is not None else np.empty(0)
    return RunCost(
        parameters=None if cost is None else cost.parameters,
        forward_flops=None if cost is None else cost.forward_flops,
        train_exaflop=None if cost is None else cost.training_flops * run.images_seen / 1e18,
        images_per_second=float(np.median(finite)) if len(finite) else None,
        wall_seconds=run.wall_seconds,
    )


def all_known(values: Iterable[float | None]) -> list[float]:
    """The values that are there and finite."""
    return [value for value in values if value is not None and np.isfinite(value)]


class _ModelCost(NamedTuple):
    """Of one model; FLOPs of an image. Not plan's `cost_of`, which runs the backward too: a sweep has many models."""

    parameters: int
    forward_flops: int
    training_flops: int  # as the paper counts


@cache
def _model_cost(settings: str) -> _ModelCost | None:
    """None for what is no model of this version."""
    tree = json.loads(settings)
    if not isinstance(tree, dict):
        return None
    try:
        config, _ = parse(ModelConfig, tree)
        if config is None or config.depth > DEEPEST or config.moe.num_experts > MOST_EXPERTS:
            return None
        forward = forward_flops(config)
        parameters = sum(p.numel() for p in build_model(config, torch.float32).parameters())
        return _ModelCost(parameters, forward, paper_training_flops(config, forward))
    except (ValueError, RuntimeError, OverflowError, MemoryError, ArithmeticError, TypeError):
        return None
