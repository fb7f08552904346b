"""This file owns a W&B run: what it is sent, and that none of it can stop or delay the training."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import PIL.Image

from softmoe_train.config import Record
from softmoe_train.observe.figures import Figure, Picture
from softmoe_train.observe.judged import better


class WandbConfig(Record):
    """Where a run goes in W&B; `auto` is online when logged in, else offline."""

    mode: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None
    group: str | None
    job_type: str | None
    tags: list[str]
    checkpoints: Literal["none", "reference"]  # reference: an artifact that says where each is; nothing is uploaded


class WandbRun:
    """A W&B run that is fed one row per step, in order; its first failure is one warning, and its last act."""

    def __init__(
        self, library: ModuleType, run: Any, has_through: int, rows: "RowNumbers", warn: Callable[[str], None]
    ) -> None:
        self._library = library
        self._run = run
        self._has_through = has_through
        self._rows = rows
        self._warn = warn
        self._row: dict[str, Any] = {}
        self._refers = True
        self._defined: set[str] = set()
        self._before: dict[str, float] = {}  # the best so far of metrics that W&B had before this process

    def send(self, step: int, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Take a report; a step's row leaves when the next step's begins, so reports of one step share one row.

        Steps that W&B already has are passed over: after a resume they are the same numbers again.
        """
        if self._rows.number(step) <= self._has_through:
            self._before |= {name: self._best_of(name, value) for name, value in metrics.items() if better(name)}
            return
        if self._row and step != self._row["step"]:
            self._flush()
        self._row |= {"step": step, "images_seen": images_seen, **metrics}

    def show(self, step: int, figures: Mapping[str, Figure]) -> None:
        """Take figures of a step; they share the row of its reports."""
        if self._run is not None and self._rows.number(step) > self._has_through:
            self._attempt(lambda run: self._row.update(self._shown(figures)))

    def _shown(self, figures: Mapping[str, Figure]) -> dict[str, Any]:
        def form(figure: Figure) -> Any:
            if isinstance(figure, Picture):
                return self._library.Image(PIL.Image.open(io.BytesIO(figure.png)), caption=figure.caption)
            return self._library.Histogram(np_histogram=(figure.counts, figure.edges))

        return {name: form(figure) for name, figure in figures.items()}

    def reference(self, step: int, place: str) -> None:
        """Tell W&B where the checkpoint of a step is. Where that fails, one warning, and metrics go on."""
        if self._run is None or not self._refers:
            return
        try:
            self._refer(self._run, step, place)
        except Exception as error:  # a driver that is not there, a folder that is gone
            self._refers = False
            self._warn(f"W&B takes no references to checkpoints ({first_line(error)}); it gets no more of them")

    def _refer(self, run: Any, step: int, place: str) -> None:
        artifact = self._library.Artifact(f"checkpoint-{run.id}", type="checkpoint", metadata={"step": step})
        artifact.add_reference(place, name=f"step_{step:08d}", checksum=False)
        run.log_artifact(artifact, aliases=["latest", f"step_{step}"])

    def alert(self, title: str, text: str) -> None:
        """Have W&B tell people."""
        if self._run is not None:
            self._attempt(lambda run: run.alert(title=title, text=text))

    def close(self, *, failed: bool) -> None:
        """Send the last row and end the run, within a bounded time."""
        self._flush()
        if self._run is not None:
            self._attempt(lambda run: self._finish(run, failed))
            self._run = None

    def _finish(self, run: Any, failed: bool) -> None:
        run.finish(exit_code=1 if failed else 0)
        self._library.teardown()  # the file is whole only when the service has gone: finish() returns a moment before

    def _flush(self) -> None:
        row, self._row = self._row, {}
        if row and self._run is not None:
            self._attempt(lambda run: self._log(run, row))

    def _log(self, run: Any, row: dict[str, Any]) -> None:
        judged = {name: value for name, value in row.items() if better(name) is not None}
        for name in judged.keys() - self._defined:
            run.define_metric(name, step_metric="step", summary=f"{better(name)},last")
        self._defined |= judged.keys()
        run.log(row, step=self._rows.number(int(row["step"])), commit=True)
        # What wandb summarises is what this process has sent: a best from before a resume would be lost.
        for name in judged.keys() & self._before.keys():
            self._before[name] = self._best_of(name, judged[name])
            run.summary.update({name: {better(name): self._before[name], "last": judged[name]}})

    def _best_of(self, name: str, value: float) -> float:
        """The better of a value and what was there before; one that is not finite is never better."""
        before = self._before.get(name, math.nan)
        if not math.isfinite(value) or not math.isfinite(before):
            return before if math.isfinite(before) else value
        return max(before, value) if better(name) == "max" else min(before, value)

    def _attempt(self, call: Callable[[Any], None]) -> None:
        try:
            call(self._run)
        except Exception as error:  # whatever W&B raises, the training is worth more
            self._run = None
            self._warn(
                f"W&B stopped taking metrics ({first_line(error)}); metrics.jsonl has them all, training goes on"
            )


class RowNumbers:
    """W&B's own number of the row of a step, which must grow for ever: the step, until a rollback.

    What a rollback takes back stays in W&B as it was, and the steps from there on come again in rows above it. All rows of
    one part of a run, from a rollback's first step to the next's, are equally far from their steps.
    """

    def __init__(self, taken_back: Sequence[tuple[int, int]]) -> None:
        self._parts = [(0, 0)]  # (first step, how far its rows are above the steps)
        highest = 0  # that W&B may have
        for first, last in taken_back:
            highest = max(highest, self.number(last))
            self._parts = [part for part in self._parts if part[0] < first] + [(first, highest + 1 - first)]

    def number(self, step: int) -> int:
        """The number of a step's row in the newest part that has it."""
        return step + next(above for first, above in reversed(self._parts) if first <= step)


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
