"""This file owns what the terminal sees of a report: one table, and what was left out."""

import sys

import rich.box
import rich.console
import rich.table
import rich.text

from softmoe_train.observe.judged import NUMBERS
from softmoe_train.plain import plain
from softmoe_train.report.make import Report
from softmoe_train.report.sections import last_of
from softmoe_train.report.words import DASH, clock, percent, short, small

MOST = 60  # rows


def print_report(report: Report, out: str) -> None:
    """The three numbers of each row and its cost; then where the rest is."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    names = [
        "run",
        *(f"{number.title} %" for number in NUMBERS),
        "seeds",
        "parameters",
        "exaFLOP",
        "images/s",
        "time",
        "state",
    ]
    for name in names:
        table.add_column(name, justify="left" if name in ("run", "state") else "right", overflow="fold")
    for row in report.rows[:MOST]:
        rate, wall = row.cost("images_per_second"), row.cost("wall_seconds")
        table.add_row(
            rich.text.Text(row.label),
            *(percent(last_of(row, number)) for number in NUMBERS),
            str(len(row.counted)),
            short(row.cost("parameters")),
            small(row.cost("train_exaflop")),
            DASH if rate is None else f"{rate.mean:,.0f}",
            clock(None if wall is None else wall.mean),
            ", ".join(dict.fromkeys(run.state for run in row.runs)),
        )
    console = rich.console.Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if len(report.rows) > MOST:
        print(f"and {len(report.rows) - MOST} more rows")
    for run in report.runs:
        for note in run.notes:
            print(f"{plain(run.folder)}: {plain(note)}", file=sys.stderr)
    for path, why in report.left_out.items():
        print(f"left out: {plain(path)}: {plain(why)}", file=sys.stderr)
    print(f"report  {plain(out)}", flush=True)
