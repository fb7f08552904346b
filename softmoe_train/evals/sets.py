"""This file owns the sets that features are measured on: what the settings may say of one, and what its shards hold.

C classes of a set: the labels that its train part holds, in ascending order.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from softmoe_train.config import Record, parse
from softmoe_train.data import WebDatasetConfig, check_data
from softmoe_train.data.pool import UNREADABLE, Pool, read_labels, read_pool
from softmoe_train.data.records import CacheConfig, Count, KeepConfig, TransformConfig
from softmoe_train.data.sources import NamedSpec

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KEY = re.compile(rf"(?<![\w./])data\.(?=({'|'.join(WebDatasetConfig.model_fields)})\b)")
_SHOWN = 5  # classes in a message


class ReadConfig(Record):
    """How the pictures of a set are read: the keys of `data` that an evaluation has a use for. A set may say any of them anew."""

    cache: CacheConfig
    workers: Count
    prefetch: PositiveInt
    label: str
    classes: str | None
    keep: KeepConfig
    quarantine: str | None
    test_transform: TransformConfig
    max_pixels: PositiveInt
    max_broken: Count


class SetsConfig(Record):
    """What every evaluator of features has: when it measures, with how many images of each rank at a time, and on which sets."""

    every: Annotated[int, Field(ge=0)]  # steps; 0 only at the end
    batch_size: PositiveInt
    data: ReadConfig
    sets: dict[str, Any]  # by name: train, test, and what of `data` is another for this set


# What a set's data has no use for, as a WebDatasetConfig must say it.
_UNUSED: dict[str, Any] = {
    "kind": "webdataset", "mixture": None, "streams": 1, "shuffle_window": 1, "block": 1, "labels": "hard", "text": None, "holdout": None,
    "train_transform": {"kind": "resize", "resize": None, "antialias": True}, "randaugment": None, "mixup": None,
    "scaled_decode": False, "max_broken_fraction": None,
}  # fmt: skip


@dataclass(frozen=True)
class NamedSet:
    """A set as the settings give it: `key` is where."""

    key: str
    name: str
    data: WebDatasetConfig

    @property
    def parts(self) -> tuple[NamedSpec, NamedSpec]:
        """The keys and shards of its train and its test part."""
        return NamedSpec(f"{self.key}.train", self.data.train), NamedSpec(f"{self.key}.test", self.data.test)

    def said(self, problem: str) -> str:
        """A message about `data` as one about this set."""
        return of_set(self.key, problem)


def of_set(key: str, problem: str) -> str:
    """A message about `data` as one about the set that `key` gives."""
    return _KEY.sub(f"{key}.", problem).replace(" (data=synthetic needs none)", "")


def named_sets(source: str, config: SetsConfig, image_size: int) -> tuple[list[NamedSet], list[str]]:
    """The sets of `evals.<source>` by name, and every mistake in them that shows before a shard is read."""
    key = f"evals.{source}.sets"
    if not config.sets:
        return [], [
            f"{key}={{}}: there is no set to measure on; give {key}.NAME.train=SHARDS {key}.NAME.test=SHARDS, or leave {source} out of evals"
        ]
    sets, problems = [], []
    for name, given in sorted(config.sets.items()):
        one, found = _named_set(f"{key}.{name}", name, given, config.data)
        problems += found
        if one is not None and not found:
            told = check_data(one.data, image_size=image_size, global_batch=1, world=1, needs_test=True)
            problems += [one.said(problem) for problem in told]
            sets.append(one)
    return sets, problems


def _named_set(key: str, name: str, given: object, base: ReadConfig) -> tuple[NamedSet | None, list[str]]:
    if not _NAME.fullmatch(name):
        return None, [f"{key}: {name!r} is no name for a set, since metrics have it: use letters, digits, _ and -"]
    if not isinstance(given, dict):
        return None, [f"{key}={given!r}: a set is a mapping; give {key}.train=SHARDS {key}.test=SHARDS"]
    known = ["train", "test", *ReadConfig.model_fields]
    problems = [
        f"{key}.{other}: there is no such key; a set has {', '.join(known)}" for other in given if other not in known
    ]
    asked = {part: value for part, value in given.items() if part in known}
    tree = {**_UNUSED, "train": None, "test": None, **laid_over(base.model_dump(), asked)}
    data, found = parse(WebDatasetConfig, tree)
    problems += [of_set(key, problem if problem.startswith("data.") else f"data.{problem}") for problem in found]
    return None if data is None else NamedSet(key, name, data), problems


def laid_over(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`base` with what was given, a mapping key by key unless it is of another kind."""
    merged = dict(base)
    for key, value in given.items():
        there = base.get(key)
        alike = (
            isinstance(there, dict)
            and isinstance(value, dict)
            and value.get("kind", there.get("kind")) == there.get("kind")
        )
        merged[key] = laid_over(there, value) if alike else value  # pyright: ignore[reportArgumentType]
    return merged


def read_part_of_sets(sets: Sequence[NamedSet], *, part: int, parts: int) -> list[str]:
    """Index the shards of all sets and read their labels, as one of `parts` processes that share a cache; what is wrong with them."""
    return [
        one.said(problem)
        for one in sets
        for named in one.parts
        for problem in read_labels(named, one.data, part=part, parts=parts)
    ]


@dataclass(frozen=True)
class MeasuredSet:
    """A set as its shards hold it: `train` and `test` are the samples whose label can be read (ascending), `classes` their labels' place."""

    named: NamedSet
    train_pool: Pool
    test_pool: Pool
    classes: NDArray[np.int64]  # "C": labels
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    facts: dict[str, Any]  # what tells this set from another

    @property
    def name(self) -> str:
        """The name in metrics."""
        return self.named.name

    @property
    def unlabelled(self) -> int:
        """Samples of both parts whose label cannot be read: they are left out."""
        return sum(int((pool.labels == UNREADABLE).sum()) for pool in (self.train_pool, self.test_pool))

    def class_of(self, pool: Pool, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The class of these samples of a pool of this set, 0 to C - 1."""
        return np.searchsorted(self.classes, pool.labels[numbers])

    def class_sizes(self) -> NDArray[np.int64]:
        """How many train samples each class has."""
        return np.bincount(self.class_of(self.train_pool, self.train), minlength=len(self.classes))


def measured_set(named: NamedSet) -> MeasuredSet:
    """Read what a set holds; raises ValueError where nothing can be measured on it."""
    of_train, of_test = named.parts
    try:
        train_pool, test_pool = (read_pool(part, named.data) for part in (of_train, of_test))
    except ValueError as error:
        raise ValueError(named.said(str(error))) from None
    train, test = (np.flatnonzero(pool.labels != UNREADABLE) for pool in (train_pool, test_pool))
    for part, numbers in ((of_train, train), (of_test, test)):
        if not len(numbers):
            raise ValueError(
                f"{part.key}={part.spec}: no sample has a label that can be read; set {named.key}.label (or .classes) to what the shards hold"
            )
    classes = np.unique(train_pool.labels[train])
    if len(classes) < 2:
        raise ValueError(
            f"{of_train.key}={of_train.spec} has images of class {classes[0]} alone: nothing is told apart; name shards of two classes or more"
        )
    there, counts = np.unique(test_pool.labels[test], return_counts=True)
    lacking = ~np.isin(there, classes)
    if lacking.any():
        shown = ", ".join(f"{c} ({n} images)" for c, n in list(zip(there[lacking], counts[lacking]))[:_SHOWN])
        raise ValueError(
            f"{of_test.key}={of_test.spec} has {lacking.sum()} classes of which {of_train.key} has no image, such as {shown}: they could not be "
            f"learned; name shards that belong together, or leave those out ({named.key}.keep.labels)"
        )
    facts = {
        "classes": len(classes),
        "train": len(train),
        "test": len(test),
        "test_hash": samples_hash(test_pool, test),
    }
    return MeasuredSet(named, train_pool, test_pool, classes, train, test, facts)


def samples_hash(pool: Pool, numbers: NDArray[np.int64], places: NDArray[np.int64] | None = None) -> str:
    """What tells these samples of a pool (ascending numbers) from others: a hash of their keys, labels and places in a draw, in order."""
    columns = [pool.keys(numbers), pool.labels[numbers].tolist(), *([] if places is None else [places.tolist()])]
    named = list(zip(*columns, strict=True))
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
