"""This file owns what a sweep costs before it starts: a line for each point, and the sum of all and of what is left."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import rich.box
import rich.console
import rich.table
import rich.text

from softmoe_train.at_end import is_complete, summary_of
from softmoe_train.plan.cost import cost_of
from softmoe_train.plan.rehearsal import rehearse
from softmoe_train.plan.table import data
from softmoe_train.sweep.outcome import step_of_run
from softmoe_train.sweep.points import Point

# Of a run, by their names: what neither the parameters, the FLOPs nor the memory of a step depend on.
BESIDE = {
    "name", "run_dir", "seed", "steps", "stop_after", "time_limit", "hang_limit", "elastic", "device", "allow_changes", "warm", "schedule",
    "checkpoint", "bad_steps", "observe", "evals", "finetune",
}  # fmt: skip


class PointCost(NamedTuple):
    """What one point costs, and how much of it is done."""

    parameters: int
    exaflop: float  # of the whole run, as the paper counts training
    peak: int  # bytes of tensors, the most at once on a rank
    done: float  # the share of its steps
    complete: bool

    @property
    def left(self) -> float:
        """exaFLOP that are still to be done."""
        return self.exaflop * (1 - self.done)


def costs_of(points: Sequence[Point], progress: Callable[[int, int], object]) -> list[PointCost]:
    """Plan each point on its own processes; those that differ in nothing that counts are planned once."""
    planned: dict[str, tuple[int, int, int]] = {}
    costs = []
    for count, point in enumerate(points, start=1):
        config = point.config
        key = json.dumps(config.model_dump(exclude=BESIDE), sort_keys=True)
        if key not in planned:
            cost, size = cost_of(config.model), config.processes
            planned[key] = (cost.parameters, cost.paper_training_flops, rehearse(config, size, size).peak)
        parameters, flops, peak = planned[key]
        complete = is_complete(config)
        done = 1.0 if complete else min(1.0, step_of_run(point) / config.steps)
        costs.append(PointCost(parameters, flops * config.steps * config.batch_size / 1e18, peak, done, complete))
        progress(count, len(points))
    return costs


def print_costs(points: Sequence[Point], costs: Sequence[PointCost]) -> None:
    """The table, and the sums below it."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("point", "parameters", "exaFLOP", "processes", "peak of a rank", "steps", "so far"):
        table.add_column(name, justify="left" if name in ("point", "so far") else "right", no_wrap=True)
    for point, cost in zip(points, costs, strict=True):
        so_far = "complete" if cost.complete else f"step {step_of_run(point)}" if cost.done else "to do"
        table.add_row(
            rich.text.Text(_named(point)),
            f"{cost.parameters:,}",
            f"{cost.exaflop:.3g}",
            str(point.config.processes),
            data(cost.peak),
            f"{point.config.steps:,}",
            so_far,
        )
    console = rich.console.Console(file=sys.stdout, width=1000, highlight=False)
    width = max(console.measure(table).maximum, 60)
    rich.console.Console(file=sys.stdout, width=width, highlight=False).print(table)
    print(*sums(points, costs), sep="\n", flush=True)


def sums(points: Sequence[Point], costs: Sequence[PointCost]) -> list[str]:
    """What all points cost together."""
    total, left = sum(cost.exaflop for cost in costs), sum(cost.left for cost in costs)
    complete = sum(cost.complete for cost in costs)
    lines = [
        f"{len(points)} points, {complete} of them complete: {total:.3g} exaFLOP in all, {left:.3g} left "
        f"(as the paper counts training); at most {data(max(cost.peak for cost in costs))} of tensors on a rank"
    ]
    seconds = [
        (point.config.processes * float(summary_of(point.config)["wall_seconds"]), cost.exaflop)
        for point, cost in zip(points, costs, strict=True)
        if cost.complete
    ]
    spent, of = (sum(column) for column in zip(*seconds, strict=True)) if seconds else (0.0, 0.0)
    if of and left:
        hours = spent / of * left / 3600
        lines.append(f"at the pace of the complete points, what is left takes {hours:.2g} hours of a process")
    return lines


def _named(point: Point) -> str:
    """Its label, and what is coupled to it."""
    coupled = [f"{key.rpartition('.')[2]}={value}" for key, value in point.coupled.items()]
    return point.label + (f"  ({', '.join(coupled)})" if coupled else "")
