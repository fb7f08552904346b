"""This file owns the storm: a run that is killed with SIGKILL again and again must end as if it had never been.

    python -m tests.storm kills=50 seed=0 steps=300 out=storm.json
    python -m tests.storm kills=20 worlds=1,2,4

On two ranks it must end with the same bits. With `worlds`, each life draws its number of ranks from them, its expert axis and its
micro-batches: then sums round otherwise, and what must be equal is the way, sample by sample, by shard and key.

Real shards, real processes, real kills: of the launcher, of a rank, or of all, at instants drawn from the seed. Each kill is a line that
tells what lay on the disk. One counts as in the middle of a save where, in a step folder newer than every complete one, bytes of
this life's tensors lay there at the instant of the kill, and no completion mark was there after the last process had ended.
"""

import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tests.life import EVERY, Life
from tests.runs import with_digits
from tests.same_run import compared, farthest_loss, same_way

When = Literal["starting", "training", "saving"]
WHOM = ("launcher", "rank 0", "rank 1", "all")


@dataclass(frozen=True)
class Kill:
    """When and whom: `after` steps of this life, `seconds` later; or `seconds` after its start; or as a save's first bytes appear."""

    number: int
    when: When
    whom: str
    after: int
    seconds: float
    workers: int  # decode processes a rank, which may change from life to life, as the three below
    world: int
    axis: int
    micro_batches: int

    @property
    def layout(self) -> list[str]:
        """The settings of its life."""
        names = {"processes": self.world, "parallel.expert_axis": self.axis, "micro_batches": self.micro_batches}
        return [f"data.workers={self.workers}", *(f"{name}={value}" for name, value in names.items())]


@dataclass(frozen=True)
class Found:
    """What a kill left: the step that rank 0 had taken last, the newest complete checkpoint (0 for none), and an unfinished save."""

    lived: float  # seconds
    taken: int  # 0 where this life took none
    complete: int
    unfinished: dict[str, int]  # bytes by file, at the instant of the kill
    mid_save: bool


def drawn(kills: int, steps: int, seed: int, worlds: list[int]) -> list[Kill]:
    """Kills spread over a run of `steps`; of ten, six wait for a save, three come in the training at large, one during the start."""
    draw = random.Random(seed)
    ten: list[When] = [
        "saving",
        "training",
        "saving",
        "saving",
        "training",
        "saving",
        "starting",
        "saving",
        "training",
        "saving",
    ]
    whens: list[When] = [ten[i % 10] for i in range(kills)]
    draw.shuffle(whens)
    most = max(EVERY, 2 * steps // kills)
    seconds: dict[When, float] = {"starting": 8.0, "training": 0.1, "saving": 0.03}
    layouts = random.Random(f"layouts {seed}")
    found = []
    for number, when in enumerate(whens, 1):
        world = layouts.choice(worlds)
        axis = 2 if worlds == [2] else layouts.choice([a for a in (1, 2, 4) if world % a == 0])
        micro_batches = 1 if worlds == [2] else layouts.choice((1, 2, 4))
        whom, after = draw.choice(WHOM), draw.randint(0, most)
        whom = f"rank {world - 1}" if whom == "rank 1" else whom
        later, workers = draw.uniform(0, seconds[when]), draw.choice((0, 1))
        found.append(Kill(number, when, whom, after, later, workers, world, axis, micro_batches))
    return found


def killed(life: Life, kill: Kill) -> Found | None:
    """Carry out a kill and look at what it left; None where the run had ended before."""
    if kill.when == "starting":
        life.until(lambda: time.monotonic() - life.began > kill.seconds, 0.01)
    else:
        life.until(lambda: len(life.taken()) > kill.after, 0.004)
        if kill.when == "saving":
            life.until(life.unfinished, 0.001)
        time.sleep(kill.seconds)
    if life.launcher.poll() is not None:
        return None
    before, lived = life.unfinished(), time.monotonic() - life.began
    life.end(life.send(signal.SIGKILL, kill.whom))
    after = life.unfinished()
    mid_save, taken = any(file in after for file in before), max(life.taken(), default=0)
    return Found(round(lived, 3), taken, life.complete(), before, mid_save)


def told(kill: Kill, found: Found) -> str:
    """A kill in a line."""
    half = "; ".join(f"{file} {size:,} bytes" for file, size in sorted(found.unfinished.items()))
    return (
        f"kill {kill.number:>2}  {kill.world} ranks, {kill.micro_batches} micro, {kill.workers} workers  {kill.when:<8}  SIGKILL to {kill.whom:<8}  {found.lived:6.2f} s after its start, {found.taken:>3} steps taken, "
        f"complete: {found.complete:>3}, without a mark: {half or 'nothing'}{'  MID-SAVE' if found.mid_save else ''}"
    )


def storm(
    folder: Path,
    *more: str,
    kills: int,
    steps: int,
    seed: int,
    say: Callable[[str], None],
    slow_disk: float = 0.0,
    worlds: Sequence[int] = (2,),
    forked: bool = False,
) -> dict[str, Any]:
    """Run once without interruption and once through all kills, in a folder with the digits' shards; what was found and what is equal.

    Each life is a start of the program, or `forked` from a process that has the imports.
    """
    began = time.monotonic()
    whole = Life(folder, "whole", steps, *more, forked=forked)
    assert whole.end({}) == 0, whole.said()
    say(f"the uninterrupted run took {steps} steps in {time.monotonic() - began:.1f} s")
    rows, complete = [], 0
    for kill in drawn(kills, steps, seed, list(worlds)):
        life = Life(folder, "stormy", steps, *more, *kill.layout, slow_disk=slow_disk, forked=forked)
        found = killed(life, kill)
        assert found is not None, f"the run ended before kill {kill.number}: ask for more steps\n{life.said()}"
        life.check_start(complete)
        complete = found.complete
        rows.append({**asdict(kill), **asdict(found)})
        say(told(kill, found))
    last = Life(folder, "stormy", steps, *more, forked=forked)
    assert last.end({}) == 0, last.said()
    last.check_start(complete)
    mid_saves, seconds = sum(row["mid_save"] for row in rows), round(time.monotonic() - began)
    equal = compared(folder, "stormy", steps) if list(worlds) == [2] else same_way(folder, "stormy", steps)
    loss = farthest_loss(folder, "stormy")
    return {"kills": rows, "mid_saves": mid_saves, "seconds": seconds, "equal": equal, "farthest_loss": loss}


def main(words: list[str]) -> int:
    """The storm as a program; 0 where all is equal and at least two kills in five were in the middle of a save."""
    options = {
        "kills": "50",
        "steps": "300",
        "seed": "0",
        "worlds": "2",
        "out": "",
        **dict(word.split("=", 1) for word in words),
    }
    kills = int(options["kills"])
    folder = with_digits(Path(tempfile.mkdtemp(prefix="storm_")))
    try:
        worlds = [int(world) for world in options["worlds"].split(",")]
        steps, seed = int(options["steps"]), int(options["seed"])
        found = storm(folder, kills=kills, steps=steps, seed=seed, say=say, worlds=worlds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(found, indent=1))
    counts = f"{kills} kills, {found['mid_saves']} of them in the middle of a save, {found['seconds']} s"
    say(f"{counts}; equal to the uninterrupted run:")
    for what, same in found["equal"].items():
        say(f"  {what:<26} {'yes' if same else 'NO'}")
    say(f"  losses apart by {found['farthest_loss']:.1e} at most")
    return 0 if all(found["equal"].values()) and found["mid_saves"] >= 2 * kills // 5 else 1


def say(line: str) -> None:
    """A line that is seen at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
