"""This file owns the points of a sweep as jobs of SLURM: submitted through submitit, found again in the queue, and what became of each.

The name of a job says which point of which sweep it is, so whoever comes after a kill finds it, whatever the ledger could still be told.
"""

import hashlib
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmoe_train.at_end import is_complete
from softmoe_train.config import ConfigError
from softmoe_train.faults.stop import ASKING
from softmoe_train.sweep.job_end import JobEnd, end_of
from softmoe_train.sweep.ledger import Ledger
from softmoe_train.sweep.outcome import FOR_GOOD, Outcome, given_up, log_of, step_of_run
from softmoe_train.sweep.points import Point
from softmoe_train.sweep.show import Running, Show
from softmoe_train.sweep.slurm_queue import Queued, QueueError, queue
from softmoe_train.sweep.submission import FOLDER, keep_private, submit
from softmoe_train.sweep.submitted import SubmittedPoint

QUICK_SECONDS, CALM_SECONDS = 1.0, 10.0  # between two looks at the queue
QUICK_FOR = 60.0  # seconds after something has happened
REFUSALS = 30  # in a row, at the calm pace, with nothing in the queue: five minutes


@dataclass
class Job:
    """A job of a point, from which step on."""

    point: Point
    number: str
    since: int
    waits: bool = True


class SlurmJobs:
    """Submits what is not complete and waits for it. A signal ends the waiting, and the jobs go on: the same command finds them."""

    def __init__(self, verb: str, folder: Path, settings: dict[str, Any], retries: int, show: Show) -> None:
        self._verb = verb
        self._folder = folder.resolve()  # the same through every link
        self._settings = settings
        self._retries = retries
        self._show = show
        self._asked: signal.Signals | None = None
        self._active: dict[str, Job] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._happened = time.monotonic()
        self._began = False  # whether a job of this start is or was there
        self._refusals = 0  # in a row, while no job was there
        self._again = 0.0  # when what was refused may be submitted again
        self._unseen = False  # whether what was refused may be in the queue all the same
        self._said: dict[str, str] = {}  # last, of a point, or of SLURM ("")

    def run(self, points: Sequence[Point], ledger: Ledger) -> list[Outcome]:
        """Have a job for each point that is not complete; the outcomes come in the order of the points."""
        keep_private(self._folder / FOLDER)
        try:
            queued = queue()
        except QueueError as error:
            raise ConfigError([f"hydra/launcher=submitit_slurm: SLURM does not answer here: {error}"]) from None
        waiting: list[Point] = []
        for point in points:
            self._find(point, queued, ledger, waiting)
        self._began = bool(self._active)
        with self._hearing(), self._show.over(len(points)):
            while self._asked is None and (self._active or (waiting and self._refusals < REFUSALS)):
                self._submit(waiting, ledger)
                self._show.update(self._running(), self._outcomes.values(), len(waiting))
                self._wait()
                self._look(waiting, ledger)
        for job in self._active.values():
            state, doing = ("pending", "waits") if job.waits else ("running", "runs")
            self._outcomes[job.point.label] = Outcome(job.point, state, None, f"{doing} as job {job.number}")
        why = "SLURM refused it again and again" if self._asked is None else "the sweep was asked to end"
        for point in waiting:
            self._outcomes[point.label] = Outcome(point, "to do", None, f"not submitted: {why}")
        if waiting and self._asked is None:
            self._show.tell(f"{len(waiting)} points were not submitted: {why}; the same command goes on with them")
        if self._active:
            numbers = " ".join(job.number for job in self._active.values())
            self._show.tell(
                f"{len(self._active)} jobs go on, and the same command finds them; to end them: scancel {numbers}"
            )
        return [self._outcomes[point.label] for point in points]

    def _find(self, point: Point, queued: list[Queued], ledger: Ledger, waiting: list[Point]) -> None:
        """What there is of a point: it is complete, its job is in the queue, or its last one is over."""
        label = point.label
        last = next((one for one in reversed(ledger.of(label, "started")) if "job" in one), None)
        job = self._queued(point, None if last is None else str(last["job"]), queued)
        over = last is None or any(one.get("job") == last["job"] for one in ledger.of(label, "ended"))
        if job is None and last is not None and not over:
            number = str(last["job"])
            if self._close(Job(point, number, 0), ledger) is None:
                job = Queued(number, "PENDING", "")
        if job is not None:
            if last is None or last["job"] != job.number:  # a kill came before its submission was noted
                ledger.start(point, job=job.number)
            elif last["digest"] != point.digest:
                raise ConfigError(
                    [f"{label}: job {job.number} runs it with other settings; wait for it, or scancel {job.number}"]
                )
            self._active[label] = Job(point, job.number, step_of_run(point), job.waits)
            self._show.tell(f"{label}: {'waits' if job.waits else 'runs'} already as job {job.number}")
            return
        if is_complete(point.config):
            self._outcomes[label] = Outcome(point, "complete", None, "complete already")
        elif (failed := given_up(point, ledger, self._retries)) is not None:
            self._outcomes[label] = failed
        else:
            waiting.append(point)

    def _submit(self, waiting: list[Point], ledger: Ledger) -> None:
        """Submit as many as may be in the queue at once, but none whose folder another process holds.

        After a refusal, which may be of a moment (a limit of the queue, a timeout), it is tried again at the calm pace.
        """
        if self._unseen or time.monotonic() < self._again:
            return
        for point in list(waiting):
            if self._asked is not None or len(self._active) >= int(self._settings["array_parallelism"]):
                return
            if (holder := point.holder()) is not None:
                self._say(f"{point.label}: in use by {holder}, so it waits for that to end", point.label)
                continue
            if is_complete(point.config):  # whoever held it
                waiting.remove(point)
                self._outcomes[point.label] = Outcome(point, "complete", None, "complete")
                continue
            since = step_of_run(point)
            try:
                number = submit(self._submitted(point), self._name(point), self._folder / FOLDER, self._settings)
            except ConfigError as error:
                self._refused(point, error)
                return
            waiting.remove(point)
            attempt = self._start(point, number, since, ledger)
            again = f" (attempt {attempt})" if attempt > 1 else ""
            went = f", goes on from about step {since}" if since else ""
            self._show.tell(f"{point.label}: submitted as job {number}{again}{went}")

    def _start(self, point: Point, number: str, since: int, ledger: Ledger) -> int:
        attempt = ledger.start(point, job=number)
        self._active[point.label] = Job(point, number, since)
        self._began, self._refusals = True, 0
        self._happened = time.monotonic()
        return attempt

    def _refused(self, point: Point, error: ConfigError) -> None:
        """A submission that SLURM did not take: the end where nothing has begun, and else the point waits."""
        if not self._began:
            raise error
        self._refusals = 0 if self._active else self._refusals + 1
        self._again, self._unseen = time.monotonic() + CALM_SECONDS, True
        self._say(f"{point.label}: {'; '.join(error.problems)}; it is tried again", point.label)

    def _look(self, waiting: list[Point], ledger: Ledger) -> None:
        """See which jobs have left the queue, and what came of them."""
        try:
            queued = queue()
        except QueueError as error:
            self._say(f"SLURM does not answer, so nothing is known of the jobs: {error}")
            return
        self._said.pop("", None)
        self._unseen = False
        for point in list(waiting):
            if (there := self._queued(point, None, queued)) is not None:  # SLURM took it, and the answer was lost
                waiting.remove(point)
                self._start(point, there.number, step_of_run(point), ledger)
                self._show.tell(f"{point.label}: is job {there.number} all the same")
        for label, job in list(self._active.items()):
            now = self._queued(job.point, job.number, queued)
            if now is not None:
                if job.waits and not now.waits:
                    self._show.tell(f"{label}: runs as job {job.number}")
                job.waits = now.waits
                continue
            end = self._close(job, ledger)
            if end is None:
                continue
            outcome, goes_on = end
            del self._active[label]
            self._happened = time.monotonic()
            failed_once = outcome.state == "failed" and outcome.code not in FOR_GOOD
            ran_out = goes_on and step_of_run(job.point) > job.since
            if ran_out or (failed_once and given_up(job.point, ledger, self._retries) is None):
                waiting.append(job.point)
                self._show.tell(f"{label}: {outcome.reason}; it is submitted again")
                continue
            self._outcomes[label] = outcome
            see = "" if outcome.state == "complete" else f"; see {log_of(job.point)}"
            self._show.tell(f"{label}: {outcome.reason}{see}")

    def _close(self, job: Job, ledger: Ledger) -> JobEnd | None:
        """What became of a job that has left the queue, noted in the ledger; None where SLURM says that it lives."""
        end = end_of(job.point, job.number, self._folder / FOLDER)
        if end is None:
            return None
        _, state, code, reason = end.outcome
        ledger.end(job.point, state, code=code, reason=reason, step=step_of_run(job.point), job=job.number)
        return end

    def _name(self, point: Point) -> str:
        prefix = self._settings["name"]
        mine = "softmoe" if not prefix or str(prefix).startswith("${") else prefix
        return f"{mine}{self._end_of_name(point)}"

    def _end_of_name(self, point: Point) -> str:
        """How its job is called behind the name that the user may choose: the same in every start of the sweep, and no other sweep's."""
        return f"-{hashlib.sha256(str(self._folder).encode()).hexdigest()[:10]}-{point.label}"

    def _queued(self, point: Point, number: str | None, queued: list[Queued]) -> Queued | None:
        """Its job in the queue: the one of this number, or else any with its name."""
        by_name = [job for job in queued if job.name.endswith(self._end_of_name(point))]
        # With the label: on another cluster the same number is another job. Without the rest: the sweep's folder may have moved.
        by_number = [job for job in queued if job.number == number and job.name.endswith(f"-{point.label}")]
        return next(iter([*by_number, *by_name]), None)

    def _submitted(self, point: Point) -> SubmittedPoint:
        requeues = int(self._settings["max_num_timeout"] or 0)
        return SubmittedPoint(
            words=(self._verb, *point.overrides),
            folder=str(point.folder.absolute()),
            notes=str(self._folder / FOLDER),
            requeues=requeues,
        )

    def _running(self) -> list[Running]:
        return [
            Running(label, step_of_run(job.point), job.point.config.steps)
            for label, job in self._active.items()
            if not job.waits
        ]

    def _wait(self) -> None:
        lately = time.monotonic() - self._happened < QUICK_FOR
        until = time.monotonic() + (QUICK_SECONDS if lately else CALM_SECONDS)
        while self._asked is None and time.monotonic() < until:
            time.sleep(0.1)

    def _say(self, text: str, about: str = "") -> None:
        """Once, until something else is to be said about a point, or about SLURM."""
        if self._said.get(about) != text:
            self._show.tell(text)
        self._said[about] = text

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        def hear(number: int, frame: object) -> None:
            self._asked = signal.Signals(number)

        before = {number: signal.signal(number, hear) for number in ASKING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
