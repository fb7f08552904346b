"""This file owns what a report says: its sections in their order, each made of the rows."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from softmoe_train.observe.judged import NUMBERS, Number, better, source_of
from softmoe_train.plain import plain, the_first
from softmoe_train.report.curves import BANDS, curve_groups
from softmoe_train.report.draw import Look, Point, draw_grid, draw_points
from softmoe_train.report.grid import grids_of
from softmoe_train.report.page import Cell, Figure, Group, Section, Table, TableRow, png_figure, svg_figure
from softmoe_train.report.pareto import pareto_front
from softmoe_train.report.pictures import IN_ALL, thumbnails
from softmoe_train.report.read import RunRead
from softmoe_train.report.rows import Row, Spread, differences, spread_of
from softmoe_train.report.words import DASH, clock, of_metric, percent, short, small

LEGEND = 32  # rows; where there are more, the table of results shows their colours
RUNS_BELOW = 6  # of a row, told by name


def last_of(row: Row, number: Number) -> Spread | None:
    """One of the three numbers at the end, over seeds."""
    return row.spread(lambda run: None if (curve := run.number(number)) is None else curve.last)


def results(rows: Sequence[Row], looks: Sequence[Look]) -> Section:
    """The comparison table."""
    best = {number: max((s.mean for row in rows if (s := last_of(row, number))), default=None) for number in NUMBERS}
    lines = []
    for row, look in zip(rows, looks, strict=True):
        cells = []
        for number in NUMBERS:
            value = last_of(row, number)
            cells.append(
                Cell(percent(value), strong=len(rows) > 1 and value is not None and value.mean == best[number])
            )
        images = max(run.images_seen for run in row.counted)
        cells += [
            Cell(
                f"{len(row.counted)}" + (f" of {len(row.runs)}" if len(row.counted) < len(row.runs) else ""),
                _seeds(row),
            ),
            Cell(short(row.cost("parameters"))),
            Cell(small(_scaled(row.cost("forward_flops"), 1e-9))),
            Cell(f"{row.counted[0].step:,}", f"{images:,} images"),
            Cell(small(row.cost("train_exaflop"))),
            Cell(f"{rate.mean:,.0f}" if (rate := row.cost("images_per_second")) else DASH),
            Cell(clock(wall.mean if (wall := row.cost("wall_seconds")) else None)),
        ]
        lines.append(TableRow(row.label, _names(row), look, cells))
    header = ["run", *(f"{number.title} (%)" for number in NUMBERS), "seeds", "parameters", "active GFLOP an image"]
    header += ["steps", "training exaFLOP", "images/s", "wall time"]
    table = Table("The three numbers at the end of each run, and what it cost", header, lines)
    notes = [
        "Runs that differ in nothing but their seed are one row: mean ± standard deviation of a sample over the seeds. "
        "A run that has not come as far as the furthest of its row is in no mean (“1 of 2”).",
        "Active FLOPs are those of one image's forward, two a multiply-add. Training FLOPs are counted as the paper does, one a multiply-add, "
        "times three, over all images seen. Images/s is the median of the reports. Held-out top-1 is that of data.test; few-shot and fine-tuning are means over their sets.",
    ]
    return Section("Results", notes, tables=[table])


def grids(rows: list[Row]) -> Section | None:
    """Heat maps, where the sweep was over two numbers."""
    figures = []
    for number in NUMBERS:
        for grid in grids_of(rows, partial(last_of, number=number)):
            told = [
                f"{grid.y}={y:g}, {grid.x}={x:g}: {percent(spread)}" for (x, y), spread in sorted(grid.cells.items())
            ]
            title = f"{number.title} (%)"
            alt = f"Heat map of {number.title} over {grid.y} and {grid.x}: {'; '.join(told[:40])}."
            figures.append(svg_figure(title, plain(grid.others), alt, draw_grid(grid), "map"))
    return Section("Sweep", groups=[Group("", figures, wide=True)]) if figures else None


def pareto(rows: Sequence[Row], looks: Sequence[Look]) -> Section | None:
    """Quality against training FLOPs and wall time."""
    figures = []
    for number in NUMBERS:
        for cost, unit in (("train_exaflop", "training FLOPs"), ("wall_seconds", "wall time")):
            points = [
                (row, look, at.mean, quality)
                for row, look in zip(rows, looks, strict=True)
                if (at := row.cost(cost)) and (quality := last_of(row, number))
            ]
            if len(points) > 1:
                figures.append(_pareto_figure(points, number, unit))
    if not figures:
        return None
    note = "Filled: on the Pareto front, no other row is as good for less. Bars are one standard deviation over seeds."
    return Section("Quality and cost", [note], _legend(rows, looks), groups=[Group("", figures)])


def _pareto_figure(points: list[tuple[Row, Look, float, Spread]], number: Number, unit: str) -> Figure:
    scale, axis = _unit_of(unit, max(cost for _, _, cost, _ in points))
    front = set(pareto_front([(cost, quality.mean) for _, _, cost, quality in points]))
    drawn = [
        Point(look, cost * scale, Spread(100 * q.mean, q.deviation and 100 * q.deviation, q.count), i in front)
        for i, (_, look, cost, q) in enumerate(points)
    ]
    on_front = sorted((points[i] for i in front), key=lambda point: point[2])
    told = "; ".join(f"{row.label} ({cost * scale:.3g}, {percent(quality)})" for row, _, cost, quality in on_front)
    title = f"{number.title} (%) against {unit}"
    names = "On the front: " + "; ".join(row.label for row, *_ in on_front)
    return svg_figure(title, names, f"{title}. On the Pareto front: {told}.", draw_points(drawn, axis))


def _unit_of(unit: str, most: float) -> tuple[float, str]:
    if unit == "wall time":
        return (1 / 3600, "hours") if most >= 3600 else (1 / 60, "minutes")
    for below, scale, name in ((1e-3, 1e6, "tera"), (1.0, 1e3, "peta")):
        if most < below:
            return scale, f"training {name}FLOP"
    return 1.0, "training exaFLOP"


def curves(rows: Sequence[Row], looks: Sequence[Look]) -> Section:
    """Learning curves."""
    groups, left_out = curve_groups(rows, looks)
    notes = [
        f"Bands are one standard deviation over seeds (left out for more than {BANDS} rows). Thin lines are runs that did not come as far as the others of their row."
    ]
    if left_out:
        notes.append(
            f"{len(left_out)} more metrics are in metrics.jsonl alone: {', '.join(map(plain, left_out[:20]))} ..."
        )
    return Section("Learning curves", notes, _legend(rows, looks), groups=groups)


def best_values(rows: Sequence[Row]) -> Section | None:
    """The best value of every measure of quality, and when."""
    metrics = sorted(
        {
            name
            for row in rows
            for run in row.counted
            for name in run.curves
            if better(name) and source_of(name) != "train"
        }
    )
    lines = []
    for row in rows:
        cells = []
        for metric in metrics:
            found = [run.curves[metric].best(better(metric) or "max") for run in row.counted if metric in run.curves]
            steps = sorted({step for _, step in found})
            at = (
                "" if not steps else f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
            )
            cells.append(Cell(of_metric(metric, spread_of(value for value, _ in found)), at))
        lines.append(TableRow(row.label, "", None, cells))
    if not metrics:
        return None
    header = ["run", *(plain(metric) + (" (%)" if better(metric) == "max" else "") for metric in metrics)]
    return Section(
        "Best values",
        ["Of each run by itself, then the mean over seeds."],
        tables=[Table("Best value of each measure, and the step that had it", header, lines)],
    )


def pictures(rows: Sequence[Row]) -> Section | None:
    """The newest pictures of the first run of each row."""
    groups, notes, room = [], [], IN_ALL
    for row in rows:
        run = row.counted[0]
        found, left_out = thumbnails(run, room)
        notes += left_out
        room -= len(found)
        figures = [
            png_figure(
                plain(one.name),
                f"step {one.step}",
                f"{plain(one.name)} of {plain(run.name)} at step {one.step}",
                one.png,
                one.size,
            )
            for one in found
        ]
        if figures:
            beside = f" ({plain(run.name)})" if len(row.runs) > 1 else ""
            groups.append(Group(row.label + beside, figures, wide=True))
    return Section("Pictures", notes, groups=groups) if groups or notes else None


def settings(rows: list[Row]) -> Section | None:
    """What differs between the runs."""
    found = differences(rows)
    if not found:
        return None
    caption = "Settings that are not the same in all runs"
    if len(rows) <= 8:
        lines = [
            TableRow(plain(key), "", None, [Cell(value, kind="text") for value in values])
            for key, values in found.items()
        ]
        table = Table(caption, ["setting", *(row.label for row in rows)], lines)
    else:
        columns = list(found.values())
        lines = [TableRow(row.label, "", None, [Cell(column[i]) for column in columns]) for i, row in enumerate(rows)]
        table = Table(caption, ["run", *map(plain, found)], lines)
    return Section("Settings", tables=[table])


def states(rows: Sequence[Row], left_out: dict[Path, str]) -> Section:
    """How each run went, and what could not be read."""
    lines = [
        TableRow(plain(run.name), row.label if row.label != plain(run.name) else "", None, _state_cells(run))
        for row in rows
        for run in row.runs
    ]
    header = [
        "run",
        "state",
        "step",
        "starts",
        "ended early",
        "steps lost",
        "broken samples",
        "skipped updates",
        "notes",
    ]
    tables = [Table("The state of each run", header, lines)]
    if left_out:
        other = [TableRow(plain(path), "", None, [Cell(plain(why), kind="text")]) for path, why in left_out.items()]
        tables.append(Table("Left out", ["folder", "why"], other))
    note = "Steps lost were reported by one process and computed again by the next. How a run ended is in its summary.json, start by start."
    return Section("Runs", [note], tables=tables)


def _state_cells(run: RunRead) -> list[Cell]:
    history = run.history
    early = sum(history.interruptions.values()) if history else None
    kinds = ", ".join(f"{plain(kind, 40)}: {count}" for kind, count in history.interruptions.items()) if history else ""
    counts = [run.last(name) for name in ("data/broken_samples", "train/skipped_updates")]
    steps = run.config.get("steps")
    total = f"of {steps:,}" if type(steps) is int else ""
    return [
        Cell(run.state, plain(run.reason, 120), kind="bad" if run.state in ("failed", "killed", "unknown") else ""),
        Cell(f"{run.step:,}", total),
        Cell(f"{history.starts:,}" if history else DASH),
        Cell(DASH if early is None else f"{early:,}", kinds),
        Cell(f"{history.lost_steps:,}" if history else DASH),
        *(Cell(f"{count or 0:,.0f}" if run.curves else DASH) for count in counts),
        Cell("; ".join(plain(note) for note in run.notes), kind="text"),
    ]


def _legend(rows: Sequence[Row], looks: Sequence[Look]) -> list[tuple[str, Look]]:
    return [(row.label, look) for row, look in zip(rows, looks, strict=True)] if len(rows) <= LEGEND else []


def _names(row: Row) -> str:
    names = [plain(run.name) for run in row.runs]
    if names == [row.label]:
        return ""
    return the_first(names, RUNS_BELOW)


def _seeds(row: Row) -> str:
    return "seed " + ", ".join(row.seeds[:RUNS_BELOW]) + (" ..." if len(row.seeds) > RUNS_BELOW else "")


def _scaled(spread: Spread | None, factor: float) -> Spread | None:
    return None if spread is None else spread._replace(mean=factor * spread.mean)
