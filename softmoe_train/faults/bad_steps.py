"""This file owns what a run makes of bad steps: which are bad, how many in a row are too many, and which data is then passed over.

A loss or gradient norm that is not finite makes a step bad, and so does a spike of the loss. All of it is arithmetic on the losses,
step by step: when somebody looks, how often a run reports, and whether it was interrupted in between change nothing.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from softmoe_train.config import Record

Positive = Annotated[int, Field(ge=1)]
Why = Literal["loss", "gradient norm", "spike"]
REMEDY = "Lower schedule.peak or set optim.clip_norm (either with allow_changes=true), or look at the data"


class BadStepsError(RuntimeError):
    """Too many bad steps in a row, and no going back; every rank raises it, naming them."""


class BadStepsConfig(Record):
    """What is a bad step, how many in a row are too many, and what then."""

    in_a_row: Positive  # bad steps without an update
    spike: Annotated[float, Field(gt=0)] | None  # running standard deviations above the running mean of the loss
    spikes_in_a_row: Positive
    spike_memory: Annotated[int, Field(ge=2)]  # steps that both look back on, and that are seen before one is judged
    then: Literal["stop", "rollback"]
    rollbacks: Positive  # of a run, before it stops all the same


class SeenStep(NamedTuple):
    """A step as all ranks know it: its global samples from `begin` up to `end`, each rank's share of its loss."""

    step: int
    begin: int
    end: int
    losses: list[float]
    skipped: bool  # its update was a no-op


class BadStep(NamedTuple):
    """A bad step, why it is one, and on which ranks (all of them, unless the loss of some was not finite)."""

    step: int
    begin: int
    why: Why
    ranks: list[int]
    loss: float
    said: str


class BadData(Record):
    """The global samples from `begin` up to `end`, which the steps from `first_step` to `last_step` had before a rollback."""

    first_step: int
    last_step: int
    begin: int
    end: int


class Streak(Record):
    """Bad steps in a row, up to the last step."""

    first_step: int
    begin: int
    without_update: int
    spikes: int


class Level(Record):
    """The running mean and variance of the loss over `seen` good steps."""

    mean: float
    variance: float
    seen: int

    def after(self, loss: float, memory: int) -> "Level":
        """With one more step: plain averages at first, then exponential ones."""
        part = 1 / min(self.seen + 1, memory)
        off = loss - self.mean
        variance = (1 - part) * (self.variance + part * off * off)
        return Level(mean=self.mean + part * off, variance=variance, seen=self.seen + 1)


class BadSteps(Record):
    """What resumes: the bad data that is passed over, oldest rollback first, the bad steps in a row, the level of the loss."""

    passed_over: list[BadData]
    streak: Streak | None
    level: Level


NONE_YET = BadSteps(passed_over=[], streak=None, level=Level(mean=0.0, variance=0.0, seen=0))


class Judgement(NamedTuple):
    """What steps amount to: the state after them, which were bad, how many made no update, and the bad data if it is too much."""

    after: BadSteps
    bad: list[BadStep]
    skipped: int
    too_much: BadData | None


def judge(config: BadStepsConfig, before: BadSteps, steps: Iterable[SeenStep]) -> Judgement:
    """Judge `steps` one after another, up to the one that is one too many: what came after it will be computed again."""
    bad, skipped = [], 0
    for seen in steps:
        found = _bad(config, before.level, seen)
        skipped += seen.skipped
        if found is None:
            level = before.level.after(math.fsum(seen.losses), config.spike_memory)
            before = BadSteps(passed_over=before.passed_over, streak=None, level=level)
            continue
        bad.append(found)
        streak = _longer(before.streak, seen, spike=found.why == "spike")
        before = BadSteps(passed_over=before.passed_over, streak=streak, level=before.level)
        if streak.without_update >= config.in_a_row or streak.spikes >= config.spikes_in_a_row:
            first, begin = streak.first_step, streak.begin
            data = BadData(first_step=first, last_step=seen.step, begin=begin, end=seen.end)
            return Judgement(before, bad, skipped, data)
    return Judgement(before, bad, skipped, None)


def refuse_to_go_back(config: BadStepsConfig, state: BadSteps, data: BadData) -> None:
    """Raise BadStepsError where the run is to stop at `data`."""
    if config.then == "rollback" and len(state.passed_over) < config.rollbacks:
        return
    what = told(state.streak, data)
    if config.then == "rollback":
        times = len(state.passed_over)
        raise BadStepsError(
            f"{what}, and the run has gone back {times} times already (bad_steps.rollbacks={config.rollbacks}). {REMEDY}"
        )
    raise BadStepsError(f"{what}. {REMEDY}, or have it passed over: bad_steps.then=rollback")


def may_stand(config: BadStepsConfig, state: BadSteps) -> bool:
    """Whether a checkpoint may be made now: in the middle of bad steps it would push out those from before them."""
    return config.then == "stop" or state.streak is None


def told(streak: Streak | None, data: BadData) -> str:
    """The bad steps of `data` in words."""
    assert streak is not None, data
    counts = [f"{streak.without_update} not finite (no update was made)"] if streak.without_update else []
    counts += [f"{streak.spikes} with a spike of the loss"] if streak.spikes else []
    return f"every step from {data.first_step} to {data.last_step} was bad: {', '.join(counts)}"


def past(passed_over: Sequence[BadData], position: int) -> int:
    """The first sample from `position` on that is not passed over."""
    for data in sorted(passed_over, key=lambda data: data.begin):
        if data.begin <= position < data.end:
            position = data.end
    return position


def _bad(config: BadStepsConfig, level: Level, seen: SeenStep) -> BadStep | None:
    everyone = list(range(len(seen.losses)))
    ranks = [rank for rank in everyone if not math.isfinite(seen.losses[rank])]
    if ranks:
        said = f"the loss was not finite on rank {', '.join(map(str, ranks))}, and no update was made"
        return BadStep(seen.step, seen.begin, "loss", ranks, math.nan, said)
    loss = math.fsum(seen.losses)  # exact, so that ranks cannot disagree and their number does not matter
    if seen.skipped:
        said = "the gradient norm was not finite, and no update was made"
        return BadStep(seen.step, seen.begin, "gradient norm", everyone, loss, said)
    deviation = math.sqrt(level.variance)
    if config.spike is None or level.seen < config.spike_memory or loss <= level.mean + config.spike * deviation:
        return None
    said = f"the loss of {loss:.4g} is a spike above {level.mean:.4g} +- {deviation:.2g}"
    return BadStep(seen.step, seen.begin, "spike", everyone, loss, said)


def _longer(streak: Streak | None, seen: SeenStep, *, spike: bool) -> Streak:
    before = streak or Streak(first_step=seen.step, begin=seen.begin, without_update=0, spikes=0)
    counts = {"without_update": before.without_update + (not spike), "spikes": before.spikes + spike}
    return before.model_copy(update=counts)
