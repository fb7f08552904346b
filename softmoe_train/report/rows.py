"""This file owns the rows of a report: runs that differ in nothing but their seed are one, with means and deviations."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from softmoe_train.changes import ONCE, SHARDS_OF_A_SOURCE, is_free
from softmoe_train.plain import plain
from softmoe_train.report.cost import RunCost, all_known, run_cost
from softmoe_train.report.read import Curve, RunRead

# A run goes on with its data moved; two runs whose data lie in two places are taken for two kinds.
PLACES = {"data.train", "data.test", "data.classes", "data.quarantine"}
IN_A_LABEL = 4  # settings; above that a row is called by its runs
POINTS = 200  # of a curve


class Spread(NamedTuple):
    """A value over seeds; `deviation` is that of a sample, None for one run."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Row:
    """Runs of one kind. `counted` are those that came as far as the furthest of them, one of each seed: the others are in no mean."""

    label: str
    settings: dict[str, Any]  # those that tell rows apart, by key
    runs: list[RunRead]
    counted: list[RunRead]
    costs: list[RunCost]  # of those that are counted

    @property
    def seeds(self) -> list[str]:
        """Of all runs, as they are written."""
        return [plain(run.config.get("seed", "?"), 20) for run in self.runs]

    def spread(self, value: Callable[[RunRead], float | None]) -> Spread | None:
        """A value over the runs that count, or None where none of them has it."""
        return spread_of(value(run) for run in self.counted)

    def cost(self, name: str) -> Spread | None:
        """A cost by its name, over the runs that count."""
        return spread_of(getattr(cost, name) for cost in self.costs)


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """Of the finite values, or None where there are none."""
    known = all_known(values)
    if not known:
        return None
    return Spread(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None, len(known))


def rows_of(runs: list[RunRead]) -> list[Row]:
    """The rows in the order of their settings; runs whose settings cannot be read are rows of their own."""
    kinds: dict[str, list[RunRead]] = defaultdict(list)
    for run in runs:
        # A setting that there was not yet, or that is as it was before it could be set, tells no run from another.
        shape = {key: value for key, value in run.config.items() if _tells_apart(key) and value != ONCE.get(key)}
        kinds[json.dumps(shape, sort_keys=True, default=str) if shape else f"\0{run.folder}"].append(run)
    groups = list(kinds.values())
    keys = _differing([group[0] for group in groups if group[0].config], _tells_apart)
    short = short_names(keys)
    groups.sort(key=lambda group: _order(group, keys))
    labels = _unique([_label(group, keys, short) for group in groups])
    return [_row(label, group, keys) for label, group in zip(labels, groups, strict=True)]


def differences(rows: list[Row]) -> dict[str, list[str]]:
    """Every setting that is not the same in all runs, by key: for each row its value or values. Names and folders are left out."""
    runs = [run for row in rows for run in row.runs if run.config]
    keys = _differing(runs, lambda key: key not in ("name", "run_dir"))
    return {key: [_values(row.runs, key) for row in rows] for key in keys}


def mean_curve(row: Row, metric: str) -> tuple[Curve, np.ndarray | None] | None:
    """A metric of a row, over the runs that count: its mean, and its deviation where there are several.

    Where they were measured at other steps, each is read off between two of its own, over the steps that all have.
    """
    return mean_of_curves([run.curves[metric] for run in row.counted if metric in run.curves])


def mean_of_curves(curves: list[Curve]) -> tuple[Curve, np.ndarray | None] | None:
    """The mean and deviation of one curve a run; None where they have no step in common."""
    if not curves:
        return None
    if len(curves) == 1:
        return thinned(curves[0]), None
    first = thinned(curves[0])
    begin = max(curve.steps[0] for curve in curves)
    end = min(curve.steps[-1] for curve in curves)
    inside = (first.steps >= begin) & (first.steps <= end)
    if not inside.any():
        return None
    steps = first.steps[inside]
    values = np.stack([np.interp(steps, curve.steps, curve.values) for curve in curves])
    return Curve(steps, first.images[inside], values.mean(axis=0)), values.std(axis=0, ddof=1)


def thinned(curve: Curve) -> Curve:
    """A curve of few points that looks the same: of every stretch its lowest and its highest, so that no spike is lost."""
    if len(curve.steps) <= POINTS:
        return curve
    kept = {0, len(curve.steps) - 1}
    for part in np.array_split(np.arange(len(curve.steps)), POINTS // 2):
        values = curve.values[part]
        bad = ~np.isfinite(values)
        if bad.any():
            kept.add(int(part[bad.argmax()]))
        if not bad.all():
            kept |= {int(part[np.nanargmin(values)]), int(part[np.nanargmax(values)])}
    at = np.array(sorted(kept))
    return Curve(curve.steps[at], curve.images[at], curve.values[at])


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key by its last parts, as few as tell it from the others."""
    keys = list(keys)
    short = {}
    for key in keys:
        parts = key.split(".")
        for n in range(1, len(parts) + 1):
            short[key] = ".".join(parts[-n:])
            if sum(other == key or other.endswith(f".{short[key]}") for other in keys) == 1:
                break
    return short


def _tells_apart(key: str) -> bool:
    return key != "seed" and (not is_free(key) or key in PLACES or bool(SHARDS_OF_A_SOURCE.fullmatch(key)))


def _differing(runs: list[RunRead], wanted: Callable[[str], bool]) -> list[str]:
    keys = dict.fromkeys(key for run in runs for key in run.config if wanted(key))
    return [key for key in keys if len({_written(run.config.get(key, ONCE.get(key))) for run in runs}) > 1]


def _row(label: str, group: list[RunRead], keys: list[str]) -> Row:
    furthest = max(run.step for run in group)
    # The same run twice (a copy, a second try) is one: two of a seed would make a deviation of none.
    of_seeds = {str(run.config.get("seed", run.folder)): run for run in reversed(group) if run.step == furthest}
    counted = [run for run in group if any(run is one for one in of_seeds.values())]
    settings = {key: group[0].config.get(key) for key in keys} if group[0].config else {}
    return Row(label, settings, group, counted, [run_cost(run) for run in counted])


def _label(group: list[RunRead], keys: list[str], short: dict[str, str]) -> str:
    if keys and len(keys) <= IN_A_LABEL and group[0].config:
        return ", ".join(f"{short[key]}={_written(group[0].config.get(key))}" for key in keys)
    if len(group) == 1:
        return plain(group[0].name)
    return plain(f"{group[0].name} and {len(group) - 1} more")


def _unique(labels: list[str]) -> list[str]:
    count, seen = Counter(labels), Counter[str]()
    unique = []
    for label in labels:
        seen[label] += 1
        unique.append(f"{label} ({seen[label]})" if count[label] > 1 else label)
    return unique


def _order(group: list[RunRead], keys: list[str]) -> tuple[Any, ...]:
    def natural(value: object) -> tuple[Any, ...]:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return (0, value, ())
        return (1, 0, tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", str(value))))

    return (*(natural(group[0].config.get(key)) for key in keys), natural(group[0].name))


def _values(runs: list[RunRead], key: str) -> str:
    return ", ".join(dict.fromkeys(_written(run.config[key]) for run in runs if key in run.config)) or "-"


def _written(value: object) -> str:
    """A setting as YAML would say it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return plain(f"{value:g}" if isinstance(value, float) else value, 80)
