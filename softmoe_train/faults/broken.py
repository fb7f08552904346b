"""This file owns broken samples of a run: which there were on all ranks, since its first step, and how many it bears.

What is known of them resumes with the run. The first of them are in broken_samples.jsonl, a line for each distinct sample, which is a
file for `data.quarantine`: one process writes it anew from what is known, so a resume repeats nothing.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from softmoe_train.config import Record
from softmoe_train.data.batch import Batch, Broken
from softmoe_train.dist import gather_texts
from softmoe_train.observe.log import SilentLog
from softmoe_train.observe.run_files import replace_text
from softmoe_train.plain import plain

MOST = 1000  # samples known by name, and shards: a sick run must not fill the disk
MOST_SHARDS = 20  # of which metrics tell
SHOWN = 5  # samples in the message of a run that ends
JUDGED_FROM = (
    10  # broken samples that the fraction would bear: before so many images one more would end a run by chance
)
OTHERS = "other shards"
_MAX_REASON = 300  # characters

logger = logging.getLogger(__name__)


class TooManyBrokenError(RuntimeError):
    """More broken samples than the run bears; every rank raises it, naming them."""


class Budget(Record):
    """How many broken samples a run bears, over all ranks and since its first step: a count, and a fraction of the images seen."""

    count: int
    fraction: float | None

    def spent(self, broken: int, images_seen: int) -> str | None:
        """Why `broken` samples among `images_seen` are too many; None where they are not."""
        if broken > self.count:
            return f"data.max_broken={self.count}"
        if self.fraction is None or images_seen * self.fraction < JUDGED_FROM or broken <= images_seen * self.fraction:
            return None
        return f"data.max_broken_fraction={self.fraction:g}"


class KnownBroken(Record):
    """A distinct broken sample, how often it was replaced, and in whose place first."""

    shard: str
    sha256: str
    key: str
    reason: str
    times: int
    first_sample: int


class BrokenSamples(Record):
    """What resumes: replacements by shard, and the first distinct samples that were replaced."""

    by_shard: dict[str, int]
    samples: list[KnownBroken]

    def after(self, met: Iterable[KnownBroken]) -> "BrokenSamples":
        """With what all ranks have met since."""
        by_shard, known = dict(self.by_shard), {(one.sha256, one.key): one for one in self.samples}
        for one in sorted(met, key=lambda one: (one.first_sample, one.shard, one.key)):
            shard = one.shard if one.shard in by_shard or len(by_shard) < MOST else OTHERS
            by_shard[shard] = by_shard.get(shard, 0) + one.times
            before = known.get((one.sha256, one.key))
            if before is not None:
                known[one.sha256, one.key] = before.model_copy(update={"times": before.times + one.times})
            elif one.key and len(known) < MOST:
                known[one.sha256, one.key] = one
        return BrokenSamples(by_shard=by_shard, samples=list(known.values()))

    def measures(self) -> dict[str, float]:
        """Replacements by shard, of the first shards that had one, and of all others together."""
        shards = list(self.by_shard.items())
        counts: dict[str, float] = {f"data/{shard}/broken_samples": count for shard, count in shards[:MOST_SHARDS]}
        if len(shards) > MOST_SHARDS:
            counts[f"data/{OTHERS}/broken_samples"] = sum(count for _, count in shards[MOST_SHARDS:])
        return counts


NONE_BROKEN = BrokenSamples(by_shard={}, samples=[])


class BrokenWatch:
    """Keeps what this rank's batches say is broken until all ranks tell each other; writes `file` (None on all ranks but the first)."""

    def __init__(self, budget: Budget | None, file: Path | None, log: SilentLog) -> None:
        self._budget, self._file, self._log = budget, file, log
        self._met: list[Broken] = []

    def see(self, batch: Batch) -> None:
        """Take a batch, and name its broken samples."""
        for sample in batch.broken:
            # Not through the run's log: that is rank 0's, and every rank reads samples of its own.
            logger.warning(
                "replaced a broken sample: %s %s: %s", *map(plain, (sample.shard, sample.key, sample.reason))
            )
        self._met += batch.broken

    @property
    def unread(self) -> int:
        """How many this rank has met since all ranks told each other."""
        return len(self._met)

    def over(self, broken: int) -> bool:
        """Whether this rank alone has met too many, with the `broken` that all ranks know of: they must hear of it before they report."""
        return self._budget is not None and broken + len(self._met) > self._budget.count

    def gather(self, before: BrokenSamples) -> BrokenSamples:
        """What all ranks know after `before`, the same on all of them; collective over the world."""
        met = gather_texts([one.model_dump_json() for one in _distinct(self._met)])
        self._met = []
        after = before.after(map(KnownBroken.model_validate_json, met))
        self._write(after)
        return after

    def check(self, broken: int, images_seen: int, known: BrokenSamples, step: int) -> None:
        """Raise TooManyBrokenError where the budget is spent at `step`, whose checkpoint is there to go on from; alike on every rank."""
        limit = None if self._budget is None else self._budget.spent(broken, images_seen)
        if limit is not None:
            raise TooManyBrokenError(_too_many(broken, images_seen, known, limit, step))

    def spent(self, broken: int, images_seen: int) -> bool:
        """Whether `check` would raise."""
        return self._budget is not None and self._budget.spent(broken, images_seen) is not None

    def _write(self, known: BrokenSamples) -> None:
        if self._file is None:
            return
        try:
            replace_text(self._file, "".join(f"{one.model_dump_json()}\n" for one in known.samples))
        except OSError as error:  # it is known, resumes, and is written again with the next one
            self._log.warn(f"{self._file} cannot be written ({error})")


def _distinct(met: Sequence[Broken]) -> list[KnownBroken]:
    """Each sample once; beyond MOST of them only how many there were in each shard."""
    found: dict[tuple[str, str], KnownBroken] = {}
    for one in met:
        key = one.key if (one.sha256, one.key) in found or len(found) < MOST else ""
        before = found.get((one.sha256, key))
        found[one.sha256, key] = (
            before.model_copy(update={"times": before.times + 1})
            if before is not None
            else KnownBroken(
                shard=one.shard,
                sha256=one.sha256,
                key=key,
                reason=one.reason[:_MAX_REASON],
                times=1,
                first_sample=one.sample,
            )
        )
    return list(found.values())


def _too_many(broken: int, images_seen: int, known: BrokenSamples, limit: str, step: int) -> str:
    shards = sorted(known.by_shard.items(), key=lambda one: -one[1])
    places = ", ".join(f"{plain(shard)} {count}" for shard, count in shards[:SHOWN])
    more = f" and {len(shards) - SHOWN} more shards" if len(shards) > SHOWN else ""
    named = "".join(f"\n  {plain(one.shard)} {plain(one.key)}: {plain(one.reason)}" for one in known.samples[-SHOWN:])
    key = limit.partition("=")[0]
    return (
        f"{broken} broken samples among {images_seen} images are more than {limit}: {places}{more}; the last new ones were{named}\n"
        f"broken_samples.jsonl in the run folder lists them. Repair the shards or correct the setting that a reason names, and start anew; or "
        f"go on from step {step} with a higher {key}, if their loss does not matter."
    )
