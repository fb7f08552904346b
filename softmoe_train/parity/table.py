"""This file owns what a proof says: the table for people, the JSON for programs, the verdict."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import rich.box
import rich.console
import rich.table

from softmoe_train.parity.measure import Row

WIDTH = 100  # columns
SAY_SECONDS = 10.0


def told_by(main: bool) -> Callable[[str], None]:
    """A voice for progress on standard error: silent but on rank 0, and there at most a line in ten seconds."""
    begun = time.monotonic()
    last = begun

    def say(what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if main and now - last >= SAY_SECONDS:
            print(f"{now - begun:5.0f} s  {what}", file=sys.stderr, flush=True)
            last = now

    return say


def print_table(title: str, rows: list[Row]) -> None:
    """A line per measure with its worst place, no wider than 100 columns."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("relative to one process")
    table.add_column("error", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("")
    table.add_column("worst", overflow="fold")
    for row in rows:
        error = row.errors[row.worst]
        table.add_row(
            row.what, f"{error:.1e}", f"{row.tolerance:.0e}", "FAILS" if row.failing else "holds", _shown(row.worst)
        )
    print(f"{title}\n")
    rich.console.Console(file=sys.stdout, width=WIDTH, highlight=False).print(table)
    print()


def verdict(rows: list[Row]) -> str:
    """One sentence, and where the layout fails the first offender: of the first row, what backward reaches first."""
    bad = [row for row in rows if row.failing]
    if not bad:
        measured = sum(len(row.errors) for row in rows)
        return f"parity holds: {measured} comparisons in {len(rows)} rows"
    # A tensor's name says where to look, a number does not.
    first = next((row for row in bad if row.failing[0]), bad[0])
    name = first.failing[0]
    said = f"parity FAILS: {first.what} {_shown(name)}".rstrip()
    said += f" is off by {first.errors[name]:.1e}, allowed {first.tolerance:.0e}"
    if len(first.failing) > 1:
        others = f"{len(first.failing)} of {len(first.errors)} fail; this one backward reaches first"
        said += f"\n{others}: the cause is there or just behind it"
    rest = len(bad) - 1
    return said + (f"\n{rest} other row{'s fail' if rest > 1 else ' fails'} too" if rest else "")


def write_json(path: str, title: str, rows: list[Row]) -> None:
    """Every error by name, for programs; an error that is no number is null."""
    document = {
        "holds": not any(row.failing for row in rows),
        "layout": title,
        "rows": [
            {
                "what": row.what,
                "error": _number(row.errors[row.worst]),
                "tolerance": row.tolerance,
                "worst": row.worst,
                "failing": row.failing,
                "errors": {name: _number(error) for name, error in row.errors.items()},
            }
            for row in rows
        ],
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n")


def _shown(name: str) -> str:
    return name.removeprefix("optimizer.")


def _number(error: float) -> float | None:
    return error if math.isfinite(error) else None
