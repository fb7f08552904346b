"""This file owns the heat map of a sweep over two numbers, such as experts against slots (paper Figure 6)."""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

from softmoe_train.report.rows import Row, Spread, short_names

Cell = tuple[float, float]  # the values of both keys


class Grid(NamedTuple):
    """What was measured at each point of a sweep over two keys."""

    x: str
    y: str
    others: str  # what the other swept settings were, empty where there are none
    xs: list[float]
    ys: list[float]
    cells: dict[Cell, Spread]  # by (x, y); a point that was not measured is not there


def grids_of(rows: list[Row], value: Callable[[Row], Spread | None]) -> list[Grid]:
    """The heat maps of a sweep in which exactly two keys are numbers, one for each choice of the other swept settings; else none.

    `value` is what a point has reached, or None. Two rows at one point (whose other settings are the same) cannot be.
    """
    rows = [row for row in rows if row.settings]
    keys = list(rows[0].settings) if rows else []
    numeric = [key for key in keys if all(_is_number(row.settings[key]) for row in rows)]
    if len(numeric) != 2:
        return []
    y, x = numeric
    short = short_names(keys)
    parts: dict[str, dict[Cell, Spread]] = defaultdict(dict)
    for row in rows:
        others = ", ".join(f"{short[key]}={row.settings[key]}" for key in keys if key not in numeric)
        reached = value(row)
        if reached is not None:
            parts[others][float(row.settings[x]), float(row.settings[y])] = reached
    return [
        Grid(short[x], short[y], others, sorted({c[0] for c in cells}), sorted({c[1] for c in cells}), cells)
        for others, cells in parts.items()
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
