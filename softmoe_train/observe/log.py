"""This file owns the run's log: where a report goes (metrics.jsonl first, then the console, summary.json and W&B)."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import field_validator

from softmoe_train.config import Record
from softmoe_train.observe.console import Console, ProgressKind, build_console
from softmoe_train.observe.figures import Figure, Picture
from softmoe_train.observe.run_files import MetricsFile, Summary, replace_bytes
from softmoe_train.observe.startup import Startup
from softmoe_train.observe.wandb_run import WandbConfig, WandbRun
from softmoe_train.observe.wandb_start import start_wandb


class ObserveConfig(Record):
    """How often a run reports (in steps), and where to besides its metrics file."""

    every: int
    progress: ProgressKind
    wandb: WandbConfig

    @field_validator("every")
    @classmethod
    def _positive(cls, every: int) -> int:
        if every < 1:
            raise ValueError(
                f"observe.every={every} must be at least 1 step; use 20, or a large number for few reports"
            )
        return every


class SilentLog:
    """The log of every rank but the first: it takes the same calls and does nothing."""

    def __init__(self, wandb_id: str) -> None:
        self.wandb_id = wandb_id

    def report(self, step: int, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Take a report."""

    def report_late(self, step: int, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Take a report of a step that was told before."""

    def show(self, step: int, figures: Mapping[str, Figure]) -> None:
        """Take figures, by the name of what they show."""

    def saved(self, step: int, place: str) -> None:
        """Take note that the checkpoint of a step is complete, and where it is."""

    def message(self, text: str) -> None:
        """Take a line for people."""

    def record(self, name: str, text: str, facts: Mapping[str, Any]) -> None:
        """Take what is worth keeping of this process."""

    def first_step(self) -> None:
        """Take note that this process has made its first step."""

    def warn(self, text: str) -> None:
        """Take a warning."""

    def alert(self, title: str, text: str) -> None:
        """Take what people should hear of although nobody watches."""

    def ended(self, reason: str) -> None:
        """Note why the run ends where `close` cannot be waited for."""

    def close(self, reason: str, *, failed: bool) -> None:
        """End the log."""


class RunLog(SilentLog):
    """The log of rank 0. metrics.jsonl is the truth; all else can be lost or late without harm."""

    def __init__(
        self,
        wandb_id: str,
        metrics: MetricsFile,
        summary: Summary,
        console: Console,
        wandb_run: WandbRun | None,
        startup: Startup | None,
        make_folder: Callable[[], object],
        folder: Path,
        *,
        refers: bool,
    ) -> None:
        super().__init__(wandb_id)
        self._refers = refers  # W&B is told of checkpoints
        self._folder = folder
        self._metrics = metrics
        self._summary = summary
        self._console = console
        self._wandb_run = wandb_run
        self._startup = startup
        self._make_folder = make_folder
        self._trouble = ""  # why the files could not be written when that was tried last
        self._started = time.perf_counter()

    def report(self, step: int, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Write, print and send one report; one step may have several. Values are read to the host here.

        Raises ValueError for a metric named `step` or `images_seen`, which are on every line already.
        """
        taken = {"step", "images_seen"} & set(metrics)
        if taken:
            raise ValueError(
                f"metrics hold {sorted(taken)}, which every report carries; name it <source>/<set>/<measure>"
            )
        values = {name: float(value) for name, value in metrics.items()}
        self._metrics.append(step, images_seen, values)
        self._write(ended=None)
        self._console.report(step, values)
        if self._wandb_run is not None:
            self._wandb_run.send(step, images_seen, values)

    def report_late(self, step: int, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Write what became known of a step after W&B had its row: there it is a row of its own, of the same `step`."""
        self._metrics.append(step, images_seen, dict(metrics))
        self._write(ended=None)
        if self._wandb_run is not None:
            self._wandb_run.send_late(step, images_seen, metrics)

    def show(self, step: int, figures: Mapping[str, Figure]) -> None:
        """Keep each picture as pictures/NAME/step_STEP.png of the run folder; W&B gets both kinds."""
        if self._wandb_run is not None and figures:
            self._wandb_run.show(step, figures)
        for name, figure in figures.items():
            if isinstance(figure, Picture):
                self._keep(name, step, figure)

    def _keep(self, name: str, step: int, picture: Picture) -> None:
        path = self._folder / "pictures" / name / f"step_{step:08}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(path, picture.png)
        except OSError as error:  # a picture is worth no run
            self.warn(f"the picture {path} could not be written: {error}")

    def saved(self, step: int, place: str) -> None:
        """Have W&B know of a checkpoint, where the settings want that."""
        if self._wandb_run is not None and self._refers:
            self._wandb_run.reference(step, place)

    def message(self, text: str) -> None:
        """Print a line for people."""
        self._console.message(text)

    def record(self, name: str, text: str, facts: Mapping[str, Any]) -> None:
        """Print a line for people, and keep its facts in this process's entry of summary.json."""
        self._console.message(text)
        self._summary.record(name, facts)
        self._write(ended=None)

    def first_step(self) -> None:
        """Tell how long the start took; on a GPU the step may be under way still."""
        if self._startup is None:
            return
        startup, self._startup = self._startup, None  # a start ends once
        startup.done("first step")
        self.record("startup", str(startup), {part: round(seconds, 2) for part, seconds in startup.parts.items()})

    def warn(self, text: str) -> None:
        """Print a warning; it shows at `progress=off` too."""
        self._console.warn(text)

    def alert(self, title: str, text: str) -> None:
        """Print a warning, and have W&B send it to whom its settings say."""
        self.warn(f"{title}: {text}")
        if self._wandb_run is not None:
            self._wandb_run.alert(title, text)

    def ended(self, reason: str) -> None:
        """Note in the summary why the run ends; nothing is closed, and W&B is not told."""
        self._write(ended=reason)

    def close(self, reason: str, *, failed: bool) -> None:
        """End the log, with why the run ended; `failed` is how W&B shows it.

        Call it in a `finally`: it gives the terminal its cursor back. The files are complete before W&B is waited for.
        """
        try:
            self.ended(reason)
        finally:
            self._console.close()
            if self._wandb_run is not None:
                self._wandb_run.close(failed=failed)

    def _write(self, ended: str | None) -> None:
        """Bring the files up to date. A disk that does not take them is one warning, and they are tried again at the next report.

        Raises BlockingIOError where the folder has become another run's.
        """
        try:
            if not self._metrics.is_there:
                self._make_folder()
                self._metrics.begin()
                self.alert(
                    "run folder",
                    f"the run folder was deleted or replaced: from step {self._metrics.last.get('step')} on it is written anew",
                )
            self._metrics.write()
            seconds = time.perf_counter() - self._started
            self._summary.write(self._metrics.last, seconds, wandb_id=self.wandb_id, ended=ended)
        except BlockingIOError:
            raise
        except OSError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                self.alert(
                    "run folder",
                    f"metrics.jsonl and summary.json cannot be written ({error}); training goes on, and they are tried again",
                )
            if ended is not None:
                self.alert("run folder", f"{len(self._metrics.unwritten)} reports are not in metrics.jsonl")
        else:
            if self._trouble:
                self.message("metrics.jsonl and summary.json are written again, and lack nothing")
            self._trouble = ""


def build_log(
    config: ObserveConfig,
    run_dir: Path,
    *,
    name: str,
    run_config: Mapping[str, Any],
    total_steps: int,
    main: bool,
    wandb_id: str | None,
    resume_step: int,
    startup: Startup | None = None,
    make_folder: Callable[[], object] | None = None,
    taken_back: Sequence[tuple[int, int]] = (),
    amends: bool = False,
) -> SilentLog:
    """The log of this process: a silent one unless `main`.

    `resume_step` is the step of the checkpoint that was loaded, 0 from scratch: metrics.jsonl is cut back to it.
    `wandb_id` is the one in that checkpoint; None makes one up (on `main` only: elsewhere it stays empty).
    `make_folder` makes the run folder where it was deleted in mid-run, and raises BlockingIOError where another run has it.
    `taken_back` are the first and last step that each rollback of the run took back, in their order. `amends`: the run has ended, and its
    records are added to.
    """
    if not main:
        return SilentLog(wandb_id or "")
    make_folder = make_folder or (lambda: run_dir.mkdir(parents=True, exist_ok=True))
    make_folder()
    summary = Summary(run_dir / "summary.json", resume_step, amends=amends)
    # The summary's id is for a run that was killed before its first checkpoint: it is the same W&B run still.
    wandb_id = wandb_id or summary.earlier_wandb_id or secrets.token_hex(8)
    console = build_console(config.progress, total_steps, resume_step)
    metrics = MetricsFile(run_dir / "metrics.jsonl", resume_step)
    if metrics.broken:
        console.warn(f"metrics.jsonl had {metrics.broken} torn or foreign lines; they are left out")
    if summary.broken:
        console.warn(f"summary.json cannot be read ({summary.broken}): wall time and history start anew")
    summary.write(metrics.last, 0.0, wandb_id=wandb_id, ended=None)
    wandb_run = start_wandb(
        config.wandb,
        run_dir,
        wandb_id=wandb_id,
        name=name,
        run_config=run_config,
        written=metrics.kept,
        taken_back=taken_back,
        warn=console.warn,
    )
    refers = config.wandb.checkpoints == "reference"
    return RunLog(wandb_id, metrics, summary, console, wandb_run, startup, make_folder, run_dir, refers=refers)
