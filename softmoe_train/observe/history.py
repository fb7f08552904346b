"""This file owns the history of a run: how each of its processes began and ended, told from what the one before left."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from softmoe_train.config import Record

KEPT = 50  # processes told one by one (60 KB, rewritten at each report); those before them are in the counts alone
LONGEST = 300  # characters of a reason: what an error says may be pages
KILLED = "killed"  # or gave up, or lost its machine: it could not write why


class Process(Record):
    """One process (rank 0's): from which step it went on, how far it came, why it ended (null: not yet, or it was killed)."""

    began: str  # UTC
    from_step: int
    to_step: int  # the last one that it reported
    ended: str | None
    facts: dict[str, Any]  # by name: what it read from its checkpoint, how long its start took


class History(Record):
    """The processes of a run, this one last; each method gives a new history."""

    starts: int
    interruptions: dict[str, int]  # how many processes ended so, but for "complete"
    lost_steps: int  # reported by one process, and computed again by the next
    processes: list[Process]

    def reached(self, step: int) -> "History":
        """This process has come to `step`."""
        return self._changed(to_step=max(step, self.processes[-1].from_step))

    def with_facts(self, name: str, facts: Mapping[str, Any]) -> "History":
        """This process has something to tell of itself."""
        return self._changed(facts={**self.processes[-1].facts, name: dict(facts)})

    def ended(self, reason: str) -> "History":
        """This process ends."""
        kind = reason.partition(":")[0]  # an error's text would make each its own
        counts = dict(self.interruptions)
        if kind != "complete":
            counts[kind] = counts.get(kind, 0) + 1
        return self._changed(ended=reason[:LONGEST]).model_copy(update={"interruptions": counts})

    def _changed(self, **values: Any) -> "History":
        *earlier, this = self.processes
        return self.model_copy(update={"processes": [*earlier, this.model_copy(update=values)]})


def next_start(earlier: History | None, from_step: int) -> History:
    """The history of a process that goes on from `from_step` (0: from scratch) where `earlier` is all that was left behind."""
    this = Process(
        began=datetime.now(UTC).isoformat(timespec="seconds"),
        from_step=from_step,
        to_step=from_step,
        ended=None,
        facts={},
    )
    if earlier is None or not earlier.processes:
        return History(starts=1, interruptions={}, lost_steps=0, processes=[this])
    before = earlier.processes[-1]
    if before.ended is None:  # nobody else writes here while we do
        earlier = earlier.ended(KILLED)
    return History(
        starts=earlier.starts + 1,
        interruptions=earlier.interruptions,
        lost_steps=earlier.lost_steps + max(0, before.to_step - from_step),
        processes=[*earlier.processes[1 - KEPT :], this],
    )
