"""This file owns what a sweep comes to: the table of its points, the heat map over two numbers, and the report of all."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import rich.box
import rich.console
import rich.table
import rich.text

from softmoe_train.checkpoint.best import metric_of
from softmoe_train.observe.judged import NUMBERS, Number, better
from softmoe_train.observe.run_files import replace_bytes
from softmoe_train.plain import plain
from softmoe_train.report.draw import grid_png
from softmoe_train.report.grid import Grid, grids_of
from softmoe_train.report.make import read_report, write_report
from softmoe_train.report.read import RunRead, read_run
from softmoe_train.report.rows import Row, Spread, rows_of, short_names
from softmoe_train.report.words import DASH, clock, of_metric
from softmoe_train.sweep.outcome import Outcome

REPORT, MAP = "report.html", "heat_map"  # in the folder of the sweep


def value_of(run: RunRead, measure: str) -> float | None:
    """What a run has come to at its end by the rule of a sweep; None where it was not measured."""
    return run.last(metric_of(measure))


def print_results(outcomes: Sequence[Outcome], measure: str) -> None:
    """A line for each point, the best by the measure marked."""
    runs = [read_run(one.point.folder, one.point.label) for one in outcomes]
    values = [
        value_of(run, measure) if one.state == "complete" else None for run, one in zip(runs, outcomes, strict=True)
    ]
    known = [value for value in values if value is not None and value == value]
    best = None if not known else max(known) if measure.startswith("highest") else min(known)
    metric = metric_of(measure)
    others = [n for n in NUMBERS if any(run.number(n) for run in runs) and metric not in n.metrics([metric]).values()]
    short = short_names({**outcomes[0].point.swept, **outcomes[0].point.coupled})
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    names = [*short.values(), "state", "step", metric, *(number.title for number in others), "time"]
    for name in names:
        table.add_column(rich.text.Text(name), justify="left" if name == "state" else "right", no_wrap=True)
    for one, run, value in zip(outcomes, runs, values, strict=True):
        table.add_row(
            *(rich.text.Text(plain({**one.point.swept, **one.point.coupled}.get(key, DASH), 40)) for key in short),
            one.state,
            f"{run.step:,} of {one.point.config.steps:,}",
            rich.text.Text(_written(metric, value) + ("  best" if value is not None and value == best else "")),
            *(_number(run, number) for number in others),
            clock(run.wall_seconds),
        )
    console = rich.console.Console(file=sys.stdout, width=1000, highlight=False)
    width = max(console.measure(table).maximum, 60)
    rich.console.Console(file=sys.stdout, width=width, highlight=False).print(table)


def write_results(folder: Path, outcomes: Sequence[Outcome], measure: str) -> list[str]:
    """Draw what can be drawn of the points into the folder of the sweep; returns a line for each file, or why it is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        return ['no heat map and no report: matplotlib is not installed; use pip install "softmoe-train[pictures]"']
    lines = []
    rows = rows_of([read_run(one.point.folder, one.point.label) for one in outcomes if one.state == "complete"])
    grids = grids_of(rows, lambda row: _spread(row, measure))
    for number, grid in enumerate(grids):
        path = folder / (f"{MAP}.png" if len(grids) == 1 else f"{MAP}_{number}.png")
        replace_bytes(path, heat_map(grid, measure))
        lines.append(f"heat map        {path}" + (f"   ({plain(grid.others)})" if grid.others else ""))
    if not grids:
        lines.append(
            "heat map        none: it is of sweeps in which two settings are numbers, and of points that are complete"
        )
    report = read_report([folder], lambda _, __: None)
    if report.rows:
        write_report(report, folder / REPORT)
        lines.append(f"report          {folder / REPORT}")
    return lines


def heat_map(grid: Grid, measure: str) -> bytes:
    """A PNG of the grid."""
    metric = metric_of(measure)
    share = better(metric) == "max"
    title = f"{metric} (%)" if share else metric
    others = f"\n{plain(grid.others, 60)}" if grid.others else ""
    return grid_png(grid, f"{title}{others}", percent=share, lowest=measure.startswith("lowest"))


def _spread(row: Row, measure: str) -> Spread | None:
    return row.spread(lambda run: value_of(run, measure))


def _written(metric: str, value: float | None) -> str:
    return of_metric(metric, None if value is None else Spread(value, None, 1))


def _number(run: RunRead, number: Number) -> str:
    curve = run.number(number)
    return DASH if curve is None else f"{100 * curve.last:.2f}"
