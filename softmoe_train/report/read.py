"""This file owns reading a run folder that anybody may have written: whatever is torn, foreign or missing is told and does no harm."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from softmoe_train.config import flat
from softmoe_train.faults.claim import owner
from softmoe_train.observe.history import History
from softmoe_train.observe.judged import Number
from softmoe_train.observe.run_files import Line, whole_line
from softmoe_train.plain import plain

TRAINING_LINES = 1000  # of a run, evenly spread, and the last one: a curve on a screen shows no more
MOST_METRICS = 2000
LARGEST_TEXT = 4 * 2**20  # bytes of summary.json or config.yaml
LARGEST_METRICS = 4 * 2**30
MOST_VALUES = 20_000  # of a configuration; a page of YAML with aliases may stand for billions
Floats = NDArray[np.float64]


class Curve(NamedTuple):
    """A metric over a run, by ascending step; nan where it was not finite."""

    steps: Floats
    images: Floats
    values: Floats

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])

    def best(self, which: str) -> tuple[float, int]:
        """The best finite value and the first step that had it; `which` is max or min. nan and the last step where none is finite."""
        if not np.isfinite(self.values).any():
            return math.nan, int(self.steps[-1])
        at = int(np.nanargmax(self.values) if which == "max" else np.nanargmin(self.values))
        return float(self.values[at]), int(self.steps[at])


@dataclass(frozen=True)
class RunRead:
    """What a run folder says. Names and texts are as they were written, by whomever."""

    folder: Path
    name: str
    config: dict[str, Any]  # flat; empty where there is none that can be read
    tree: dict[str, Any]  # the same, nested
    curves: dict[str, Curve]
    step: int
    images_seen: int
    wall_seconds: float | None
    state: str  # complete, running, interrupted, killed, failed, or unknown
    reason: str  # why it ended, in its own words
    history: History | None
    notes: list[str] = field(default_factory=list)

    def number(self, number: Number) -> Curve | None:
        """One of the three numbers where all its sets were measured, which is at the same steps."""
        return mean_of([self.curves[name] for name in number.metrics(self.curves).values()])

    def last(self, metric: str) -> float | None:
        """The newest value of a metric."""
        return self.curves[metric].last if metric in self.curves else None


def read_run(folder: Path, name: str) -> RunRead:
    """All that the report needs of a run folder, to be called `name`; never raises for what is in it."""
    notes: list[str] = []
    tree = _config(folder / "config.yaml", notes)
    summary = _json(folder / "summary.json", notes)
    curves = _curves(folder / "metrics.jsonl", notes)
    steps = [curve.steps[-1] for curve in curves.values()]
    images = [curve.images[-1] for curve in curves.values()]
    state, reason = _state(folder, summary, notes)
    return RunRead(
        folder=folder,
        name=name,
        config=flat(tree),
        tree=tree,
        curves=curves,
        step=int(max(steps, default=_count_of(summary.get("steps")) or 0)),
        images_seen=int(max(images, default=_count_of(summary.get("images_seen")) or 0)),
        wall_seconds=wall if (wall := _number(summary.get("wall_seconds"))) is not None and wall >= 0 else None,
        state=state,
        reason=reason,
        history=_history(summary, notes),
        notes=notes,
    )


def mean_of(curves: list[Curve]) -> Curve | None:
    """The mean of curves at the steps that all of them have, or None where there are none."""
    if not curves:
        return None
    first, *others = curves
    steps = first.steps
    for other in others:
        steps = np.intersect1d(steps, other.steps)
    if not len(steps):
        return None
    values = [curve.values[np.searchsorted(curve.steps, steps)] for curve in curves]
    return Curve(steps, first.images[np.searchsorted(first.steps, steps)], np.mean(values, axis=0))


def _curves(path: Path, notes: list[str]) -> dict[str, Curve]:
    columns: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
    try:
        lines, broken = _some_lines(path)
    except OSError as error:
        notes.append(f"metrics.jsonl cannot be read ({error.strerror or error})")
        return {}
    for line in lines:
        step, images = _count_of(line.pop("step")), _count_of(line.pop("images_seen"))
        if step is None or images is None:
            broken += 1
            continue
        for name, value in line.items():
            number = math.nan if value is None else _number(value)
            if number is not None and (name in columns or len(columns) < MOST_METRICS):
                columns[name].append((step, images, number))
    if broken:
        notes.append(f"metrics.jsonl has {broken} torn or foreign line{'' if broken == 1 else 's'}, left out")
    if len(columns) == MOST_METRICS:
        notes.append(f"metrics.jsonl has {MOST_METRICS} metrics or more; the first are shown")
    return {name: _curve(rows) for name, rows in columns.items()}


def _curve(rows: list[tuple[int, int, float]]) -> Curve:
    steps, images, values = np.array(rows, dtype=np.float64).T
    # Of a step that was reported twice the last one counts.
    kept, backwards = np.unique(steps[::-1], return_index=True)
    at = len(steps) - 1 - backwards
    return Curve(kept, images[at], values[at])


def _some_lines(path: Path) -> tuple[list[Line], int]:
    """The lines of measurements, all of them, and an even choice of those of training; and how many were no lines."""
    if not path.is_file():
        raise FileNotFoundError(2, "it is not there")
    if path.stat().st_size > LARGEST_METRICS:
        raise OSError(27, f"it is larger than {LARGEST_METRICS >> 30} GiB")
    with path.open("rb") as file:
        training = sum(1 for raw in file if b'"train/loss"' in raw)
    every, seen, broken, lines = max(1, math.ceil(training / TRAINING_LINES)), 0, 0, []
    with path.open("rb") as file:
        for raw in file:
            if not raw.strip():
                continue
            if b'"train/loss"' in raw:
                seen += 1
                if seen % every and seen < training:
                    continue
            line = whole_line(raw)
            if line is None:
                broken += 1
            else:
                lines.append(line)
    return lines, broken


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it is there
    try:
        tree = loader(_text(path)).get_single_data()  # what yaml.safe_load does: plain values, no objects
        if not isinstance(tree, dict):
            raise ValueError("it is no mapping")
        _count(tree)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        notes.append(f"config.yaml cannot be read ({_why(error)}): its settings and costs are unknown")
        return {}
    return _with_names(tree)


def _count(tree: object) -> None:
    """Raises ValueError for more values than a configuration may have; aliases count as often as they are used."""
    waiting, count = [tree], 0
    while waiting:
        here = waiting.pop()
        children: Iterable[Any] = ()
        if isinstance(here, dict):
            children = here.values()
        elif isinstance(here, list | tuple | set):
            children = here
        waiting.extend(children)
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values")


def _with_names(tree: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): _with_names(value) if isinstance(value, dict) else value for key, value in tree.items()}


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        document = json.loads(_text(path))
        if not isinstance(document, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"summary.json cannot be read ({_why(error)}): how the run went is unknown")
        return {}
    return document


def _text(path: Path) -> str:
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(2, "it is not there")
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"it is larger than {LARGEST_TEXT >> 20} MiB")
    return path.read_text(encoding="utf-8")


def _state(folder: Path, summary: dict[str, Any], notes: list[str]) -> tuple[str, str]:
    try:
        holder = owner(folder)
    except (OSError, ValueError) as error:
        notes.append(f"whether it runs cannot be told ({_why(error)})")
        holder = None
    if holder is not None:
        return "running", holder
    if not summary:
        return "unknown", ""
    ended = summary.get("ended")
    if not isinstance(ended, str):
        return "killed", "no end was written: it was killed, or runs on another machine"
    kind = ended.partition(":")[0]
    state = kind if kind in ("complete", "failed") else "interrupted"
    return state, "" if ended == kind == "complete" else ended


def _history(summary: dict[str, Any], notes: list[str]) -> History | None:
    if "history" not in summary:
        return None
    try:
        return History.model_validate(summary["history"])
    except ValueError:
        notes.append("summary.json has a history that cannot be read")
        return None


def _number(value: object) -> float | None:
    """A finite number as a float; None for anything else, but for what JSON takes for not finite: nan."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else math.nan


def _count_of(value: object) -> int | None:
    """A count that a float holds exactly, or None."""
    return value if type(value) is int and 0 <= value < 2**53 else None


def _why(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return plain(text.strip().splitlines()[0] if text.strip() else type(error).__name__, 120)
