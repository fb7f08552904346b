"""This file owns a sweep from its words to its end: what was asked, the points, what they cost, their runs, what they come to."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softmoe_train.at_end import is_complete
from softmoe_train.config import ConfigError
from softmoe_train.launching.worker import RESUME
from softmoe_train.plain import plain
from softmoe_train.settings import RunConfig
from softmoe_train.sweep.cost import costs_of, print_costs
from softmoe_train.sweep.jobs import SlurmJobs
from softmoe_train.sweep.ledger import FILE, Ledger, open_ledger
from softmoe_train.sweep.local import LocalGrid, command_of
from softmoe_train.sweep.measure import measure_of
from softmoe_train.sweep.outcome import Launcher, Outcome, log_of
from softmoe_train.sweep.plugins import launcher_settings
from softmoe_train.sweep.points import Kind, Point, grid_points
from softmoe_train.sweep.result import print_results, write_results
from softmoe_train.sweep.room import devices_here, room_for, room_problems
from softmoe_train.sweep.settings import BASIC, SweepConfig, Words, compose_sweep, words_of
from softmoe_train.sweep.show import Show
from softmoe_train.sweep.submission import world_of_jobs

PATIENCE_SECONDS = 5.0  # after which what takes long tells how far it is
LEAVING_SECONDS = 5  # what ranks that have saved need to be gone


@dataclass(frozen=True)
class Sweep:
    """A sweep whose points may all start."""

    kind: Kind
    settings: SweepConfig
    words: Words
    points: list[Point]
    measure: str

    @property
    def folder(self) -> Path:
        """In which the points have theirs, and the ledger is."""
        return self.points[0].folder.parent


def make_sweep(kind: Kind, overrides: list[str]) -> Sweep:
    """Compose and check all points; raises ConfigError with every mistake, and nothing was started or written."""
    words = words_of(overrides)
    settings, problems = compose_sweep(words)
    if settings is None:  # what is wrong with the points is told too, as they would be without it
        settings, _ = compose_sweep(Words([], [], []))
        assert settings is not None
    if words.sweeper != BASIC:
        problems.append(f"hydra/sweeper={words.sweeper} chooses points for softmoe train -m alone; leave it out")
    try:
        if not problems:
            kind = placed(kind, words)
        points = grid_points(kind, settings, words.runs, _Patience("points checked"))
        if kind.world is None:
            problems += room_problems(points, room_for(points, settings.processes, devices_here(os.environ)))
        else:
            problems += signal_problems([point.config for point in points], words)
        sweep = Sweep(kind, settings, words, points, measure_of(settings.measure, points))
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    return sweep


def signal_problems(configs: Sequence[RunConfig], words: Words) -> list[str]:
    """Why a save before the time limit of a job could be cut off."""
    delay = int(launcher_settings(words.hydra)["signal_delay_s"])
    least = max(config.checkpoint.grace for config in configs) + LEAVING_SECONDS
    if delay >= least:
        return []
    return [
        f"hydra.launcher.signal_delay_s={delay}: a save may take checkpoint.grace and {LEAVING_SECONDS} s; give {least} or more, or a smaller checkpoint.grace"
    ]


def placed(kind: Kind, words: Words) -> Kind:
    """The kind with the world in which its points train; raises ConfigError."""
    if words.launcher == BASIC:
        return kind
    world = world_of_jobs(launcher_settings(words.hydra))
    return kind._replace(world=world, also=(*kind.also, f"processes={world.size}"))


def run_sweep(sweep: Sweep) -> list[Outcome]:
    """Tell what it costs, then run what is to be run; raises ConfigError where another process has this sweep."""
    if sweep.settings.only_cost:
        _tell_costs(sweep, Ledger(sweep.folder / FILE))
        return []
    with open_ledger(sweep.folder) as ledger:
        print(f"sweep of {len(sweep.points)} points in {sweep.folder}", flush=True)
        if sweep.settings.cost:
            _tell_costs(sweep, ledger)
        for point in sweep.points:
            ledger.plan(point)
            if sweep.kind.outdated is not None and not is_complete(point.config):
                (point.folder / sweep.kind.outdated).unlink(missing_ok=True)
        return build_launcher(sweep).run(sweep.points, ledger)


def build_launcher(sweep: Sweep) -> Launcher:
    """Who starts the points of this sweep."""
    if sweep.words.launcher != BASIC:
        settings = launcher_settings(sweep.words.hydra)
        return SlurmJobs(sweep.kind.verb, sweep.folder, settings, sweep.settings.retries, Show())
    room = room_for(sweep.points, sweep.settings.processes, devices_here(os.environ))
    return LocalGrid(command_of(sweep.kind.verb), room, sweep.settings.retries, Show())


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 where all went well, RESUME where the same command goes on with points that were asked to end, else the worst point's."""
    if any(one.state in ("interrupted", "to do", "pending", "running") for one in outcomes):
        return RESUME
    return max((one.code or 1 for one in outcomes if one.state == "failed"), default=0)


def tell_end(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    """What did not come to its end, why, and how to go on; on stderr."""
    for one in outcomes:
        if one.state == "failed":
            print(f"{one.point.label}: {one.reason}; see {log_of(one.point)}", file=sys.stderr)
    states = [one.state for one in outcomes]
    if exit_code(outcomes) == RESUME:
        print(
            f"softmoe {sweep.kind.verb} -m: {states.count('complete')} of {len(states)} points are complete; the same command goes on",
            file=sys.stderr,
            flush=True,
        )
    elif "stopped" in states:
        print(
            f"{states.count('stopped')} of {len(states)} points were stopped by stop_after; the same command without it goes on",
            flush=True,
        )


def show_results(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    """The table of all points, the heat map and the report; not of a sweep that was asked to end, and may have seconds for it."""
    if outcomes and exit_code(outcomes) != RESUME:
        print_results(outcomes, sweep.measure)
        print(*write_results(sweep.folder, outcomes, sweep.measure), sep="\n", flush=True)


def _tell_costs(sweep: Sweep, ledger: Ledger) -> None:
    if ledger.broken:
        print(f"{sweep.folder / FILE}: {ledger.broken} torn or foreign lines are passed over", file=sys.stderr)
    print_costs(sweep.points, costs_of(sweep.points, _Patience("points planned")))


class _Patience:
    """A line now and then, where something takes long."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._told = time.monotonic()

    def __call__(self, count: int, total: int) -> None:
        if time.monotonic() - self._told > PATIENCE_SECONDS:
            self._told = time.monotonic()
            print(plain(f"{count} of {total} {self._what}"), file=sys.stderr, flush=True)
