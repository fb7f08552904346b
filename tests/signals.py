"""This file owns the proof of signals: a run asked to end twenty times, in every way, exits as documented and has saved its last step.

    python -m tests.signals seed=0 steps=240

Real processes on two ranks. SIGTERM, SIGINT and SIGUSR1 to the launcher, to one rank or to all, or the time limit; at random steps, while a save goes on
in the background, and on a disk where that takes seconds. Then what comes after the first signal: a second one while the final save writes, and
signals in the very last save of a run.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Literal

from softmoe_train.checkpoint import verify
from softmoe_train.launching.worker import RESUME
from tests.life import Life
from tests.runs import same_bits, stored, with_digits
from tests.same_run import compared
from tests.storm import WHOM, say

REASONS = ("SIGTERM", "SIGINT", "SIGUSR1", "time_limit")
When = Literal["training", "saving", "slow disk"]
DISK_SECONDS = 4.0
SECOND_SECONDS = 2.5  # sooner, a signal counts as the first one again


@dataclass(frozen=True)
class Ask:
    """Why a life ends, who is told, and when: `after` steps and `seconds` later, or as a save goes on in the background then."""

    number: int
    reason: str
    whom: str
    when: When
    after: int
    seconds: float


def drawn(seed: int) -> list[Ask]:
    """Twenty: five of each reason, to whom and when by the seed."""
    draw, asks = random.Random(seed), []
    whens: list[When] = ["training", "saving", "saving", "training", "slow disk"]
    for number in range(20):
        when = whens[number // 4]
        asks.append(
            Ask(number + 1, REASONS[number % 4], draw.choice(WHOM), when, draw.randint(0, 9), draw.uniform(0, 0.05))
        )
    return asks


def answered(folder: Path, steps: int, ask: Ask, before: int) -> tuple[int, bool]:
    """One life that is asked to end, told in a line: the step of its checkpoint, and whether all was as documented."""
    limit = [f"time_limit={(1 + ask.after / 3) / 60:.4f}"] if ask.reason == "time_limit" else []
    life = Life(folder, "asked", steps, *limit, slow_disk=DISK_SECONDS if ask.when == "slow disk" else 0.0)
    processes, saving = {"launcher": life.launcher.pid}, {}
    if not limit:
        life.until(lambda: len(life.taken()) > ask.after, 0.004)
        if ask.when != "training":
            life.until(life.unfinished, 0.001)
        time.sleep(ask.seconds)
        saving = life.unfinished()
        processes = life.send(Signals[ask.reason], ask.whom)
    code = life.end(processes)
    life.check_start(before)
    ended = json.loads((life.run / "summary.json").read_text())
    path = life.run / "checkpoints" / f"step_{ended['steps']:08d}"
    good = (
        code == RESUME
        and ended["ended"] == f"interrupted by {ask.reason}"
        and ended["steps"] == life.complete() == life.taken()[-1] > before
        and verify(path) == []
        and life.unfinished() == {}
    )
    whom = "-" if limit else ask.whom
    under_way = f"{', '.join(sorted({file[:13] for file in saving}))} under way" if saving else "no save under way"
    say(
        f"ask {ask.number:>2}  {ask.reason:<10}  to {whom:<8}  {ask.when:<9}  {under_way:<27}  exit {code:>3}, {ended['ended']}, "
        f"step {ended['steps']:>3} complete and whole: {'good' if good else 'NOT GOOD ' + life.said()}"
    )
    return life.complete(), good


def asked_twice(folder: Path, steps: int, number: Signals, whom: str, before: int) -> tuple[int, bool]:
    """A second signal while the save that the first asked for is written: the end at once, and the checkpoint before."""
    life = Life(folder, "asked", steps, slow_disk=4 * DISK_SECONDS)
    life.until(life.taken, 0.004)
    life.send(number, whom)
    began = time.monotonic()
    life.until(lambda: "saving step" in life.said(), 0.01)
    step = int(life.said().partition("saving step ")[2].partition(",")[0])
    life.until(lambda: any(f"{step:08d}" in file for file in life.unfinished()), 0.01)
    time.sleep(max(0.0, SECOND_SECONDS - (time.monotonic() - began)))
    complete, again = life.complete(), time.monotonic()
    code = life.end(life.send(number, whom))
    took = time.monotonic() - again
    life.check_start(before)
    good = code == 128 + number and life.complete() == complete < step and took < 2 * DISK_SECONDS
    say(
        f"{number.name} twice to {whom}, the second while step {step} is saved: exit {code} after {took:.1f} s, step {complete} is complete still: "
        f"{'good' if good else 'NOT GOOD ' + life.said()}"
    )
    return complete, good


def asked_at_the_end(folder: Path, name: str, times: int) -> bool:
    """Signals while the last save of a run writes: one changes nothing, a second ends it at once."""
    life = Life(folder, name, 6, slow_disk=2 * DISK_SECONDS)
    life.until(lambda: any("00000006" in file for file in life.unfinished()), 0.01)
    for _ in range(times):
        processes = life.send(SIGTERM, "launcher")
        time.sleep(SECOND_SECONDS if times > 1 else 0.0)
    code, want = life.end(processes), (0, 6) if times == 1 else (128 + SIGTERM, 3)
    good = (code, life.complete()) == want
    say(
        f"SIGTERM {'once' if times == 1 else 'twice'} while the last step of a run is saved: exit {code}, step {life.complete()} is complete: "
        f"{'good' if good else 'NOT GOOD ' + life.said()}"
    )
    return good


def main(words: list[str]) -> int:
    """All of it; 0 where every end was as documented and the run that was asked to end so often is the run that was not."""
    options = {"steps": "240", "seed": "0", **dict(word.split("=", 1) for word in words)}
    steps, folder = int(options["steps"]), with_digits(Path(tempfile.mkdtemp(prefix="signals_")))
    try:
        whole = Life(folder, "whole", steps)
        assert whole.end({}) == 0, whole.said()
        step, good = 0, []
        for ask in drawn(int(options["seed"])):
            step, well = answered(folder, steps, ask, step)
            good.append(well)
        say(f"{sum(good)} of {len(good)}")
        for number, whom in ((SIGTERM, "launcher"), (SIGINT, "rank 1")):
            step, well = asked_twice(folder, steps, number, whom, step)
            good.append(well)
        last = Life(folder, "asked", steps)
        assert last.end({}) == 0, last.said()
        last.check_start(step)
        equal = compared(folder, "asked", steps)
        good += [asked_at_the_end(folder, "once", 1), asked_at_the_end(folder, "twice", 2)]
        again = Life(folder, "twice", 6)
        assert again.end({}) == 0, again.said()
        equal["the run that was asked twice in its last save, resumed"] = same_bits(
            stored(folder / "once", 6), stored(folder / "twice", 6)
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"equal to the uninterrupted run: {equal}")
    return 0 if all(good) and all(equal.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
