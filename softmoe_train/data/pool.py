"""This file owns a set of labelled pictures from which some are chosen: its labels, read once a shard and kept beside the index.

N samples of the set, numbered in the order of its shards.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from softmoe_train.data.catalog import Catalog
from softmoe_train.data.decode import NotAsIndexedError, UnreadableSampleError
from softmoe_train.data.index import Shard, index_folder, write_index
from softmoe_train.data.labels import Labels, build_labels, classes_hash
from softmoe_train.data.places import ShardsError
from softmoe_train.data.read import SampleReader
from softmoe_train.data.records import WebDatasetConfig
from softmoe_train.data.remote import Remote
from softmoe_train.data.select import Chosen, build_rules
from softmoe_train.data.sources import NamedSpec, Source, indexed

UNREADABLE = -1  # in the place of a label
_ANY = 1 << 62  # more classes than there are labels: they are what the shards say
_FORMAT = 1  # part of a cache file's name: raise it when what is kept changes


@dataclass(frozen=True)
class Pool:
    """Samples that remain of some shards, and the label of each (N), `UNREADABLE` where it cannot be read."""

    source: Source
    labels: NDArray[np.int64]
    catalog: Catalog

    def narrowed(self, numbers: NDArray[np.int64]) -> Source:
        """The source of these samples alone (ascending numbers), without the shards that have none of them."""
        shards, chosen = [], []
        for shard, one, start in self._shards():
            count = one.count(shard)
            mine = numbers[(numbers >= start) & (numbers < start + count)] - start
            if len(mine):
                shards.append(shard)
                chosen.append(one._replace(kept=mine if one.kept is None else one.kept[mine]))
        return Source(shards, chosen)

    def keys(self, numbers: NDArray[np.int64]) -> list[str]:
        """The keys of these samples (ascending numbers)."""
        source = self.narrowed(numbers)
        keys = []
        for shard, one in zip(*source, strict=True):
            assert one.kept is not None, shard.path
            samples = self.catalog.samples(shard)
            keys += [samples.key(index) for index in one.kept.tolist()]
        return keys

    def _shards(self) -> Iterator[tuple[Shard, Chosen, int]]:
        start = 0
        for shard, one in zip(*self.source, strict=True):
            yield shard, one, start
            start += one.count(shard)


def read_pool(named: NamedSpec, cfg: WebDatasetConfig) -> Pool:
    """The samples that a key of `cfg` names, with their labels; raises ValueError where it names none, or no file for its labels."""
    catalog, how = Catalog(Remote(cfg.cache)), _how(cfg)
    source = indexed(named, build_rules(cfg), catalog)
    labels = []
    for shard, one in zip(*source, strict=True):
        raw = _labels_of(shard, how, catalog)
        labels.append(raw if one.kept is None else raw[one.kept])
    every = np.concatenate(labels)
    if how.places is not None:
        every = np.asarray([how.places.get(label, UNREADABLE) for label in every.tolist()], np.int64)
    return Pool(source, every, catalog)


def read_labels(named: NamedSpec, cfg: WebDatasetConfig, *, part: int, parts: int) -> list[str]:
    """Read the labels of every `parts`-th tar from `part` on, so that processes that share a cache share the reading.

    Returns a message for each tar that cannot be read to its end.
    """
    problems: list[str] = []
    try:
        catalog, how, rules = Catalog(Remote(cfg.cache)), _how(cfg), build_rules(cfg)
        paths = catalog.paths(named.spec, key=named.key)
    except ValueError as error:
        return [_told(named.key, error)]
    for path in sorted(paths)[part::parts]:
        try:
            for shard in catalog.shards([path], fresh=True):
                rules.choose(shard, catalog)
                _labels_of(shard, how, catalog)
        except ValueError as error:
            problems.append(_told(named.key, error))
    return problems


def _told(key: str, error: ValueError) -> str:
    said = str(error)
    return said if said.startswith(("data.", key)) else f"{key}: {said}"


def _how(cfg: WebDatasetConfig) -> Labels:
    how = build_labels(cfg, _ANY)
    assert how is not None and how.kind == "hard", cfg.labels
    return how


def _labels_of(shard: Shard, how: Labels, catalog: Catalog) -> NDArray[np.int64]:
    """The label of every sample of a shard as its member says it: from the cache, or else read now and cached."""
    names = None if how.names is None else classes_hash(list(how.names))
    name = json.dumps([_FORMAT, shard.sha256, shard.count, how.field, names])
    cached = index_folder() / f"labels-{hashlib.sha256(name.encode()).hexdigest()}.safetensors"
    try:
        with safe_open(cached, framework="pt") as file:
            labels = file.get_tensor("labels").numpy()
        if len(labels) == shard.count:
            return labels
    except (OSError, SafetensorError, ValueError):  # absent, or cut off by a full disk
        pass
    labels = np.full(shard.count, UNREADABLE, np.int64)
    reader = SampleReader([shard], catalog, labels=replace(how, places=None), text=None, max_pixels=1)
    for index in range(shard.count):
        try:
            labels[index] = max(how.numbers_of(reader.label(0, index))[0], UNREADABLE)
        except NotAsIndexedError as error:  # not cached: it may be mended
            key = catalog.samples(shard).key(index)
            raise ShardsError(f"the label of sample {key} of {shard.path} cannot be read: {error}.") from None
        except UnreadableSampleError:
            continue
    reader.close()
    write_index(cached, {"labels": torch.from_numpy(labels)}, {})
    return labels
