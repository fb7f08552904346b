"""This file owns what the terminal sees of a sweep under way: a bar for each point that runs, or a line now and then."""

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import rich.console
import rich.progress

from softmoe_train.plain import plain

CALM_SECONDS = 60.0  # between two lines that tell nothing but progress


class Running(NamedTuple):
    """A point that runs, and how far it has reported."""

    label: str
    step: int
    steps: int


class HasState(Protocol):
    """What became of a point."""

    @property
    def state(self) -> str: ...


class Show:
    """Lines for what happens, and below them the bars, where this is a terminal."""

    def __init__(self) -> None:
        self._progress: rich.progress.Progress | None = None
        self._bars: dict[str, rich.progress.TaskID] = {}
        self._total = 0
        self._told = time.monotonic()

    @contextmanager
    def over(self, total: int) -> Iterator[None]:
        """Show the progress of this many points until the end of the block."""
        self._total, self._told, self._bars = total, time.monotonic(), {}
        if sys.stdout.isatty():
            self._progress = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[facts]}", markup=False),
                console=rich.console.Console(file=sys.stdout),
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._progress.start()
        try:
            yield
        finally:
            if self._progress is not None:
                self._progress.stop()
                self._progress = None

    def tell(self, text: str) -> None:
        """A line for people."""
        self._told = time.monotonic()
        if self._progress is not None:
            self._progress.console.print(plain(text), markup=False, highlight=False, soft_wrap=True)
        else:
            print(plain(text), flush=True)

    def update(self, running: Collection[Running], ended: Collection[HasState], waiting: int) -> None:
        """Show who runs at what step, how many points have ended how, how many wait."""
        done = sum(one.state == "complete" for one in ended)
        failed = sum(one.state == "failed" for one in ended)
        facts = ", ".join([*([f"{failed} failed"] if failed else []), f"{waiting} to do"])
        if self._progress is not None:
            self._draw(running, done, facts)
        elif time.monotonic() - self._told >= CALM_SECONDS:
            now = "; ".join(f"{one.label} at step {one.step} of {one.steps}" for one in running)
            self.tell(f"{done} of {self._total} complete, {facts}" + (f"; {now}" if now else ""))

    def _draw(self, running: Collection[Running], done: int, facts: str) -> None:
        assert self._progress is not None
        labels = {one.label for one in running}
        if "" not in self._bars:
            self._bars[""] = self._progress.add_task("points", total=self._total, facts="")
        for label in [label for label in self._bars if label and label not in labels]:
            self._progress.remove_task(self._bars.pop(label))
        for one in running:
            if one.label not in self._bars:
                self._bars[one.label] = self._progress.add_task(plain(one.label, 60), total=one.steps, facts="")
            self._progress.update(self._bars[one.label], completed=one.step)
        self._progress.update(self._bars[""], completed=done, facts=facts)
        self._progress.refresh()
