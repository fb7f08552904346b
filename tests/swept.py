"""The proof of a local sweep: a grid that is killed in the middle of a point and run again. `python -m tests.swept out=FOLDER` is 3 x 3 on expert axis 2.

What finished is not run again, the point that was cut off goes on from its checkpoint to the same bits, and no point runs twice at once.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from softmoe_train.checkpoint.folder import step_folders, step_of
from tests.forked import forked as run_forked
from tests.runs import alive, command, environment, metrics, same_bits, stored
from tests.under_way import UnderWay

STEPS, EVERY = 150, 10
GRID = ["model.moe.num_experts=2,4,8", "model.moe.slots_per_expert=1,2,4"]
AXIS = ["processes=2", "parallel.expert_axis=2"]
SMALL = [
    "recipe=debug",
    f"steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "observe.every=10",
    "evals.upstream.every=50",
    "observe.wandb.mode=disabled",
]


class Swept(NamedTuple):
    """What a sweep that was killed and run again has left."""

    folder: Path
    before: list[str]  # points that were complete when it was killed
    cut: str  # the one that was not
    at: int  # the newest checkpoint of that
    left: list[int]  # processes that outlived the kill by seconds
    kept: bool  # whether the complete ones are as they were
    done: subprocess.CompletedProcess[str]

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """Its lines."""
        return entries(self.folder)


def killed_and_run_again(folder: Path, words: list[str], points: int, *, forked: bool = False) -> Swept:
    """Start a sweep, SIGKILL it (it alone) when `points` are complete and the next has a checkpoint, run it again to its end.

    It and its points are programs that are started, or are `forked` from a process that has their imports.
    """
    line = [*command()[:4], "-m", *words, f"run_dir={folder}"]
    if forked:
        process = UnderWay(*line[3:], folder=folder.parent)
    else:
        process = subprocess.Popen(line, cwd=folder.parent, env=environment(), stdout=subprocess.DEVNULL)
    until(lambda: process.poll() is not None or (len(complete(folder)) >= points and cut_off(folder) is not None))
    below = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    cut = cut_off(folder)
    assert below and cut is not None, "it was over before it could be killed"
    time.sleep(2.0)
    left = [pid for pid in below if alive(pid)]
    before, at = complete(folder), checkpoints(folder / cut)[-1]
    files = {path: path.stat().st_mtime_ns for name in before for path in (folder / name).rglob("*") if path.is_file()}
    if forked:
        done = run_forked(*line[3:], folder=folder.parent)
    else:
        done = subprocess.run(line, cwd=folder.parent, env=environment(), capture_output=True, text=True, check=False)
    kept = all(path.stat().st_mtime_ns == when for path, when in files.items())
    return Swept(folder, before, cut, at, left, kept, done)


def problems_of(swept: Swept, all_points: int) -> list[str]:
    """What was promised and is not so."""
    runs = complete(swept.folder)
    found = {
        f"exit code {swept.done.returncode}: {swept.done.stderr}": swept.done.returncode != 0,
        f"{len(runs)} of {all_points} points are complete": len(runs) != all_points,
        f"processes {swept.left} outlived the sweep": bool(swept.left),
        "a complete point was touched": not swept.kept,
        f"{swept.cut} was not resumed from step {swept.at}": f"step_{swept.at:08d}"
        not in log(swept.folder / swept.cut),
        "no heat map": not (swept.folder / "heat_map.png").is_file(),
        "no report": not (swept.folder / "report.html").is_file(),
    }
    problems = [what for what, wrong in found.items() if wrong]
    for name in runs:
        mine = [one for one in swept.ledger if one["label"] == name]
        events = [one["event"] for one in mine]
        expected = ["planned", "started", *["started"] * (name == swept.cut), "ended"]
        if events != expected or mine[-1]["state"] != "complete":
            problems.append(f"{name}: the ledger says {events}")
        if list(metrics(swept.folder / name, "train/loss"))[-1] != STEPS:
            problems.append(f"{name}: no metrics of the last step")
    return problems


def entries(folder: Path) -> list[dict[str, Any]]:
    """The lines of a ledger."""
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def complete(folder: Path) -> list[str]:
    """The points that are, by their own records."""
    summaries = sorted(folder.glob("*/summary.json"))
    return [path.parent.name for path in summaries if json.loads(path.read_text())["ended"] == "complete"]


def cut_off(folder: Path) -> str | None:
    """A point that has a checkpoint and is not complete."""
    names = [path.name for path in folder.glob("*=*") if checkpoints(path) and path.name not in complete(folder)]
    return names[0] if names else None


def checkpoints(run: Path) -> list[int]:
    """The steps of its complete ones."""
    return [step_of(path) for path in step_folders(run / "checkpoints", complete=True)]


def log(run: Path) -> str:
    """What a point printed."""
    return (run / "output.log").read_text()


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*children, *(one for child in children for one in descendants(child))]


def until(reached: Callable[[], bool], seconds: float = 900.0) -> None:
    """Wait, with many looks."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def main(words: list[str]) -> int:
    """The 3 x 3 grid; prints what it found."""
    folder = Path(words[0].removeprefix("out=")).resolve() / "sweep"
    folder.parent.mkdir(parents=True, exist_ok=True)
    swept = killed_and_run_again(folder, [*SMALL, *AXIS, *GRID], 4)
    print(
        f"killed with {len(swept.before)} points complete; {swept.cut} was cut off with its checkpoint of step {swept.at}"
    )
    print(swept.done.stdout)
    problems = problems_of(swept, 9)
    (planned,) = (one for one in swept.ledger if one["label"] == swept.cut and one["event"] == "planned")
    again = folder.parent / "uninterrupted"
    overrides = [word for word in planned["overrides"] if not word.startswith("run_dir=")]
    line = [*command()[:4], *overrides, f"run_dir={again}"]
    subprocess.run(line, env=environment(), check=True, stdout=subprocess.DEVNULL)
    if not same_bits(stored(folder / swept.cut, STEPS), stored(again, STEPS)):
        problems.append(f"{swept.cut} has other bits than an uninterrupted run")
    print(*problems or ["all as promised: the cut point has the bits of an uninterrupted run"], sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
