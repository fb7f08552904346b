"""This file owns what a person sees of a measurement: progress while it runs, one table at its end."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.progress
import rich.table

from softmoe_train.bench.rounds import Spread

LINE_SECONDS = 10.0


class Outcome(NamedTuple):
    """What was measured, for people (a table, and what to know of it) and for programs (plain values)."""

    title: str
    columns: list[str]
    cells: list[list[str]]
    notes: list[str]
    rows: list[dict[str, Any]]


@contextmanager
def progress(total: int, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """A bar of `total` rounds on standard error, moved by calls that say what is measured; it is drawn between rounds only.

    Nothing remains of it. Where no terminal watches, a plain line in ten seconds takes its place.
    """
    watched = sys.stderr.isatty()
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(file=sys.stderr),
        auto_refresh=False,  # a thread that draws would be measured too
        transient=True,
        disable=not (shown and watched),
    )
    with bar:
        task = bar.add_task("", total=total)
        done, told = 0, time.monotonic()

        def advance(what: str) -> None:
            nonlocal done, told
            done += 1
            bar.update(task, advance=1, description=what)
            bar.refresh()
            if shown and not watched and time.monotonic() - told >= LINE_SECONDS:
                told = time.monotonic()
                print(f"round {done} of {total}: {what}", file=sys.stderr, flush=True)

        yield advance


def print_outcome(outcome: Outcome, sentence: str) -> None:
    """One table, never broken over lines, numbers to the right; then what a reader must know of it."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in outcome.columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in outcome.cells:
        table.add_row(*row)
    width = rich.console.Console(file=sys.stdout, width=1000).measure(table).maximum
    print(f"{outcome.title}\n{sentence}\n")
    rich.console.Console(file=sys.stdout, width=max(width, 80), highlight=False).print(table)
    print(*["", *outcome.notes] if outcome.notes else [], sep="\n", flush=True)


def milliseconds(spread: Spread) -> str:
    """Median and quartiles, as in `12.3 (12.1 - 12.9)`."""
    size = abs(spread.median)  # a part of a step, which is a difference, can be below zero
    digits = 0 if size >= 1 else 1 if size >= 0.1 else 2 if size >= 0.01 else 3
    low, median, high = (f"{1e3 * value:,.{digits}f}" for value in spread)
    return f"{median} ({low} - {high})"


def ratio(spread: Spread) -> str:
    """A ratio's median and quartiles."""
    return f"{spread.median:.2f} ({spread.low:.2f} - {spread.high:.2f})"


def gigaflops(number: float) -> str:
    """FLOPs in GFLOP, three digits."""
    return f"{number / 1e9:,.0f}" if number >= 1e11 else f"{number / 1e9:.3g}"


def mebibytes(number: float) -> str:
    """Bytes in MiB, with a decimal where it says something."""
    return f"{number / 2**20:,.1f}" if number < 100 * 2**20 else f"{number / 2**20:,.0f}"
