"""This file owns the cost of every expert axis that experts and ranks allow, beside the one that a run has.

A model of one block with experts is rehearsed on each axis: what differs between two of them differs in every such block alike.
"""

import math
from typing import NamedTuple

from softmoe_train.model.records import moe_blocks
from softmoe_train.parallel.layout import layout_problems
from softmoe_train.plan.rehearsal import Rehearsed, rehearse
from softmoe_train.settings import RunConfig


class AxisCost(NamedTuple):
    """What one rank holds and sends in a step with this expert axis; None where the rest of the layout does not allow it."""

    axis: int
    problem: str | None
    lasting: int | None  # bytes of weights, gradients and optimizer
    exchange: int | None  # bytes that slots send off the rank
    off_host: int | None  # those of them that leave the host
    weights: int | None  # bytes that gathers and sums of weights and gradients send off the rank


class _Sent(NamedTuple):
    lasting: int
    exchange: int
    off_host: int
    weights: int


def axis_costs(config: RunConfig, size: int, ranks_per_host: int, whole: Rehearsed, chosen: int) -> list[AxisCost]:
    """The legal axes, ascending; `whole` is the rehearsal of the run itself, whose axis is `chosen`."""
    common = math.gcd(config.model.num_experts, size)
    layers = len(moe_blocks(config.model.moe.blocks, config.model.depth))
    block = {chosen: _of_a_block(config, size, ranks_per_host)}
    costs = []
    for axis in [d for d in range(1, common + 1) if common % d == 0]:
        there = _with_axis(config, axis)
        experts = config.model.num_experts
        problems = layout_problems(there.parallel, num_experts=experts, size=size, local_size=ranks_per_host)
        if problems:
            costs.append(AxisCost(axis, "; ".join(problems), None, None, None, None))
            continue
        if axis not in block:
            block[axis] = _of_a_block(there, size, ranks_per_host)
        other = [
            a + layers * (b - c)
            for a, b, c in zip(_sent(whole, ranks_per_host), block[axis], block[chosen], strict=True)
        ]
        costs.append(AxisCost(axis, None, *other))
    return costs


def _of_a_block(config: RunConfig, size: int, ranks_per_host: int) -> _Sent:
    moe = config.model.moe.model_copy(update={"blocks": [0]})
    model = config.model.model_copy(update={"depth": 1, "moe": moe})
    return _sent(rehearse(config.model_copy(update={"model": model}), size, ranks_per_host), ranks_per_host)


def _sent(rehearsed: Rehearsed, ranks_per_host: int) -> _Sent:
    exchanges = [c for c in rehearsed.collectives if c.kind == "all-to-all"]
    slots, off_host = sum(c.off_rank for c in exchanges), sum(c.off_host(ranks_per_host) for c in exchanges)
    return _Sent(rehearsed.held.lasting, slots, off_host, sum(c.off_rank for c in rehearsed.collectives) - slots)


def _with_axis(config: RunConfig, axis: int) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"expert_axis": axis})})
