"""This file owns prefetching: a thread that has the shards at URLs brought near which this rank's next batches will read.

The order is arithmetic, so the thread computes it ahead of the batches, and only shards that this rank needs are fetched.
"""

import logging
import threading
import time
from collections.abc import Callable

from torch.utils.data import get_worker_info

from softmoe_train.data.files import ShardFiles
from softmoe_train.data.index import Shard
from softmoe_train.data.places import ShardsError, is_url

_IDLE = 60.0  # seconds without a new batch after which the thread ends; the next batch starts another
_LOOK = 0.05
log = logging.getLogger(__name__)


class Ahead:
    """Fetches up to `prefetch` shards ahead of need; `shards_at` gives those of the batch at a position, `step` apart."""

    def __init__(
        self, files: ShardFiles, shards: list[Shard], shards_at: Callable[[int], list[int]], *, step: int, horizon: int
    ) -> None:
        self._files, self._shards, self._shards_at = files, shards, shards_at
        self._step, self._horizon = step, horizon
        cfg = files.remote.cfg
        self._most = cfg.prefetch if cfg.max_gib and any(is_url(shard.path) for shard in shards) else 0
        self._forget()

    def __getstate__(self) -> dict[str, object]:
        state = {**self.__dict__}
        for name in ("_thread", "_position", "_next", "_reached"):
            state.pop(name)
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()

    def reached(self, position: int) -> None:
        """Tell that the batch at `position` is being read. Of the workers of a rank the first one fetches for all."""
        worker = get_worker_info()
        if not self._most or (worker is not None and worker.id):
            return
        self._position, self._reached = position, time.monotonic()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()

    def _forget(self) -> None:
        self._thread: threading.Thread | None = None
        self._position, self._next, self._reached = 0, 0, 0.0

    def _work(self) -> None:
        due: dict[int, int] = {}  # the position at which a shard that we fetch, or have fetched, is needed
        at_work: dict[int, threading.Thread] = {}
        while time.monotonic() - self._reached < _IDLE:
            position = self._position
            due = {shard: when for shard, when in due.items() if when > position}
            at_work = {shard: one for shard, one in at_work.items() if one.is_alive()}
            if not position <= self._next <= position + self._horizon:
                self._next = position
            scanned = 0
            while (
                self._next < position + self._horizon and scanned < 64 and len(due.keys() | at_work.keys()) < self._most
            ):
                for shard in self._shards_at(self._next):
                    if shard not in due and shard not in at_work and self._lacks(shard):
                        due[shard] = self._next
                        at_work[shard] = threading.Thread(target=self._bring, args=(shard,), daemon=True)
                        at_work[shard].start()
                self._next += self._step
                scanned += 1
            time.sleep(_LOOK)

    def _lacks(self, shard: int) -> bool:
        known = self._shards[shard]
        if not is_url(known.path) or not self._files.worth_keeping(shard):
            return False
        return not self._files.remote.cache.has(known.sha256)

    def _bring(self, shard: int) -> None:
        try:
            self._files.remote.bring(self._shards[shard])
        except ShardsError as error:  # who needs it will meet the same, and stop
            log.info("%s", error)
