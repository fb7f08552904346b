"""This file owns the points of a sweep: what each is called, what it is composed of, and that all of them are legal before one starts."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from softmoe_train.at_end import is_complete
from softmoe_train.config import ConfigError, config_folder, expand_sweep
from softmoe_train.dist import World
from softmoe_train.faults.claim import owner
from softmoe_train.finetune import key_of
from softmoe_train.plain import the_first
from softmoe_train.settings import RunConfig
from softmoe_train.sweep.couple import EXPERTS, CoupleError, coupled, coupling_problems
from softmoe_train.sweep.naming import label_of, word_of
from softmoe_train.sweep.settings import SweepConfig

Check = Callable[[RunConfig], list[str]]
Composing = Callable[[list[str], Check], RunConfig]
Composed = Callable[[list[str]], RunConfig]  # without a check
NAMED = 6  # points that share a mistake


class Kind(NamedTuple):
    """What is swept: the verb of a point, how its overrides compose, what is checked of it, what every point is told beside."""

    verb: str
    compose: Composing
    check: Callable[[RunConfig, World | None], list[str]]
    also: tuple[str, ...] = ()
    outdated: str | None = None  # a file in the folder of a point that is of no run as soon as its point goes on
    world: World | None = None  # in which each point trains, elsewhere; None: this machine, as its settings say

    def problems(self, config: RunConfig) -> list[str]:
        """Every mistake in a point; what only the machines of its job could tell is left to them."""
        if self.world is not None and config.device == "cuda":
            config = config.model_copy(update={"device": "auto"})
        return self.check(config, self.world)


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    label: str  # the name of its folder
    overrides: list[str]
    swept: dict[str, str]  # the keys that tell it from the others, with their values
    coupled: dict[str, str]  # what follows from them
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.config.folder

    def holder(self) -> str | None:
        """Who writes in its folder, or in that of its checkpoints; None where nobody does."""
        apart = self.config.claimed_apart
        return owner(self.folder) or (owner(apart) if apart is not None else None)

    @property
    def digest(self) -> str:
        """Of all its settings but where they lie and what they are called."""
        return digest_of(self.config)


def digest_of(config: RunConfig) -> str:
    """Of all settings but where the run lies and what it is called."""
    tree = config.as_saved()
    tree["checkpoint"]["folder"] = tree["observe"]["wandb"]["group"] = None
    kept = {key: value for key, value in tree.items() if key not in ("name", "run_dir")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def grid_points(
    kind: Kind, settings: SweepConfig, overrides: list[str], progress: Callable[[int, int], object]
) -> list[Point]:
    """Every combination of the swept values, the last key fastest; raises ConfigError with the mistakes of all, each with its points."""
    swept = swept_keys(overrides)
    if not swept:
        raise ConfigError([f"no override has several values; write them as in {EXPERTS}=8,16,32, or leave -m out"])
    return points_of(kind, settings, expand_sweep(overrides), swept, progress)


def points_of(
    kind: Kind,
    settings: SweepConfig,
    lines: list[list[str]],
    swept: list[str],
    progress: Callable[[int, int], object] = lambda _, __: None,
) -> list[Point]:
    """The points of these lines of overrides, which differ in the keys `swept`; raises ConfigError with all their mistakes."""
    given = [key_of(word) for word in lines[0] if key_of(word) not in swept]
    problems = coupling_problems(settings, swept, given)
    problems += [
        f"sweep.couple={{{key}: {settings.couple[key]!r}}}: every point of this sweep has {word}; leave the coupling out"
        for word in kind.also
        if (key := key_of(word)) in settings.couple
    ]
    problems += [
        f"{key}: it is that of the whole sweep; give one" for key in ("run_dir", "checkpoint.folder") if key in swept
    ]
    if problems:
        raise ConfigError(problems)
    points: list[Point] = []
    # Composing takes half a second, and what names the folders is the same for most points.
    composed = cache(lambda words: kind.compose(list(words), lambda _: []))
    wrong: dict[str, list[str]] = defaultdict(list)  # labels, by mistake
    for count, words in enumerate(lines, start=1):
        label = label_of(words, swept)
        try:
            points.append(_point(kind, settings, words, swept, lambda words: composed(tuple(words))))
        except ConfigError as error:
            for problem in error.problems:
                wrong[problem].append(label)
        except CoupleError as error:
            wrong[str(error)].append(label)
        progress(count, len(lines))
    problems = [
        problem if len(labels) == len(lines) else f"{the_first(labels, NAMED)}: {problem}"
        for problem, labels in wrong.items()
    ]
    problems += _alike(points)
    if problems:
        raise ConfigError(problems)
    return points


def swept_keys(overrides: list[str]) -> list[str]:
    """The keys that are given several values, or one that may become several (`key=choice(8)`)."""
    return [key_of(override) for override in overrides if expand_sweep([override]) != [[override]]]


def _point(kind: Kind, settings: SweepConfig, words: list[str], swept: list[str], composed: Composed) -> Point:
    label = label_of(words, swept)
    follow: list[str] = []
    if settings.fixed_slots is not False or settings.couple:
        told = [*without(words, list(map(key_of, kind.also))), *kind.also]  # what couplings read is what the point gets
        follow = coupled(settings, composed(told), lambda: composed(without(told, [EXPERTS])))
    config = _naming(words, swept, composed)
    given = set(map(key_of, words))
    folder = folder_of_sweep(words, config)
    more = [*kind.also, *follow, word_of("run_dir", str(folder / label))]
    if config.checkpoint.folder is not None:
        more.append(word_of("checkpoint.folder", f"{config.checkpoint.folder.rstrip('/')}/{label}"))
    if config.observe.wandb.group is None:
        more.append(word_of("observe.wandb.group", config.name if "name" in given else folder.name))
    if "name" not in swept:
        more.append(word_of("name", label))
    overrides = [*without(words, list(map(key_of, more))), *more]
    values, coupled_values = ({key_of(word): word.partition("=")[2] for word in some} for some in (words, follow))
    mine = {key: value for key, value in values.items() if key in swept}
    config = kind.compose(overrides, lambda config: _problems(config, kind.problems))
    return Point(label, overrides, mine, coupled_values, config)


def folder_of_sweep(words: list[str], config: RunConfig) -> Path:
    """The folder of a sweep, from the overrides of a point and what they come to: `run_dir`, or beside where a run alone would be."""
    given = "run_dir" in map(key_of, words)
    return config.folder if given else config.folder.with_name(f"{config.folder.name}-sweep")


def _naming(words: list[str], swept: list[str], composed: Composed) -> RunConfig:
    """A configuration that says how the sweep and its folders are called: without the swept keys that cannot say that, it is mostly one."""
    silent = [key for key in swept if "." in key or key in RunConfig.model_fields]
    silent = [key for key in silent if key != "name" and not (config_folder() / key).is_dir()]
    try:
        return composed(without(words, silent))
    except ConfigError:  # one that is legal only with them
        return composed(words)


def without(words: list[str], keys: list[str]) -> list[str]:
    """Overrides but those of some keys."""
    return [word for word in words if key_of(word) not in keys]


def _problems(config: RunConfig, check: Check) -> list[str]:
    """Why a point must not start; one that has come to its end needs nothing more, and one that runs was checked."""
    if is_complete(config):
        return []
    if owner(config.folder) is not None:
        apart = config.checkpoint.model_copy(update={"folder": None})
        config = config.model_copy(update={"run_dir": f"{config.run_dir}-running", "checkpoint": apart})
    return check(config)


def _alike(points: list[Point]) -> list[str]:
    """Two points in one folder, or with the same settings; or folders that are not of one sweep."""
    problems = []
    for what, key in (("folder", lambda p: str(p.folder)), ("settings", lambda p: p.digest)):
        found: dict[str, list[str]] = defaultdict(list)
        for point in points:
            found[key(point)].append(" ".join(f"{k}={v}" for k, v in point.swept.items()))
        problems += [
            f"{the_first(same, NAMED)}: these points have the same {what}; leave all but one out"
            for same in found.values()
            if len(same) > 1 and not any(other in problem for problem in problems for other in same)
        ]
    folders = sorted({str(point.folder.parent) for point in points})
    if len(folders) > 1:
        problems.append(
            f"the points would lie in {the_first(folders, NAMED)}: the sweep needs one folder; give it as run_dir=runs/mine"
        )
    return problems
