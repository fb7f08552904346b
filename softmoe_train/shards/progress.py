"""This file owns what a long verb shows while it works: a bar on a terminal, and elsewhere a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from softmoe_train.observe.console import ProgressKind, format_eta, start_bar

T = TypeVar("T")

_CALM_SECONDS = 30.0  # between two lines
_DRAW_SECONDS = 0.1  # between two states of the bar


def shown_progress(
    done: Iterable[tuple[T, int]], *, what: str, unit: str, total: int | None, kind: ProgressKind, before: int = 0
) -> Iterator[T]:
    """The first of each pair as they come, showing the sum of the second; `before` was there already."""
    bar = kind == "bar" or (kind == "auto" and sys.stdout.isatty())
    count, begin = before, time.perf_counter()
    progress = start_bar(sys.stdout) if bar else None
    task = progress.add_task("", total=total, completed=before, facts=what) if progress is not None else None
    told = drawn = begin
    try:
        for result, number in done:
            count += number
            now = time.perf_counter()
            rate = (count - before) / max(now - begin, 1e-9)
            eta = None if total is None or not rate else (total - count) / rate
            facts = f"{what}  {rate:,.0f} {unit}/s" + ("" if eta is None else f"  eta {format_eta(eta)}")
            if progress is not None and task is not None and now - drawn > _DRAW_SECONDS:
                drawn = now
                progress.update(task, completed=count, facts=facts)
                progress.refresh()
            elif progress is None and kind != "off" and now - told > _CALM_SECONDS:
                told = now
                of = "" if total is None else f" of {total:,}"
                print(f"{facts}  {count:,}{of} {unit}", flush=True)
            yield result
    finally:
        if progress is not None and task is not None:
            progress.update(task, completed=count)
            progress.stop()
