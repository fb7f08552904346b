"""This file owns a check from its beginning to its end: every shard of a data configuration looked through, and what all of them are together."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softmoe_train.cores import usable_cores
from softmoe_train.data import WebDatasetConfig, check_streams
from softmoe_train.data.index import Shard, samples_of
from softmoe_train.data.labels import build_labels, kept_numbers
from softmoe_train.data.published import INDEX, MAX_INDEX, parse_index
from softmoe_train.data.sources import training_specs
from softmoe_train.shards.examine import Examine, Examined, Task
from softmoe_train.shards.findings import Finding, Tally
from softmoe_train.shards.processes import in_processes
from softmoe_train.shards.progress import shown_progress
from softmoe_train.shards.settings import CheckSettings, local_shards
from softmoe_train.shards.spread import Spread


@dataclass
class Whole:
    """What one split is, as far as it has been looked through."""

    shards: int = 0
    samples: int = 0
    good: int = 0
    bytes: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    pixels: Spread = field(default_factory=lambda: Spread.of([]))
    sizes: Spread = field(default_factory=lambda: Spread.of([]))
    aspect: Spread = field(default_factory=lambda: Spread.of([]))

    def add(self, one: Examined) -> None:
        """Take a shard in."""
        self.shards += 1
        self.good += one.good
        self.samples += one.shard.count if one.shard is not None else 0
        self.bytes += one.shard.size if one.shard is not None else 0
        self.labels.update(one.labels)
        self.pixels, self.sizes, self.aspect = (
            self.pixels + one.pixels,
            self.sizes + one.bytes,
            self.aspect + one.aspect,
        )


@dataclass(frozen=True)
class Feeding:
    """Whether the training split can feed a layout: the worlds that it could, and steps of one pass."""

    batch_size: int
    streams: int
    ranks: int
    worlds: list[int]
    steps: float


@dataclass(frozen=True)
class Checked:
    """All that was found."""

    splits: dict[str, Whole]
    tally: Tally
    feeding: Feeding
    num_classes: int


def check_shards(settings: CheckSettings, data: WebDatasetConfig, *, num_classes: int, batch_size: int) -> Checked:
    """Look through every shard that `data` names; raises StoppedError where a worker died."""
    tally, keys, shards, specs = Tally(), [], [], specs_of(data)
    published = _published(specs, tally)
    tasks = [Task(split, path, published.get(path)) for split, paths in specs.items() for path in paths]
    labels = build_labels(data, num_classes)
    kept = None if labels is None else kept_numbers(data, labels.names)
    examine = Examine(labels, None if kept is None else set(kept), data.keep.keys, data.max_pixels)
    splits = {split: Whole() for split in specs}
    results = in_processes(examine, tasks, settings.processes or usable_cores(), named=lambda task: task.path)
    pairs = ((one, 1) for one in results)
    for one in shown_progress(pairs, what="looked through", unit="shards", total=len(tasks), kind=settings.progress):
        splits[one.task.split].add(one)
        shards.append((one.task.split, one.shard))
        keys.append(one.keys)
        for finding in one.findings:
            tally.add(finding)
    for finding in (*_same_keys(shards, keys), *_same_pictures(shards)):
        tally.add(finding)
    feeding = _feeding(splits["train"], data.streams, batch_size, settings.ranks or 1)
    for problem in check_streams(data.streams, batch_size, feeding.ranks) + _empty(splits["train"]):
        tally.add(Finding("layout", "train", "", "", "", problem))
    return Checked(splits, tally, feeding, num_classes)


def specs_of(data: WebDatasetConfig) -> dict[str, list[str]]:
    """The tars of each split; raises ValueError where one is named that is not there."""
    train = [path for key, spec in training_specs(data) for path in local_shards(spec, key=key)]
    specs = {"train": list(dict.fromkeys(train))}  # two sources of a mixture may share tars
    return specs if data.test is None else {**specs, "test": local_shards(data.test, key="data.test")}


def _published(specs: dict[str, list[str]], tally: Tally) -> dict[str, str]:
    """The hash of each tar by the index that was published beside it; an index that is none is a finding."""
    known: dict[str, str] = {}
    for folder, split in {os.path.dirname(path): split for split, paths in specs.items() for path in paths}.items():
        path = Path(folder, INDEX)
        if path.is_file():
            try:
                with open(path, "rb") as file:
                    entries = parse_index(file.read(MAX_INDEX), str(path))
            except (ValueError, OSError) as error:
                tally.add(Finding("not what its index says", split, INDEX, "", "", str(error)))
                continue
            known |= {os.path.join(folder, name): entry.sha256 for name, entry in entries.items()}
    return known


def _same_keys(shards: list[tuple[str, Shard | None]], keys: list[NDArray[np.uint64]]) -> list[Finding]:
    """What is to be said of keys that several shards of a split have: a key alone does not say which sample it is."""
    found = []
    for split in dict.fromkeys(split for split, _ in shards):
        of = [n for n, (one, shard) in enumerate(shards) if one == split and shard is not None]
        # Once a shard: a key that is twice in one is told there.
        hashes = np.concatenate([np.unique(keys[n]) for n in of] or [np.zeros(0, np.uint64)])
        values, times = np.unique(hashes, return_counts=True)
        twice = values[times > 1]
        if len(twice):
            n = next(n for n in of if np.isin(keys[n], twice).any())
            shard = shards[n][1]
            assert shard is not None
            key = samples_of(shard).key(int(np.flatnonzero(np.isin(keys[n], twice))[0]))
            reason = f"{len(twice):,} keys are in more than one shard"
            found.append(Finding("same key in several shards", split, os.path.basename(shard.path), "", key, reason))
    return found


def _same_pictures(shards: list[tuple[str, Shard | None]]) -> list[Finding]:
    """What is to be said of test pictures that are training pictures too, byte by byte."""
    test = [shard for split, shard in shards if split == "test" and shard is not None]
    if not test:
        return []
    known = np.unique(np.concatenate([_sums(shard) for shard in test]))
    found = []
    for split, shard in shards:
        if split == "train" and shard is not None:
            samples, base = samples_of(shard), os.path.basename(shard.path)
            both = np.isin(samples.sums["image"], known) & (samples.where["image"][:, 1] > 0)
            for n in np.flatnonzero(both).tolist():
                told = "its bytes are those of a test picture"
                found.append(Finding("same picture in train and test", split, base, shard.sha256, samples.key(n), told))
    return found


def _sums(shard: Shard) -> NDArray[np.int64]:
    samples = samples_of(shard)
    return samples.sums["image"][samples.where["image"][:, 1] > 0]


def _feeding(train: Whole, streams: int, batch_size: int, ranks: int) -> Feeding:
    worlds = [n for n in range(1, streams + 1) if streams % n == 0] if batch_size % streams == 0 else []
    return Feeding(batch_size, streams, ranks, worlds, train.good / batch_size)


def _empty(train: Whole) -> list[str]:
    return [] if train.good else ["not one sample of data.train can be used: training has nothing to read."]
