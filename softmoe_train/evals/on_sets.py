"""This file owns which evaluators of features a run has: few-shot, k-NN and linear probe, their sets, and every check of these."""

import json
from collections.abc import Mapping
from typing import Any

from softmoe_train.config import ConfigError
from softmoe_train.dist import World, gather_texts
from softmoe_train.evals import fewshot, knn, probe
from softmoe_train.evals.features import Over, Shared
from softmoe_train.evals.fewshot import FewshotConfig, FewshotEvaluator, build_fewshot, shot_problems
from softmoe_train.evals.knn import KnnConfig, KnnEvaluator, build_pool_sets, neighbour_problems
from softmoe_train.evals.probe import ProbeConfig, ProbeEvaluator, probe_problems
from softmoe_train.evals.sets import MeasuredSet, NamedSet, SetsConfig, measured_set, named_sets, read_part_of_sets

FeatureEvaluator = FewshotEvaluator | KnnEvaluator | ProbeEvaluator
FeatureConfigs = Mapping[str, SetsConfig]  # by source, in the order in which evaluators run


def feature_configs(
    few: FewshotConfig | None, near: KnnConfig | None, linear: ProbeConfig | None
) -> dict[str, SetsConfig]:
    """What is switched on, by source; k-NN and the probe measure on the sets of few-shot where they have none of their own."""
    every: dict[str, SetsConfig | None] = {fewshot.SOURCE: few, knn.SOURCE: near, probe.SOURCE: linear}
    return {source: one for source, one in every.items() if one is not None}


def feature_problems(configs: FeatureConfigs, image_size: int) -> list[str]:
    """Every mistake in the sets that shows before a shard is read."""
    return [problem for source in configs for problem in _sets_of(source, configs, image_size)[1]]


def feature_measures(configs: FeatureConfigs) -> dict[str, list[str]]:
    """The names after `<source>/` that every evaluation has a value for, by source."""
    return {
        source: fewshot.measures(one)
        if isinstance(one, FewshotConfig)
        else [f"{name}/top1" for name in sorted(_lender(source, configs).sets)]
        for source, one in configs.items()
    }


class FeatureSets:
    """The sets of all evaluators of features as their shards hold them, each read once; every rank makes one."""

    def __init__(self, configs: FeatureConfigs, *, image_size: int, world: World) -> None:
        """Read indexes and labels, shared by the ranks of a host. Raises ConfigError on every rank, with all that is wrong."""
        named = {source: _sets_of(source, configs, image_size)[0] for source in configs}
        every = list({one.key: one for sets in named.values() for one in sets}.values())
        _agree(read_part_of_sets(every, part=world.local_rank % world.local_size, parts=world.local_size))
        measured, problems = _read(every)
        self.configs, self.image_size, self.world = configs, image_size, world
        self.sets = {
            source: [measured[one.key] for one in sets if one.key in measured] for source, sets in named.items()
        }
        _agree(problems + [problem for source in configs for problem in self._problems(source)])
        seen = gather_texts([json.dumps({one.named.key: one.facts for one in measured.values()}, sort_keys=True)])
        if len(seen) > 1:
            _agree(
                [f"evals: the ranks do not see the same sets ({' and '.join(seen)}); give every host the same files"]
            )

    def _problems(self, source: str) -> list[str]:
        match self.configs[source]:
            case FewshotConfig() as few:
                return [problem for one in self.sets[source] for problem in shot_problems(few, one)]
            case KnnConfig() as near:
                return [problem for one in self.sets[source] for problem in neighbour_problems(near, one)]
            case ProbeConfig() as linear:
                return [problem for one in self.sets[source] for problem in probe_problems(linear, one)]
        raise AssertionError(source)

    def evaluators(self, over: Over) -> dict[str, FeatureEvaluator]:
        """An evaluator of each source, which read the features of one kind of weights together."""
        shared = Shared()
        return {source: self._evaluator(source, shared, over) for source in self.configs}

    def _evaluator(self, source: str, shared: Shared, over: Over) -> FeatureEvaluator:
        sets = self.sets[source]
        how: dict[str, Any] = {"image_size": self.image_size, "world": self.world}
        match self.configs[source]:
            case FewshotConfig() as few:
                return build_fewshot(few, sets, shared, over, **how)
            case KnnConfig() as near:
                return KnnEvaluator(near, build_pool_sets(source, near.batch_size, sets, shared, **how), shared, over)
            case ProbeConfig() as linear:
                return ProbeEvaluator(
                    linear, build_pool_sets(source, linear.batch_size, sets, shared, **how), shared, over
                )
        raise AssertionError(source)


def _lender(source: str, configs: FeatureConfigs) -> SetsConfig:
    """Whose sets an evaluator measures on: its own, or those of few-shot where it has none."""
    own = configs[source]
    return own if own.sets else configs.get(fewshot.SOURCE, own)


def _sets_of(source: str, configs: FeatureConfigs, image_size: int) -> tuple[list[NamedSet], list[str]]:
    lender = _lender(source, configs)
    where = source if lender is configs[source] else fewshot.SOURCE
    sets, problems = named_sets(where, lender, image_size)
    return sets, problems if where == source else []  # told once


def _read(sets: list[NamedSet]) -> tuple[dict[str, MeasuredSet], list[str]]:
    measured, problems = {}, []
    for one in sets:
        try:
            measured[one.key] = measured_set(one)
        except ValueError as error:
            problems.append(str(error))
    return measured, problems


def _agree(problems: list[str]) -> None:
    """Raise ConfigError on every rank where any has a problem."""
    every = gather_texts(problems)
    if every:
        raise ConfigError(every)
