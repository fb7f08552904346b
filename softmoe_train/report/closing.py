"""This file owns what a run says of itself at its end: the three numbers, how fast it was and how long it took."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from softmoe_train.observe.judged import NUMBERS, Number
from softmoe_train.plain import plain, the_first
from softmoe_train.report.read import Curve, RunRead, read_run
from softmoe_train.report.words import clock

SETS = 6  # of a number, told one by one


def closing_lines(folder: Path) -> list[str]:
    """A line for each of the three numbers that was measured, then images/s and wall time; each begins with what it is, 16 wide."""
    run = read_run(folder, folder.name)
    lines = [_line(number.title, text) for number in NUMBERS for text in _number(run, number)]
    rates = run.curves.get("perf/images_per_second")
    if rates is not None and np.isfinite(rates.values).any():
        lines.append(_line("images/s", f"{np.nanmedian(rates.values):,.0f}"))
    if run.wall_seconds is not None:
        starts = run.history.starts if run.history is not None else 1
        over = f"   (over {starts} starts)" if starts > 1 else ""
        lines.append(_line("wall time", f"{clock(run.wall_seconds)}{over}"))
    return lines


def _number(run: RunRead, number: Number) -> Iterator[str]:
    curve = run.number(number)
    if curve is None:
        return
    notes = [_best(curve)] if len(curve.values) > 1 else []
    if int(curve.steps[-1]) != run.step:
        notes.append(f"at step {int(curve.steps[-1])}")
    sets = number.metrics(run.curves)
    if len(sets) > 1:
        values = [f"{plain(name, 40)} {run.curves[metric].last:.4f}" for name, metric in sets.items()]
        notes.append(f"mean of {len(sets)} sets: {the_first(values, SETS)}")
    averaged = run.number(number._replace(source=f"{number.source}_average"))
    if averaged is not None:
        notes.append(f"averaged weights {averaged.last:.4f}")
    yield f"{curve.last:.4f}" + (f"   ({'; '.join(notes)})" if notes else "")


def _best(curve: Curve) -> str:
    value, step = curve.best("max")
    return f"best {value:.4f} at step {step}"


def _line(title: str, text: str) -> str:
    return f"{title:<16}{text}"
