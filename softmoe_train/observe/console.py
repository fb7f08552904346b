"""This file owns what a run prints: one short line per report, and on a terminal a progress bar below them."""

import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Literal, TextIO

import rich.console
import rich.progress

from softmoe_train.observe.judged import FEWSHOT, MEASURED, source_of

ProgressKind = Literal["auto", "bar", "plain", "off"]
SHOWN = ("train", *MEASURED)  # the rest is in metrics.jsonl: too many for a line
MOST = 6  # values of an evaluation


def format_value(value: float) -> str:
    """At most nine characters: four decimals where they say something, else an exponent."""
    if value == 0 or (math.isfinite(value) and 1e-3 <= abs(value) < 1e4):
        return f"{value:.4f}"
    return f"{value:.2e}" if math.isfinite(value) else str(value)


def format_eta(seconds: float | None) -> str:
    """Hours, minutes and seconds to go, such as 0:00:12, or `-` while unknown."""
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))


def format_report(step: int, total_steps: int, metrics: Mapping[str, float], eta: float | None) -> str:
    """One line such as `step  20/660  loss 1.2340  top1 0.3100  1,234 images/s  eta 0:00:12`.

    `data 12 %` behind the rate is the part of the time that waited for data, from one percent on. An evaluation of many values shows
    the first, of few-shot those of 10 shots, and says how many more there are.
    """
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    shown = _shown(metrics)
    parts += [f"{name.removeprefix('train/')} {format_value(metrics[name]):<7}".rstrip() for name in shown]
    more = sum(source_of(name) in MEASURED for name in metrics.keys() - set(shown))
    if more:
        parts.append(f"and {more} more")
    rate = metrics.get("perf/images_per_second")
    if rate is not None:
        parts.append(f"{rate:>6,.0f} images/s")
        waited = metrics.get("perf/data_share", 0.0)
        if waited >= 0.01:
            parts.append(f"data {100 * waited:.0f} %")
        parts.append(f"eta {format_eta(eta)}")
    return "  ".join(parts)


def _shown(metrics: Mapping[str, float]) -> list[str]:
    """The metrics of a report that have a place in its line."""
    shown = list(filter(is_shown, metrics))
    judging = [name for name in shown if source_of(name) == FEWSHOT.source and name.endswith(f"/{FEWSHOT.measure}")]
    shown = [name for name in shown if source_of(name) != FEWSHOT.source or name in judging or not judging]
    measured = [name for name in shown if source_of(name) in MEASURED]
    return [name for name in shown if name not in measured[MOST:]]


def is_shown(name: str) -> bool:
    """Whether a metric is for the console."""
    return source_of(name) in SHOWN


class Console:
    """Prints reports and messages, above a bar where there is one; `bar=False, lines=False` prints warnings only."""

    def __init__(self, stream: TextIO, total_steps: int, resume_step: int, *, bar: bool, lines: bool) -> None:
        self._stream = stream
        self._lines = lines
        self._total_steps = total_steps
        self._paced_from = (resume_step, time.perf_counter())
        self._reported = False
        self._progress: rich.progress.Progress | None = None
        if bar:
            self._progress = start_bar(stream)
            self._task = self._progress.add_task("", total=total_steps, completed=resume_step, facts="")

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print one report and move the bar."""
        eta = self._seconds_to_go(step)
        if self._lines and any(is_shown(name) or name.startswith("perf/") for name in metrics):
            self._print(format_report(step, self._total_steps, metrics, eta))
        if self._progress is not None:
            facts = []
            if "train/loss" in metrics:
                facts.append(f"loss {format_value(metrics['train/loss'])}")
            if "perf/images_per_second" in metrics:
                facts.append(f"{metrics['perf/images_per_second']:,.0f} images/s")
            facts.append(f"eta {format_eta(eta)}")
            if len(facts) > 1:  # a report of an evaluation alone leaves the bar's numbers as they are
                self._progress.update(self._task, completed=step, facts="  ".join(facts))
                self._progress.refresh()

    def message(self, text: str) -> None:
        """Print a line for people."""
        if self._lines:
            self._print(text)

    def warn(self, text: str) -> None:
        """Print a warning, also where reports are off."""
        self._print(f"warning: {text}")

    def close(self) -> None:
        """Leave the terminal as it was found, the bar's last state standing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str) -> None:
        if self._progress is not None:
            # The bar's own console moves the bar down; any other way of printing would be written into it.
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _seconds_to_go(self, step: int) -> float | None:
        # Paced from the first report on, because compilation and cold caches make the steps before it slow.
        now = time.perf_counter()
        paced_step, paced_time = self._paced_from
        if step <= paced_step:
            return None
        eta = (self._total_steps - step) * (now - paced_time) / (step - paced_step)
        if not self._reported:
            self._paced_from, self._reported = (step, now), True
        return eta


def start_bar(stream: TextIO) -> rich.progress.Progress:
    """A bar that is drawn at reports only: no thread of its own beside the training loop."""
    progress = rich.progress.Progress(
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[facts]}"),
        console=rich.console.Console(file=stream),
        auto_refresh=False,
    )
    progress.start()
    return progress


def build_console(kind: ProgressKind, total_steps: int, resume_step: int) -> Console:
    """The console a run asked for, on standard output; `auto` draws a bar on a terminal and prints lines elsewhere."""
    stream = sys.stdout
    match kind:
        case "auto":
            return Console(stream, total_steps, resume_step, bar=stream.isatty(), lines=True)
        case "bar":
            return Console(stream, total_steps, resume_step, bar=True, lines=True)
        case "plain":
            return Console(stream, total_steps, resume_step, bar=False, lines=True)
        case "off":
            return Console(stream, total_steps, resume_step, bar=False, lines=False)
