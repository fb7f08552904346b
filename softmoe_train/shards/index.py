"""This file owns publishing what tars hold: every tar read once by one of several processes, then the index beside them; and its proof."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import torch

from softmoe_train.cores import usable_cores
from softmoe_train.data.index import Shard, index_shards, make_index
from softmoe_train.data.published import INDEX, MAX_INDEX, SUFFIX, Entry, parse_index, publish_index, unpack
from softmoe_train.observe.console import ProgressKind
from softmoe_train.shards.processes import in_processes
from softmoe_train.shards.progress import shown_progress
from softmoe_train.shards.settings import IndexSettings, StoppedError, local_shards


class Indexed(NamedTuple):
    """What was indexed or verified: the index.json of each folder, shards, samples, and what is wrong."""

    indexes: list[str]
    shards: int
    samples: int
    problems: list[str]


class _Proof(NamedTuple):
    """A tar, and what a folder's index says of it."""

    path: str
    folder: str
    entry: Entry


def index_data(settings: IndexSettings) -> Indexed:
    """Publish the index of every tar that `data` names, or prove the index that is there; raises StoppedError where none can be written."""
    paths = local_shards(settings.data, key="data")
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(settings.out or os.path.dirname(path), []).append(path)
    if settings.verify:
        return _verify(settings, folders)
    if settings.out is None:
        folders = {folder: _with_indexed_before(folder, of) for folder, of in folders.items()}
    return publish(folders, settings.processes, settings.progress)


def publish(folders: dict[str, list[str]], processes: int | None, progress: ProgressKind) -> Indexed:
    """Write into each folder the index of its tars; nothing where one of them is damaged."""
    folders = {folder: list(map(os.path.abspath, of)) for folder, of in folders.items()}  # as indexes are cached
    paths = [path for of in folders.values() for path in of]
    made: dict[str, Shard] = {}
    problems = []
    results = in_processes(_index, paths, processes or usable_cores(), named=str)
    pairs = ((one, _size(one)) for one in results)
    total = sum(os.path.getsize(path) for path in paths) >> 20
    for one in shown_progress(pairs, what="indexed", unit="MiB", total=total, kind=progress):
        if isinstance(one, Shard):
            made[one.path] = one
        else:
            problems.append(one)
    if problems:
        return Indexed([], len(made), sum(shard.count for shard in made.values()), problems)
    try:
        indexes = [publish_index([made[path] for path in of], folder) for folder, of in folders.items()]
    except (ValueError, OSError) as error:
        raise StoppedError(f"the index cannot be written: {error}") from None
    return Indexed(indexes, len(made), sum(shard.count for shard in made.values()), [])


def _index(path: str) -> Shard | str:
    try:
        [shard] = index_shards([path])
        return shard
    except (ValueError, OSError) as error:
        return str(error)


def _size(one: Shard | str) -> int:
    return one.size >> 20 if isinstance(one, Shard) else 0


def _with_indexed_before(folder: str, paths: list[str]) -> list[str]:
    """The tars, and those beside them that the folder's index lists: it goes on listing them."""
    try:
        before = [os.path.join(folder, name) for name in _entries(folder)]
    except (ValueError, OSError):  # there is none, or none that could be read: it is written anew
        return paths
    return sorted({*paths, *filter(os.path.isfile, before)})


def _entries(folder: str) -> dict[str, Entry]:
    path = Path(folder, INDEX)
    with open(path, "rb") as file:
        return parse_index(file.read(MAX_INDEX), str(path))


def _verify(settings: IndexSettings, folders: dict[str, list[str]]) -> Indexed:
    """Compare what indexes say of each tar with what it is now."""
    problems, proofs = [], []
    for folder, paths in folders.items():
        try:
            entries = _entries(folder)
        except FileNotFoundError:
            problems.append(f"{folder} has no {INDEX}: there is nothing to verify; leave verify= out to make it")
            continue
        except ValueError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{path} is not listed in {folder}/{INDEX}" for path in paths if os.path.basename(path) not in entries
        ]
        proofs += [_Proof(path, folder, entries[name]) for path in paths if (name := os.path.basename(path)) in entries]
        if settings.out is None:
            gone = [name for name in entries if not os.path.isfile(os.path.join(folder, name))]
            problems += [f"{folder}/{INDEX} lists {name}, which is not there" for name in gone]
    results = in_processes(_prove, proofs, settings.processes or usable_cores(), named=lambda proof: proof.path)
    pairs = ((one, proof.entry.size >> 20) for one, proof in zip(results, proofs, strict=True))
    total = sum(proof.entry.size for proof in proofs) >> 20
    for found in shown_progress(pairs, what="verified", unit="MiB", total=total, kind=settings.progress):
        problems += [found] if found is not None else []
    samples = sum(proof.entry.count for proof in proofs)
    return Indexed([f"{folder}/{INDEX}" for folder in folders], len(proofs), samples, problems)


def _prove(proof: _Proof) -> str | None:
    """What a tar has that its published index does not say, or otherwise: read anew, past any cache."""
    path, folder, entry = proof
    origin = os.path.join(folder, entry.name + SUFFIX)
    try:
        shard, tensors = make_index(path, os.stat(path))
        said = (entry.count, entry.size, entry.sha256)
        if said != (shard.count, shard.size, shard.sha256):
            return f"{path} is not what {folder}/{INDEX} says: {_told(*said)} there, {_told(shard.count, shard.size, shard.sha256)} now"
        with open(origin, "rb") as file:
            data = file.read(entry.index_size + 1)
        if (len(data), hashlib.sha256(data).hexdigest()) != (entry.index_size, entry.index_sha256):
            return f"{origin} is not what {folder}/{INDEX} says: publish the index again"
        published = unpack(data, shard, origin).tensors
    except (ValueError, OSError) as error:
        return str(error)
    wrong = [name for name, tensor in tensors.items() if not torch.equal(tensor, published[name])]
    return f"{origin} tells {', '.join(wrong)} otherwise than {path} is: publish the index again" if wrong else None


def _told(count: int, size: int, sha256: str) -> str:
    return f"{count:,} samples, {size:,} bytes, SHA-256 {sha256[:12]}"
