"""This file owns which samples of a shard are read at all: those that data.keep and data.quarantine leave.

What remains of a shard is worked out once, when it is first met with these rules, and kept beside the indexes; its labels are read
only where data.keep.labels asks for them.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from softmoe_train.data.catalog import Catalog
from softmoe_train.data.decode import NotAsIndexedError, UnreadableSampleError
from softmoe_train.data.index import Shard, index_folder, write_index
from softmoe_train.data.keyed import place_number
from softmoe_train.data.labels import Labels, classes_hash, kept_numbers, read_classes
from softmoe_train.data.places import ShardsError
from softmoe_train.data.quarantine import read_quarantine
from softmoe_train.data.read import SampleReader
from softmoe_train.data.records import Part, WebDatasetConfig, path_of
from softmoe_train.plain import plain, the_first

_FORMAT = 1  # part of a cache file's name: raise it when what is kept changes
_SHOWN = 20  # labels or entries in a message


class Chosen(NamedTuple):
    """What remains of a shard, and why the rest does not."""

    kept: NDArray[np.int64] | None  # numbers of samples, ascending; None: all of them
    labels: dict[int, int]  # how many samples have each label, where labels decide
    unlabelled: int  # samples whose label cannot be read, where labels decide: they do not match
    quarantined: list[str]  # keys

    def count(self, shard: Shard) -> int:
        """How many samples remain."""
        return shard.count if self.kept is None else len(self.kept)


@dataclass(frozen=True)
class Rules:
    """What decides whether a sample is read."""

    labels: Labels | None  # how they are read, where they decide
    wanted: frozenset[int]
    names: str | None  # a hash of the class names
    keys: str | None
    listed: dict[str, frozenset[str]]  # keys in quarantine by the hash of their shard
    holdout: float | None  # the share of keys that is held out, where that decides
    held_out: bool  # whether that share is what is read, or the rest

    def choose(self, shard: Shard, catalog: Catalog) -> Chosen:
        """What remains of `shard`: from the cache, or else worked out now and cached."""
        listed = self.listed.get(shard.sha256, frozenset())
        if self.labels is None and self.keys is None and not listed and self.holdout is None:
            return Chosen(None, {}, 0, [])
        how = None if self.labels is None else [self.labels.kind, self.labels.field, self.names, sorted(self.wanted)]
        held = [] if self.holdout is None else [[self.holdout, self.held_out]]
        name = json.dumps([_FORMAT, shard.sha256, shard.count, how, self.keys, sorted(listed), *held])
        cached = index_folder() / f"kept-{hashlib.sha256(name.encode()).hexdigest()}.safetensors"
        try:
            return _read(cached)
        except (
            FileNotFoundError,
            SafetensorError,
            KeyError,
            ValueError,
            TypeError,
        ):  # absent, or cut off by a full disk
            pass
        chosen = self._work_out(shard, catalog, listed)
        told = {
            "labels": list(chosen.labels.items()),
            "unlabelled": chosen.unlabelled,
            "quarantined": chosen.quarantined,
        }
        kept = np.zeros(0, np.int64) if chosen.kept is None else chosen.kept
        write_index(cached, {"kept": torch.from_numpy(kept)}, {"told": json.dumps(told)})
        return chosen

    def _work_out(self, shard: Shard, catalog: Catalog, listed: frozenset[str]) -> Chosen:
        keys = catalog.samples(shard).keys()
        pattern = None if self.keys is None else re.compile(self.keys)
        quarantined = [key for key in keys if key in listed]
        keep = np.asarray([key not in listed and (pattern is None or bool(pattern.search(key))) for key in keys], bool)
        if self.holdout is not None:
            keep &= np.asarray([is_held_out(key, self.holdout) == self.held_out for key in keys], bool)
        counts: Counter[int] = Counter()
        unlabelled = 0
        if self.labels is not None:
            reader = SampleReader([shard], catalog, labels=self.labels, text=None, max_pixels=1)
            for index, key in enumerate(keys):
                if key in listed:
                    continue
                try:
                    numbers = self.labels.numbers_of(reader.label(0, index))
                    counts.update(set(numbers))
                    keep[index] &= not self.wanted.isdisjoint(numbers)
                except (
                    NotAsIndexedError
                ) as error:  # what is left out by its label stays so, in the cache, when that is mended
                    raise ShardsError(
                        f"data.keep.labels: sample {key} of {shard.path} cannot be chosen ({error}): mend the disk or the shard, or list "
                        f"the sample in data.quarantine."
                    ) from None
                except UnreadableSampleError:
                    unlabelled += 1
                    keep[index] = False
            reader.close()
        return Chosen(np.flatnonzero(keep).astype(np.int64), dict(sorted(counts.items())), unlabelled, quarantined)


def is_held_out(key: str, share: float) -> bool:
    """Whether a training sample belongs to the held-out `share`: a matter of its key alone, and so of no order, seed or shard."""
    return int(place_number(f"held out {key}")) < share * 2.0**64


def build_rules(cfg: WebDatasetConfig, part: Part = "train") -> Rules:
    """What the configuration says is read of a part; raises ValueError where a file that it names is not what it should be."""
    names = None if cfg.classes is None else read_classes(cfg.classes)
    numbered = None if names is None else {name: n for n, name in enumerate(names)}
    wanted = kept_numbers(cfg, numbered)
    labels = None
    if wanted is not None and cfg.labels != "none":
        labels = Labels(cfg.labels, path_of(cfg.label), numbered, None, 0)
    listed: dict[str, set[str]] = {}
    for one in [] if cfg.quarantine is None else read_quarantine(cfg.quarantine):
        listed.setdefault(one.sha256, set()).add(one.key)
    return Rules(
        labels,
        frozenset(wanted or ()),
        None if names is None else classes_hash(names),
        cfg.keep.keys,
        {sha256: frozenset(keys) for sha256, keys in listed.items()},
        None if part == "test" else cfg.holdout,
        part == "val",
    )


def nothing_left(key: str, spec: object, shards: list[Shard], chosen: Iterable[Chosen]) -> str:
    """Why none of the samples that `key` names is read."""
    labels: Counter[int] = Counter()
    for one in chosen:
        labels.update(one.labels)
    there = ", ".join(f"{label}: {count}" for label, count in labels.most_common(_SHOWN))
    more = f" and {len(labels) - _SHOWN} other labels" if len(labels) > _SHOWN else ""
    counts = f"; by label there are {there}{more}" if labels else ""
    return (
        f"data.keep, data.holdout and data.quarantine leave none of the {sum(shard.count for shard in shards)} samples of {key}={spec}{counts}; "
        f"keep labels and keys that are there."
    )


def kept_facts(cfg: WebDatasetConfig, shards: list[Shard], chosen: list[Chosen]) -> dict[str, object]:
    """What of the choice decides an order, as JSON: only what is set, so that without it a fingerprint is as it was."""
    facts: dict[str, object] = {}
    if cfg.keep.labels is not None or cfg.keep.keys is not None:
        facts["keep"] = cfg.keep.model_dump()
    if cfg.holdout is not None:
        facts["holdout"] = cfg.holdout
    gone = sorted([shard.sha256, key] for shard, one in zip(shards, chosen, strict=True) for key in one.quarantined)
    if gone:
        facts["quarantine"] = hashlib.sha256(json.dumps(gone).encode()).hexdigest()
    return facts


def told_of_keep(cfg: WebDatasetConfig, shards: list[Shard], chosen: list[Chosen]) -> list[str]:
    """What data.keep and data.quarantine leave of these shards, where they are set."""
    if cfg.keep.labels is None and cfg.keep.keys is None and cfg.quarantine is None and cfg.holdout is None:
        return []
    left = sum(one.count(shard) for shard, one in zip(shards, chosen, strict=True))
    unlabelled = sum(one.unlabelled for one in chosen)
    also = f"; {unlabelled} have no label that can be read, and are left out too" if unlabelled else ""
    return [f"{left} of {sum(shard.count for shard in shards)} samples remain{also}"]


def told_of_quarantine(cfg: WebDatasetConfig, shards: list[Shard], chosen: list[Chosen]) -> list[str]:
    """How many samples the quarantine lists, which shards have them, and which of them nothing here has."""
    if cfg.quarantine is None:
        return []
    path, listed = cfg.quarantine, read_quarantine(cfg.quarantine)
    by_shard = Counter[str]()
    for shard, one in zip(shards, chosen, strict=True):
        by_shard[os.path.basename(shard.path)] += len(one.quarantined)
    places = ", ".join(f"{name} {count}" for name, count in by_shard.most_common(_SHOWN) if count)
    there = {(shard.sha256, key) for shard, one in zip(shards, chosen, strict=True) for key in one.quarantined}
    unmatched = [one for one in listed if (one.sha256, one.key) not in there]
    told = [
        f"data.quarantine={path} lists {len(listed)} samples, of which {len(listed) - len(unmatched)} are here and left out"
        + (f": {places}" if places else "")
    ]
    if unmatched:
        known = {shard.sha256 for shard in shards}
        names = the_first([f"{plain(one.shard)} {plain(one.key)}" for one in unmatched], _SHOWN)
        why = f"{sum(one.sha256 in known for one in unmatched)} of them name a tar that is here and a key that is not"
        told.append(f"data.quarantine={path}: {len(unmatched)} match no sample here ({why}): {names}")
    return told


def _read(file: Path) -> Chosen:
    with safe_open(file, framework="pt") as cached:
        told = json.loads(cached.metadata()["told"])
        kept = cached.get_tensor("kept").numpy()  # mapped, not read
    return Chosen(kept, {int(k): int(n) for k, n in told["labels"]}, int(told["unlabelled"]), list(told["quarantined"]))
