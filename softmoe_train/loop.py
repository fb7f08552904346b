"""This file owns training: the state that resumes, one step, and the loop around it.

Nothing in a step waits for the device: reports hold tensors, which are read only where a report is written or a save is due.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from softmoe_train.checkpoint.store import CheckpointStore
from softmoe_train.data.batch import Batch, Cursor, ImageStream
from softmoe_train.dist import gather_over_world, sum_over_world
from softmoe_train.engine.protocol import Engine, GradStats
from softmoe_train.observe.log import SilentLog
from softmoe_train.observe.meter import Meter


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

    def loop_document(self) -> dict[str, Any]:
        """The part that is not tensors, as JSON."""
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "cursor": self.cursor.to_json(),
            "wandb_id": self.wandb_id,
        }

    def restore(self, document: object) -> None:
        """Take over what `loop_document` wrote; raises ValueError for anything else."""
        if not isinstance(document, dict) or set(document) != set(self.loop_document()):
            raise ValueError(f"the saved loop state is damaged or of another version: {document}")
        self.step = int(document["step"])
        self.images_seen = int(document["images_seen"])
        self.cursor = Cursor.from_json(document["cursor"])
        self.wandb_id = str(document["wandb_id"])


class Evaluator(Protocol):
    """One kind of measurement. `every` is in steps; 0 measures only at the end."""

    every: int

    def run(self, state: TrainState) -> Iterable[tuple[str, float]]:
        """(set/measure, value) pairs, the same on every rank; every rank must call it."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long a run is and when it does what, in steps."""

    steps: int
    stop_after: int | None  # end cleanly after this step, as an interruption would
    micro_batches: int
    learning_rate: Callable[[int], float]
    report_every: int
    save_every: int  # 0 saves only at the end
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
    """Remembers, on the device, the first step at which this rank's loss was not finite."""

    def __init__(self, device: torch.device) -> None:
        self.first = torch.tensor(-1, device=device)

    def see(self, step: int, loss: Tensor) -> None:
        """Look at one step's loss without reading it."""
        self.first = torch.where((self.first < 0) & ~loss.isfinite(), step, self.first)

    def check(self) -> None:
        """Raise NonFiniteLossError on every rank if any rank saw one. The updates since were no-ops: weights are intact."""
        firsts = gather_over_world(self.first).tolist()
        bad = [first for first in firsts if first >= 0]
        if bad:
            ranks = [rank for rank, first in enumerate(firsts) if first == min(bad)]
            raise NonFiniteLossError(
                f"the loss was not finite at step {min(bad)} on rank {', '.join(map(str, ranks))}; weights are those of step "
                f"{min(bad) - 1}, no checkpoint of later steps was made. Lower schedule.peak, set optim.clip_norm, or look at the data"
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
    store: CheckpointStore,
    log: SilentLog,
    device: torch.device,
) -> str:
    """Train from `state` to the plan's last step; returns why it ended: "complete" or "stopped"."""
    meter, watch = Meter(device), FiniteWatch(device)
    broken = 0
    stream.seek(state.cursor)
    batches = iter(stream)
    while state.step < plan.last:
        with meter.waiting():
            batch = next(batches)
        lr = plan.learning_rate(state.step)
        report = train_step(state.engine, batch.to(device), lr, plan.micro_batches)
        state.step += 1
        state.images_seen += batch.cursor.position - state.cursor.position
        meter.step(batch.cursor.position - state.cursor.position)
        state.cursor = batch.cursor
        watch.see(state.step, report.loss)
        broken += _say_broken(batch, log)
        last = state.step == plan.last
        saves = last or _due(state.step, plan.save_every)
        if last or saves or _due(state.step, plan.report_every):
            watch.check()
            log.report(state.step, state.images_seen, _train_metrics(report, lr, broken) | meter.read())
        with meter.paused():
            for source, evaluator in evaluators.items():
                if last or _due(state.step, evaluator.every):
                    values = {f"{source}/{name}": value for name, value in evaluator.run(state)}
                    log.report(state.step, state.images_seen, values)
            if saves:
                documents = {**plan.documents, "loop": state.loop_document()}
                store.save(state.step, state.engine.state_dict(), documents)
    return "complete" if state.step >= plan.steps else "stopped"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _train_metrics(report: StepReport, lr: float, broken: int) -> dict[str, float]:
    """One step's measures, equal on every rank; reads the device."""
    sums = sum_over_world(torch.stack([report.loss.double(), report.loss.new_tensor(broken).double()])).tolist()
    metrics = {"train/loss": sums[0], "train/learning_rate": lr, "train/grad_norm": report.grads.norm.item()}
    return metrics | ({"data/broken_samples": sums[1]} if sums[1] else {})


def _say_broken(batch: Batch, log: SilentLog) -> int:
    for sample in batch.broken:
        log.warn(f"replaced a broken sample: {sample.shard} {sample.key}: {sample.reason}")
    return len(batch.broken)
