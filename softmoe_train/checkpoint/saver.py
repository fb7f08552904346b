"""This file owns how a run saves: in the background while it trains on, and what is done about a save that fails."""

import time
from collections.abc import Callable

from softmoe_train.checkpoint.agreement import CheckpointError, NotFiniteError
from softmoe_train.checkpoint.best import Best
from softmoe_train.checkpoint.manifest import Documents
from softmoe_train.checkpoint.plan import Tensors
from softmoe_train.checkpoint.remote import Place
from softmoe_train.checkpoint.store import CheckpointStore

RETRY_SECONDS = 10.0  # at the end of a run, where there is no step left to take in between


class Saver:
    """Saves a run in the background; every method is called by every rank, which all go the same way.

    A save that fails (no room, no permission, a folder that is gone) is a warning, and the training goes on: the disk may be better
    by the next. After `max_failures` in a row CheckpointError is raised, because from there on a run only has more to lose. A state that
    is not finite raises NotFiniteError at once.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        max_failures: int,
        warn: Callable[[str], None],
        best: Best | None = None,
        saved: Callable[[Place], None] = lambda _: None,  # hears of each checkpoint that is complete
    ) -> None:
        self._store = store
        self._max_failures = max_failures
        self._warn = warn
        self._saved = saved
        self._failures = 0
        self._step = -1  # of the save that was begun last
        self._best = best  # before that step was measured

    def settle(self, best: Best | None) -> Best | None:
        """Wait for the save that was begun; returns `best`, or the one before it where its checkpoint could not be saved."""
        failed = self._has_failed()
        if failed and best is not None and best.step == self._step:
            best = self._best
        self._best = best
        if not failed:
            self.look_ahead()
        return best

    def look_ahead(self) -> None:
        """Warn where the next save will not fit the disk, while there is time to make room."""
        shortage = self._store.shortage(None if self._best is None else self._best.step)
        if shortage is not None:
            self._warn(f"the next save will fail: {shortage}")

    def begin(
        self, step: int, tensors: Tensors, documents: Documents, best: Best | None, before: int | None = None
    ) -> None:
        """Begin to save `step`; what was begun before must be settled. The newest checkpoint from before step `before` is kept."""
        self._step = step
        self._store.begin(step, tensors, documents, best=best.step if best is not None else None, before=before)

    def save(
        self, step: int, tensors: Tensors, documents: Documents, best: Best | None, before: int | None = None
    ) -> None:
        """Save `step` and wait for it, trying again for as long as `settle` would bear it."""
        while True:
            self.begin(step, tensors, documents, best, before)
            if not self._has_failed():
                return
            time.sleep(RETRY_SECONDS)

    def _has_failed(self) -> bool:
        """Whether the save that was begun, if any, has failed; counts, warns and raises."""
        try:
            if (folder := self._store.settle()) is not None:
                self._failures = 0
                self._saved(folder)
            return False
        except NotFiniteError as error:
            remedy = f"{self._standing()}: go on from there with a lower schedule.peak or optim.clip_norm (allow_changes=true)"
            raise NotFiniteError(error.what, [*error.problems, remedy]) from error
        except CheckpointError as error:
            self._failures += 1
            if self._failures >= self._max_failures:
                rule = f"that makes {self._failures} saves in a row (checkpoint.max_failures)"
                raise CheckpointError(error.what, [*error.problems, f"{rule}; {self._standing()}"]) from error
            self._warn(f"{error}\nthe run goes on; {self._standing()}")
            return True

    def _standing(self) -> str:
        try:
            latest = self._store.latest()
        except CheckpointError as error:
            return f"the checkpoints cannot be listed: {error.problems[0]}"
        return f"the last checkpoint is {latest.name}" if latest is not None else "there is no checkpoint yet"
