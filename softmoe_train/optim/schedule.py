"""This file owns learning-rate schedules: pure functions of the step, so there is nothing to save."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from softmoe_train.config import Record

Count = Annotated[int, Field(ge=0)]


class ScheduleConfig(Record):
    """Warm-up from zero, a base curve, and (rsqrt, constant) a linear cool-down to zero at the last step."""

    kind: Literal["rsqrt", "cosine", "linear", "constant"]
    peak: Annotated[float, Field(gt=0)]
    warmup_steps: Count
    cooldown_steps: Count
    timescale: Annotated[int, Field(ge=1)] | None  # rsqrt only: steps over which the rate falls by sqrt(2)
    final: Annotated[float, Field(ge=0)]  # cosine and linear only: the rate they end at

    @model_validator(mode="after")
    def _fits(self) -> "ScheduleConfig":
        problems = []
        if (self.timescale is None) == (self.kind == "rsqrt"):
            problems.append(
                f"schedule.timescale={self.timescale} with schedule.kind={self.kind}: rsqrt needs one, the others take null"
            )
        if self.cooldown_steps and self.kind in ("cosine", "linear"):
            problems.append(
                f"schedule.cooldown_steps={self.cooldown_steps}: {self.kind} falls to its end by itself; use 0"
            )
        if self.final and self.kind in ("rsqrt", "constant"):
            problems.append(f"schedule.final={self.final}: {self.kind} ends by its cool-down; use 0.0")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def schedule_problems(config: ScheduleConfig, steps: int) -> list[str]:
    """What is wrong with a schedule for a run of this many steps."""
    needed = config.warmup_steps + config.cooldown_steps
    if needed > steps:
        return [
            f"schedule.warmup_steps={config.warmup_steps} plus schedule.cooldown_steps={config.cooldown_steps} exceed "
            f"steps={steps}; shorten them or raise steps to at least {needed}"
        ]
    return []


def learning_rate(config: ScheduleConfig, step: int, steps: int) -> float:
    """The rate of the update that follows `step` finished updates, 0 <= step < steps (paper.md 5)."""
    if step < config.warmup_steps:
        return config.peak * step / config.warmup_steps
    if config.kind in ("cosine", "linear"):
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        left = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
        return config.final + (config.peak - config.final) * left
    # The cool-down starts from the base curve's value at its own start (paper.md 5).
    start = steps - config.cooldown_steps
    base = config.peak
    if config.timescale is not None:
        base /= math.sqrt(1 + (min(step, start) - config.warmup_steps) / config.timescale)
    return base * min(1.0, (steps - step) / config.cooldown_steps) if config.cooldown_steps else base
