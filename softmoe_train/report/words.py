"""This file owns how a report writes numbers."""

from datetime import timedelta

from softmoe_train.observe.judged import better
from softmoe_train.report.draw import short_number
from softmoe_train.report.rows import Spread

DASH = "-"  # nothing was measured


def percent(spread: Spread | None, deviation: bool = True) -> str:
    """A share as 97.4 ± 0.3."""
    if spread is None:
        return DASH
    beside = f" ± {100 * spread.deviation:.2f}" if deviation and spread.deviation is not None else ""
    return f"{100 * spread.mean:.2f}{beside}"


def of_metric(metric: str, spread: Spread | None) -> str:
    """A value in the unit that its metric is shown in."""
    if better(metric) == "max":
        return percent(spread)
    if spread is None:
        return DASH
    return f"{spread.mean:.4g}" + ("" if spread.deviation is None else f" ± {spread.deviation:.2g}")


def short(spread: Spread | None) -> str:
    """Three digits and a unit."""
    return DASH if spread is None else short_number(spread.mean)


def small(spread: Spread | None) -> str:
    """Three digits, with an exponent where it is needed."""
    return DASH if spread is None else f"{spread.mean:.3g}"


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    return DASH if seconds is None else str(timedelta(seconds=round(seconds)))
