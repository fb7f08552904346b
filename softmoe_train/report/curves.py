"""This file owns the learning curves of a report: which metrics are drawn, and of which runs."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from softmoe_train.observe.judged import MEASURED, better, source_of
from softmoe_train.plain import plain
from softmoe_train.report.draw import Line, Look, draw_curves
from softmoe_train.report.page import Figure, Group, svg_figure
from softmoe_train.report.read import Curve, RunRead, mean_of
from softmoe_train.report.rows import Row, mean_of_curves, spread_of, thinned
from softmoe_train.report.words import of_metric

MOST_FIGURES = 80
BANDS = 12  # rows; of more they would hide the curves
IN_WORDS = 8  # rows whose last values are told to those who do not see the curves
BLOCK = re.compile(r"router/[^/]+/(.+)")


def curve_groups(rows: Sequence[Row], looks: Sequence[Look]) -> tuple[list[Group], list[str]]:
    """A figure for each metric that some run has, by what they tell of; and the metrics that had no room."""
    by_group: dict[str, list[str]] = {
        "Quality": [],
        "Training": [],
        "Routing, means over blocks": [],
        "Speed and data": [],
    }
    for name in sorted({name for row in rows for run in row.runs for name in _drawn(run.curves)}, key=_rank):
        by_group[_group_of(name)].append(name)
    images = len({run.config.get("batch_size") for row in rows for run in row.runs}) > 1
    room, groups, left_out = MOST_FIGURES, [], []
    for title, names in by_group.items():
        figures = [_figure(name, rows, looks, "images" if images else "steps") for name in names[:room]]
        left_out += names[room:]
        room -= len(figures)
        if figures:
            groups.append(Group(title, figures))
    return groups, left_out


def _drawn(names: Iterable[str]) -> set[str]:
    """Metrics as they are drawn: those of the blocks of a model are one."""
    return {f"router/*/{found.group(1)}" if (found := BLOCK.fullmatch(name)) else name for name in names}


def _curve_of(run: RunRead, name: str) -> Curve | None:
    if not name.startswith("router/*/"):
        curve = run.curves.get(name)
        return None if curve is None else curve._replace(values=curve.values * (100 if better(name) == "max" else 1))
    measure = name.removeprefix("router/*/")
    return mean_of([c for n, c in run.curves.items() if (found := BLOCK.fullmatch(n)) and found.group(1) == measure])


def _group_of(name: str) -> str:
    if source_of(name) in MEASURED and better(name) is not None:  # else how it was measured: a strength, iterations
        return "Quality"
    return {"train": "Training", "router": "Routing, means over blocks"}.get(source_of(name), "Speed and data")


def _rank(name: str) -> tuple[object, ...]:
    """Quality in the order of its sources, what is better when higher first; shots by their number."""
    source = source_of(name)
    order = (*MEASURED, "train", "router", "perf")
    place = order.index(source) if source in order else len(order)
    numbers = tuple(int(part) for part in re.findall(r"\d{1,9}", name))
    ways = {"max": 0, "min": 1, None: 2}
    return (place, ways[better(name)], name != "train/loss", re.sub(r"\d+", "", name), numbers, name)


def _figure(name: str, rows: Sequence[Row], looks: Sequence[Look], x: str) -> Figure:
    lines, last = [], []
    for row, look in zip(rows, looks, strict=True):
        curves = [curve for run in row.counted if (curve := _curve_of(run, name)) is not None]
        beside = [curve for run in row.runs if run not in row.counted and (curve := _curve_of(run, name)) is not None]
        mean = mean_of_curves(curves)
        if mean is None:  # seeds that have no step in common are drawn one by one
            beside += curves
            mean = (Curve(*np.full((3, 1), np.nan)), None)
        curve, deviation = mean
        lines.append(Line(look, curve, deviation if len(rows) <= BANDS else None, [thinned(one) for one in beside]))
        shown = spread_of(curve.last / (100 if better(name) == "max" else 1) for curve in curves)
        if shown is not None:
            last.append(f"{row.label}: {of_metric(name, shown)}")
    more = f", and {len(last) - IN_WORDS} more" if len(last) > IN_WORDS else ""
    over = "images seen" if x == "images" else "steps"
    alt = f"Curves of {plain(name)} over {over}. Last values: {'; '.join(last[:IN_WORDS]) or 'none'}{more}."
    return svg_figure(plain(name) + (" (%)" if better(name) == "max" else ""), "", alt, draw_curves(lines, x))
