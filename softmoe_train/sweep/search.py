"""This file owns a sweep whose points a sweeper of Hydra's chooses as it goes, by what the points before came to (Optuna)."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from softmoe_train.config import ConfigError
from softmoe_train.finetune import key_of
from softmoe_train.launching.worker import RESUME
from softmoe_train.report.read import read_run
from softmoe_train.settings import RunConfig
from softmoe_train.sweep.drive import Sweep, build_launcher, exit_code, placed, signal_problems
from softmoe_train.sweep.ledger import Ledger, open_ledger
from softmoe_train.sweep.measure import measure_of
from softmoe_train.sweep.outcome import Outcome
from softmoe_train.sweep.plugins import PointFailedError, keys_that_vary, search
from softmoe_train.sweep.points import Kind, Point, folder_of_sweep, points_of, without
from softmoe_train.sweep.result import value_of
from softmoe_train.sweep.settings import BASIC, SweepConfig, Words, compose_sweep, words_of

OURS = {
    "hydra.sweeper.direction": "it follows from sweep.measure; leave it out",
    "hydra.sweeper.storage": "what is complete is in the folders of the points, and the same command finds it there; leave it out",
    "hydra.sweeper.params": "write them on the line, as in schedule.peak=interval(0.001,0.01)",
    "hydra.sweeper.search_space": "write it on the line, as in schedule.peak=interval(0.001,0.01)",
    "hydra.sweeper.custom_search_space": "a path of Python is not run; write the space on the line",
}
SEED = "hydra.sweeper.sampler.seed"
UNSEEDED = ("grid",)  # samplers that draw nothing


class _AskedToEndError(Exception):
    """Some points are not over, so nothing can be chosen by them."""


def is_search(overrides: list[str]) -> bool:
    """Whether a sweeper chooses the points of this line."""
    return words_of(overrides).sweeper != BASIC


def run_search(kind: Kind, overrides: list[str]) -> tuple[Sweep, list[Outcome]]:
    """Have the sweeper choose points and run them until it has enough; raises ConfigError with every mistake before the first.

    Points that are illegal end the search with ConfigError when they are chosen. The draws follow from a seed, so the same command
    chooses the same points, finds those that are complete and goes on with the rest.
    """
    words = words_of(overrides)
    settings, problems = compose_sweep(words)
    problems += [f"{word}: {OURS[key_of(word)]}" for word in words.hydra if key_of(word) in OURS]
    swept = keys_that_vary(words.runs)
    if not swept:
        problems.append("no override leaves a choice; write one as in schedule.peak=interval(0.001,0.01)")
    if settings is None or problems:
        raise ConfigError(problems)
    kind = placed(kind, words)
    base = kind.compose(without(words.runs, swept), lambda _: [])
    if kind.world is not None and (problems := signal_problems([base], words)):
        raise ConfigError(problems)
    chosen = _Chosen(kind, settings, words, swept, base)
    with open_ledger(chosen.folder) as ledger:
        print(f"search in {chosen.folder}: {chosen.measure}", flush=True)
        with suppress(_AskedToEndError, PointFailedError):  # the outcomes tell
            search(chosen.told(), chosen.folder, words.runs, lambda lines: chosen.values(lines, ledger))
    return chosen.sweep(chosen.points), chosen.outcomes


class _Chosen:
    """The points that were chosen so far, and what became of them."""

    def __init__(self, kind: Kind, settings: SweepConfig, words: Words, swept: list[str], base: RunConfig) -> None:
        self._kind, self._settings, self._words, self._swept = kind, settings, words, swept
        self._base = base
        self.folder: Path = folder_of_sweep(words.runs, base)
        self.measure = measure_of(settings.measure, [Point("the run", [], {}, {}, base)])
        self._found: dict[str, Outcome] = {}

    @property
    def outcomes(self) -> list[Outcome]:
        """In the order in which their points were chosen."""
        return list(self._found.values())

    @property
    def points(self) -> list[Point]:
        """All so far."""
        return [one.point for one in self.outcomes]

    def told(self) -> list[str]:
        """What the sweeper is told: its settings, which way is better, and a seed that makes its choices the same in every start."""
        words = list(self._words.hydra)
        sampler = next((w.partition("=")[2] for w in words if key_of(w) == "hydra/sweeper/sampler"), "")
        if SEED not in map(key_of, words) and sampler not in UNSEEDED:
            words.append(f"{SEED}={self._base.seed}")
        return [*words, f"hydra.sweeper.direction={'maximize' if self.measure.startswith('highest') else 'minimize'}"]

    def sweep(self, points: list[Point]) -> Sweep:
        """These points as a sweep."""
        return Sweep(self._kind, self._settings, self._words, points, self.measure)

    def values(self, lines: Sequence[Sequence[str]], ledger: Ledger) -> list[float | None]:
        """Run a batch, and return what each point came to; raises where some are not over."""
        fixed = without(self._words.runs, self._swept)
        full = [(*fixed, *(word for word in line if key_of(word) in self._swept)) for line in lines]
        batch = dict.fromkeys(full)  # the sweeper may choose one twice
        points = points_of(self._kind, self._settings, [list(line) for line in batch], self._swept)
        for point in points:
            ledger.plan(point)
        outcomes = build_launcher(self.sweep(points)).run(points, ledger)
        self._found |= {one.point.label: one for one in outcomes}
        if exit_code(outcomes) == RESUME:
            raise _AskedToEndError
        values = dict(zip(batch, map(self._value, outcomes), strict=True))
        return [values[line] for line in full]

    def _value(self, outcome: Outcome) -> float | None:
        if outcome.state != "complete":
            return None
        return value_of(read_run(outcome.point.folder, outcome.point.label), self.measure)
