"""This file owns training: the state that resumes, one step, and the loop around it.

Nothing in a step waits for the device: reports hold tensors, which are read only where a report is written or a save is due.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from softmoe_train.checkpoint import CheckpointError
from softmoe_train.checkpoint.best import Best, best_of
from softmoe_train.checkpoint.saver import Saver
from softmoe_train.data.batch import Batch, Cursor, ImageStream
from softmoe_train.dist import sum_over_world
from softmoe_train.engine.protocol import Engine, GradStats
from softmoe_train.faults.bad_batches import BadBatches
from softmoe_train.faults.bad_steps import NONE_YET, BadData, BadSteps, BadStepsConfig, may_stand, past
from softmoe_train.faults.broken import NONE_BROKEN, BrokenSamples, BrokenWatch, Budget
from softmoe_train.faults.step_watch import StepWatch
from softmoe_train.model.routing import MEASURES
from softmoe_train.observe.figures import Alarm, Figure, Said
from softmoe_train.observe.log import SilentLog
from softmoe_train.observe.meter import Meter, StallWatch


@dataclass
class TrainState:
    """Everything that resumes. `images_seen` counts over all ranks; `cursor` is after the last batch that was consumed."""

    engine: Engine
    step: int
    images_seen: int
    cursor: Cursor
    wandb_id: str
    skipped_updates: int = 0  # no-ops for a loss or gradient that was not finite, as of the last look at them
    broken_samples: int = 0  # replaced while training, over all ranks, as of the last report
    broken: BrokenSamples = NONE_BROKEN  # where they are
    best: Best | None = None  # the checkpoint that is kept for its value
    bad_steps: BadSteps = NONE_YET  # the data that is passed over, and what the next bad step is judged by

    def advance(self, cursor: Cursor) -> int:
        """Count the step whose batch ends at `cursor`; how many images it had."""
        images = cursor.position - self.cursor.position
        self.step, self.cursor, self.images_seen = self.step + 1, cursor, self.images_seen + images
        return images

    def loop_document(self) -> dict[str, Any]:
        """The part that is not tensors, as JSON."""
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "cursor": self.cursor.to_json(),
            "wandb_id": self.wandb_id,
            "skipped_updates": self.skipped_updates,
            "broken_samples": self.broken_samples,
            "broken": self.broken.model_dump(),
            "best": None if self.best is None else self.best.to_json(),
            "bad_steps": self.bad_steps.model_dump(),
        }

    def restore(self, document: object) -> None:
        """Take over what `loop_document` wrote; raises CheckpointError for anything else."""
        expected = self.loop_document()
        # A checkpoint from before there was a best, or before bad steps or broken samples were told apart, lacks those keys alone.
        added = {"best": None, "bad_steps": NONE_YET.model_dump(), "broken": NONE_BROKEN.model_dump()}
        saved: dict[str, Any] = {**added, **document} if isinstance(document, dict) else {}
        if set(saved) != set(expected):
            keys = f"it holds {', '.join(saved) or 'nothing'}; this version reads {', '.join(expected)}"
            raise CheckpointError("the saved loop state is of another version", [keys])
        self.step = int(saved["step"])
        self.images_seen = int(saved["images_seen"])
        self.cursor = Cursor.from_json(saved["cursor"])
        self.wandb_id = str(saved["wandb_id"])
        self.skipped_updates = int(saved["skipped_updates"])
        self.broken_samples = int(saved["broken_samples"])
        self.best = Best.from_json(saved["best"])
        try:
            self.bad_steps = BadSteps.model_validate(saved["bad_steps"])
        except ValueError as error:
            raise CheckpointError("not a record of bad steps", [f"bad_steps: {saved['bad_steps']}"]) from error
        try:
            self.broken = BrokenSamples.model_validate(saved["broken"])
        except ValueError as error:
            raise CheckpointError("not a record of broken samples", [f"broken: {saved['broken']}"]) from error


class Evaluator(Protocol):
    """One kind of measurement. `every` is in steps; 0 measures only at the end."""

    every: int

    def run(self, state: TrainState) -> Iterable[tuple[str, Said]]:
        """(set/measure, value) pairs and alarms, the same on every rank, and figures of rank 0; every rank must call it."""
        ...


class StopRequest(Protocol):
    """Whether the run is to end before its last step."""

    def agreed(self) -> str | None:
        """Why to stop after this step, or None: the same on every rank, each of which must ask once a step."""
        ...

    def end_for_broken_samples(self) -> None:
        """Have this rank want the run to end because of its data."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long a run is and when it does what, in steps."""

    steps: int
    stop_after: int | None  # end cleanly after this step, as an interruption would
    micro_batches: int
    learning_rate: Callable[[int], float]
    report_every: int
    save_every: int  # 0 saves only where the run ends
    best: str | None  # "highest METRIC" or "lowest METRIC", of what evaluators measure: that checkpoint is kept
    bad_steps: BadStepsConfig
    bad_batches: BadBatches | None  # where bad steps are written down; None on all ranks but the first
    budget: Budget | None  # of broken samples; None for data that has none
    broken_file: Path | None  # where they are written down; None on all ranks but the first
    moves_every: int  # at these steps it is told how far the update moves each expert; 0 never
    expert_blocks: Sequence[int]  # whose routers may tell something
    documents: Mapping[str, Any]  # saved beside the loop state: the resolved run, the stream's fingerprint

    @property
    def last(self) -> int:
        """The step after which this process ends."""
        return min(self.steps, self.stop_after or self.steps)


class StepReport(NamedTuple):
    """What one step leaves, on the device."""

    loss: Tensor  # this rank's share of the mean loss of the global batch
    grads: GradStats


def train_step(engine: Engine, batch: Batch, lr: float, micro_batches: int, *, moves: bool = False) -> StepReport:
    """Micro-batches through forward and backward, then one update, with what it `moves` where that is asked."""
    parts = batch.split(micro_batches)
    losses = [engine.forward_backward(part, last=part is parts[-1]) for part in parts]
    return StepReport(torch.stack(losses).sum(), engine.update(lr, moves=moves))


def fit(
    state: TrainState,
    plan: Plan,
    stream: ImageStream,
    evaluators: Mapping[str, Evaluator],
    saver: Saver,
    log: SilentLog,
    stop: StopRequest,
) -> str | BadData:
    """Train from `state` to the plan's last step; returns why it ended: "complete", "stopped", or what `stop` says.

    Or it returns the bad data to pass over: the caller goes back to a state from before it, and calls again. Raises
    TooManyBrokenError on every rank where more samples were broken than the run bears, once that step is saved.
    """
    # Before workers start; or there is nothing to go back to, until the first checkpoint.
    if state.step == 0 and plan.bad_steps.then == "rollback":
        _save(state, plan, saver.save)
    meter, stalls, watch = Meter(state.engine.device), StallWatch(), StepWatch(plan.bad_steps, plan.bad_batches, log)
    broken = BrokenWatch(plan.budget, plan.broken_file, log)
    if state.step < plan.last:
        broken.check(state.broken_samples, state.images_seen, state.broken, state.step)
    batches = batches_from(state, stream)
    asked, begun = None, state.step
    while state.step < plan.last and not asked:
        with meter.waiting():
            batch = next(batches)
        begin = state.cursor.position  # after `next`, which may pass over bad data
        lr = plan.learning_rate(state.step)
        moves = _due(state.step + 1, plan.moves_every)
        report = train_step(state.engine, batch.to(state.engine.device), lr, plan.micro_batches, moves=moves)
        meter.step(state.advance(batch.cursor))
        watch.see(state.step, begin, state.cursor.position, report.loss, report.grads.skipped)
        broken.see(batch)
        if broken.over(state.broken_samples):
            stop.end_for_broken_samples()
        if state.step == begun + 1:
            log.first_step()
        asked = stop.agreed()
        last = state.step == plan.last
        due = {source: one for source, one in evaluators.items() if last or _due(state.step, one.every)}
        saves = last or asked or _due(state.step, plan.save_every)
        reports = saves or moves or _due(state.step, plan.report_every)
        # Before anything is said of this step: what a rollback takes back, from its last step on, nobody has heard of.
        if (reports or due or watch.full) and (too_much := _judge(state, watch)) is not None:
            return too_much
        if asked:
            log.message(f"{asked}: saving step {state.step}, then ending")
        if reports:
            metrics = _train_metrics(state, plan, stream, report, lr, broken)
            _report(state, metrics, meter.read(), stalls, log)
        spent = reports and broken.spent(state.broken_samples, state.images_seen)  # by what all ranks have just told
        ends = last or asked or spent
        with meter.paused():
            measured = {} if spent else _measure(state, due, log)  # what ends a run must not fail before it is saved
            if ends or (saves and _may_save(state, plan, log)):
                state.best = best_of(plan.best, saver.settle(state.best), state.step, measured)
                _save(state, plan, saver.save if ends else saver.begin)
        if spent:
            broken.check(state.broken_samples, state.images_seen, state.broken, state.step)
    return "complete" if state.step >= plan.steps else asked or "stopped"


def _judge(state: TrainState, watch: StepWatch) -> BadData | None:
    """Take into the state what was seen of bad steps; or return what is to be passed over, and take nothing."""
    judgement = watch.judge(state.bad_steps)
    if judgement.too_much is None:
        state.bad_steps = judgement.after
        state.skipped_updates += judgement.skipped
    return judgement.too_much


def _report(
    state: TrainState, metrics: dict[str, float], rates: dict[str, float], stalls: StallWatch, log: SilentLog
) -> None:
    log.report(state.step, state.images_seen, metrics | rates)
    stalled = stalls.see(rates)
    if stalled is not None:
        log.warn(f"step {state.step}: {stalled}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _measure(state: TrainState, evaluators: Mapping[str, Evaluator], log: SilentLog) -> dict[str, float]:
    measured: dict[str, float] = {}
    for source, evaluator in evaluators.items():
        said = {f"{source}/{name}": value for name, value in evaluator.run(state)}
        figures = {name: value for name, value in said.items() if isinstance(value, Figure)}
        values = {name: value for name, value in said.items() if not isinstance(value, Figure | Alarm)}
        log.report(state.step, state.images_seen, values)
        log.show(state.step, figures)
        for alarm in said.values():
            if isinstance(alarm, Alarm):
                log.alert(alarm.title, alarm.text)
        measured |= values
    return measured


def _may_save(state: TrainState, plan: Plan, log: SilentLog) -> bool:
    """Whether a checkpoint that is due may be made; a run that ends here makes it all the same."""
    may = may_stand(plan.bad_steps, state.bad_steps)
    if not may:
        log.message(f"step {state.step} is bad, and not saved: a rollback must find a checkpoint from before it")
    return may


def batches_from(state: TrainState, stream: ImageStream) -> Iterator[Batch]:
    """Batches from the state's cursor on; before each, the cursor is moved past data that is to be passed over."""
    while True:
        state.cursor = Cursor(past(state.bad_steps.passed_over, state.cursor.position))
        stream.seek(state.cursor)
        for batch in stream:
            yield batch
            if past(state.bad_steps.passed_over, state.cursor.position) != state.cursor.position:
                break


def _save(state: TrainState, plan: Plan, save: Callable[..., None]) -> None:
    streak = state.bad_steps.streak  # a rollback must find a checkpoint from before it
    before = None if streak is None or plan.bad_steps.then != "rollback" else streak.first_step
    save(state.step, state.engine.state_dict(), {**plan.documents, "loop": state.loop_document()}, state.best, before)


def _train_metrics(
    state: TrainState, plan: Plan, stream: ImageStream, report: StepReport, lr: float, broken: BrokenWatch
) -> dict[str, float]:
    """One step's measures and the counts so far, equal on every rank; reads the device."""
    loss, samples = sum_over_world(torch.stack([report.loss, report.loss.new_tensor(broken.unread)])).tolist()
    if samples:  # the same on every rank, and so is who gathers
        state.broken_samples += int(samples)
        state.broken = broken.gather(state.broken)
    metrics = {"train/loss": loss, "train/learning_rate": lr, "train/grad_norm": report.grads.norm.item()}
    counts: dict[str, float] = {
        "train/skipped_updates": state.skipped_updates,
        "train/rollbacks": len(state.bad_steps.passed_over),
        "data/broken_samples": state.broken_samples,
    }
    metrics |= {name: count for name, count in counts.items() if count}
    metrics |= {f"data/{name}": value for name, value in stream.measures(state.cursor).items()}
    return metrics | state.broken.measures() | _routing_metrics(plan.expert_blocks, report.grads)


def _routing_metrics(blocks: Sequence[int], grads: GradStats) -> dict[str, float]:
    """What routers tell of the global batch: means over its groups, and the auxiliary losses of all blocks together; how far experts moved."""
    metrics: dict[str, float] = {}
    if grads.moved is not None:
        for block, of in zip(blocks, grads.moved, strict=True):
            measures = {"min": of.min(), "mean": of.mean(), "max": of.max()}
            metrics |= {f"router/{block}/expert_update_{name}": value.item() for name, value in measures.items()}
    if grads.told is None:
        return metrics
    measures = [dict(zip(MEASURES, values, strict=True)) for values in sum_over_world(grads.told.double()).tolist()]
    metrics["train/auxiliary_loss"] = math.fsum(of.pop("auxiliary_loss") for of in measures)
    for block, of in zip(blocks, measures, strict=True):
        metrics |= {f"router/{block}/{name}": value for name, value in of.items()}
    return metrics
