"""This file owns training: the state that resumes, one step, and the loop around it.

Nothing in a step waits for the device: reports hold tensors, which are read only where a report is written or a save is due.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from softmoe_train.checkpoint import CheckpointError
from softmoe_train.checkpoint.best import Best, best_of
from softmoe_train.checkpoint.saver import Saver
from softmoe_train.data.batch import Batch, Cursor, ImageStream
from softmoe_train.dist import gather_over_world, sum_over_world
from softmoe_train.engine.protocol import Engine, GradStats
from softmoe_train.observe.log import SilentLog
from softmoe_train.observe.meter import Meter

logger = logging.getLogger(__name__)

MOST_SKIPPED = 10  # updates in a row
REMEDY = "Lower schedule.peak or set optim.clip_norm (either with allow_changes=true), or look at the data"


class NonFiniteLossError(RuntimeError):
    """A loss was not finite; every rank raises it, naming the step and the ranks."""


@dataclass
class TrainState:
    """Everything that resumes. `images_seen` counts over all ranks; `cursor` is after the last batch that was consumed."""

    engine: Engine
    step: int
    images_seen: int
    cursor: Cursor
    wandb_id: str
    skipped_updates: int = 0  # no-ops for a loss or gradient that was not finite, as of the last report
    broken_samples: int = 0  # replaced while training, over all ranks, as of the last report
    best: Best | None = None  # the checkpoint that is kept for its value

    def loop_document(self) -> dict[str, Any]:
        """The part that is not tensors, as JSON."""
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "cursor": self.cursor.to_json(),
            "wandb_id": self.wandb_id,
            "skipped_updates": self.skipped_updates,
            "broken_samples": self.broken_samples,
            "best": None if self.best is None else self.best.to_json(),
        }

    def restore(self, document: object) -> None:
        """Take over what `loop_document` wrote; raises CheckpointError for anything else."""
        expected = self.loop_document()
        # A checkpoint from before there was a best lacks that key alone.
        saved: dict[str, Any] = {"best": None, **document} if isinstance(document, dict) else {}
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


class Evaluator(Protocol):
    """One kind of measurement. `every` is in steps; 0 measures only at the end."""

    every: int

    def run(self, state: TrainState) -> Iterable[tuple[str, float]]:
        """(set/measure, value) pairs, the same on every rank; every rank must call it."""
        ...


class StopRequest(Protocol):
    """Whether the run is to end before its last step."""

    def agreed(self) -> str | None:
        """Why to stop after this step, or None: the same on every rank, each of which must ask once a step."""
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
    documents: Mapping[str, Any]  # saved beside the loop state: the resolved run, the stream's fingerprint

    @property
    def last(self) -> int:
        """The step after which this process ends."""
        return min(self.steps, self.stop_after or self.steps)


class StepReport(NamedTuple):
    """What one step leaves, on the device."""

    loss: Tensor  # this rank's share of the mean loss of the global batch
    grads: GradStats


class FiniteWatch:
    """Remembers, on the device, the first step at which this rank's loss was not finite, and how many updates were no-ops."""

    def __init__(self, device: torch.device) -> None:
        self.first = torch.tensor(-1, device=device)
        self.skipped = torch.tensor(0.0, device=device)  # since the last report
        self.streak = torch.tensor(0.0, device=device)  # the latest ones, without a good one between

    def see(self, step: int, report: "StepReport") -> None:
        """Look at one step without reading it."""
        self.first = torch.where((self.first < 0) & ~report.loss.isfinite(), step, self.first)
        self.skipped = self.skipped + report.grads.skipped
        self.streak = (self.streak + 1) * report.grads.skipped

    def check(self, step: int) -> None:
        """Raise NonFiniteLossError on every rank if any loss was not finite, or if nothing has been learned for a while.

        The updates in question were no-ops and nothing is saved without this check: weights and checkpoints are intact.
        """
        firsts = gather_over_world(self.first).tolist()
        bad = [first for first in firsts if first >= 0]
        if bad:
            ranks = [rank for rank, first in enumerate(firsts) if first == min(bad)]
            raise NonFiniteLossError(
                f"the loss was not finite at step {min(bad)} on rank {', '.join(map(str, ranks))}; that update "
                f"was a no-op, and no checkpoint was made since. {REMEDY}"
            )
        if self.streak.item() >= MOST_SKIPPED:
            raise NonFiniteLossError(
                f"the gradient norm was not finite in the last {self.streak.item():.0f} steps, up to {step}: no update was made. {REMEDY}"
            )


def train_step(engine: Engine, batch: Batch, lr: float, micro_batches: int) -> StepReport:
    """Micro-batches through forward and backward, then one update."""
    parts = batch.split(micro_batches)
    losses = [engine.forward_backward(part, last=part is parts[-1]) for part in parts]
    return StepReport(torch.stack(losses).sum(), engine.update(lr))


def fit(
    state: TrainState,
    plan: Plan,
    stream: ImageStream,
    evaluators: Mapping[str, Evaluator],
    saver: Saver,
    log: SilentLog,
    stop: StopRequest,
) -> str:
    """Train from `state` to the plan's last step; returns why it ended: "complete", "stopped", or what `stop` says."""
    device = state.engine.device
    meter, watch = Meter(device), FiniteWatch(device)
    broken = 0
    stream.seek(state.cursor)
    batches = iter(stream)
    asked, begun = None, state.step
    while state.step < plan.last and not asked:
        with meter.waiting():
            batch = next(batches)
        lr = plan.learning_rate(state.step)
        report = train_step(state.engine, batch.to(device), lr, plan.micro_batches)
        state.step += 1
        state.images_seen += batch.cursor.position - state.cursor.position
        meter.step(batch.cursor.position - state.cursor.position)
        state.cursor = batch.cursor
        watch.see(state.step, report)
        broken += _name_broken(batch)
        if state.step == begun + 1:
            log.first_step()
        asked = stop.agreed()
        if asked:
            log.message(f"{asked}: saving step {state.step}, then ending")
        last = state.step == plan.last
        saves = last or asked or _due(state.step, plan.save_every)
        if saves or _due(state.step, plan.report_every):
            watch.check(state.step)
            metrics = _train_metrics(state, report, lr, watch, broken)
            log.report(state.step, state.images_seen, metrics | meter.read())
            broken = 0
        with meter.paused():
            measured: dict[str, float] = {}
            for source, evaluator in evaluators.items():
                if last or _due(state.step, evaluator.every):
                    values = {f"{source}/{name}": value for name, value in evaluator.run(state)}
                    log.report(state.step, state.images_seen, values)
                    measured |= values
            if saves:
                state.best = best_of(plan.best, saver.settle(state.best), state.step, measured)
                save = saver.save if last or asked else saver.begin
                documents = {**plan.documents, "loop": state.loop_document()}
                save(state.step, state.engine.state_dict(), documents, state.best)
    return "complete" if state.step >= plan.steps else asked or "stopped"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _train_metrics(
    state: TrainState, report: StepReport, lr: float, watch: FiniteWatch, broken: int
) -> dict[str, float]:
    """One step's measures and the counts so far, equal on every rank; reads the device."""
    loss, samples = sum_over_world(torch.stack([report.loss, report.loss.new_tensor(broken)])).tolist()
    state.broken_samples += int(samples)
    state.skipped_updates += int(watch.skipped.item())
    watch.skipped.zero_()
    metrics = {"train/loss": loss, "train/learning_rate": lr, "train/grad_norm": report.grads.norm.item()}
    counts: dict[str, float] = {
        "train/skipped_updates": state.skipped_updates,
        "data/broken_samples": state.broken_samples,
    }
    return metrics | {name: count for name, count in counts.items() if count}


def _name_broken(batch: Batch) -> int:
    for sample in batch.broken:
        # Not through the run's log: that is rank 0's, and every rank reads samples of its own.
        logger.warning("replaced a broken sample: %s %s: %s", sample.shard, sample.key, sample.reason)
    return len(batch.broken)
