"""This file owns the keys that `softmoe plan` has beside those of a run, and what it refuses."""

from typing import Annotated

from pydantic import Field

from softmoe_train.config import JsonOut, Record
from softmoe_train.settings import RunConfig
from softmoe_train.worlds import world_problems

Positive = Annotated[int, Field(ge=1)]


class PlanConfig(Record):
    """What a plan is asked, beside the run."""

    ranks: Positive | None  # of all hosts together; null: as many as the run's `processes`
    ranks_per_host: Positive  # fewer where there are not as many ranks
    out: JsonOut

    def world(self, config: RunConfig) -> tuple[int, int]:
        """The ranks, and those of them on one host."""
        size = self.ranks or config.processes
        return size, min(size, self.ranks_per_host)


def plan_problems(config: RunConfig, own: PlanConfig) -> list[str]:
    """Every reason why these ranks could not run it, each with what to write instead; this machine's device is none."""
    size, local_size = own.world(config)
    if size % local_size:
        legal = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        return [
            f"ranks_per_host={own.ranks_per_host} does not divide ranks={size}: hosts have equally many; use one of {legal}"
        ]
    return world_problems(config.model_copy(update={"device": "cpu"}), size, local_size)
