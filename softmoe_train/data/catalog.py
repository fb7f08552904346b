"""This file owns the way from a specification to indexed shards, wherever they lie and whoever made the index."""

import os
from collections.abc import Iterator
from pathlib import Path

from softmoe_train.data.index import Samples, Shard, index_shards, samples_of
from softmoe_train.data.places import ShardsError, expand_shards, is_url
from softmoe_train.data.published import INDEX, MAX_INDEX, Entry, parse_index
from softmoe_train.data.records import ShardSpec
from softmoe_train.data.remote import Remote

_REMEDY = "index the folder again (`softmoe shards index`), or delete its index.json."


class Catalog:
    """The tars that specifications name, one after the other, as their indexes describe them."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self._listed: dict[str, dict[str, Entry] | None] = {}

    def paths(self, spec: ShardSpec | None, *, key: str) -> list[str]:
        """The paths and URLs of the tars, in order; raises ValueError with the remedy."""
        try:
            paths = expand_shards(spec, key=key, listing=self.remote)
        except ShardsError as error:
            told = str(error)
            raise ShardsError(told if told.startswith(key) else f"{key}={spec}: {told}") from None
        for folder in [spec] if isinstance(spec, str) else spec or []:
            if not is_url(folder) and Path(folder).expanduser().is_dir():
                self._check_whole(os.path.abspath(os.path.expanduser(folder)), paths)
        return paths

    def shards(self, paths: list[str], *, fresh: bool) -> Iterator[Shard]:
        """Each indexed; by reading it where no index is published. `fresh` asks servers whether what was read is still there."""
        for number, path in enumerate(paths, 1):
            if is_url(path):
                yield self.remote.shard(path, fresh=fresh, told=f"{number} of {len(paths)}: ")
            else:
                yield self._local(path) or next(index_shards([path]))

    def samples(self, shard: Shard) -> Samples:
        """What a shard holds; raises ValueError where it has changed since."""
        return (
            samples_of(shard) if shard.index_sha256 is None and not is_url(shard.path) else self.remote.samples(shard)
        )

    def _local(self, path: str) -> Shard | None:
        folder, name = os.path.split(path)
        entry = (self._published(folder) or {}).get(name)
        if entry is None:
            return None
        facts = os.stat(path)
        if facts.st_size != entry.size:
            raise ShardsError(
                f"{path} has {facts.st_size} bytes, and {folder}/{INDEX} says {entry.size}: one is not of the other; {_REMEDY}"
            )
        return entry.shard(path, facts.st_mtime_ns)

    def _check_whole(self, folder: str, paths: list[str]) -> None:
        """Raise ShardsError where a folder and its index do not list the same tars."""
        listed = self._published(folder)
        if listed is None:
            return
        there = {os.path.basename(path) for path in paths if os.path.dirname(path) == folder}
        for name in sorted(there ^ listed.keys()):
            said = f"lists {name}, which is not there" if name in listed else f"does not list {name}"
            raise ShardsError(f"{folder}/{INDEX} {said}: {_REMEDY}")

    def _published(self, folder: str) -> dict[str, Entry] | None:
        if folder not in self._listed:
            path = os.path.join(folder, INDEX)
            try:
                with open(path, "rb") as file:
                    self._listed[folder] = parse_index(file.read(MAX_INDEX), path)
            except FileNotFoundError:
                self._listed[folder] = None
            except OSError as error:
                raise ShardsError(f"{path} cannot be read ({error.strerror}): {_REMEDY}") from None
        return self._listed[folder]
