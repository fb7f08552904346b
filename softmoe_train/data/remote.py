"""This file owns shards at URLs: what their folders publish, their indexes, and their bytes, by whole copies or by ranges."""

import hashlib
import json
import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from softmoe_train.data.cache import CacheError, ShardCache, open_own_folder
from softmoe_train.data.fetch import LONGEST_ASKED_WAIT, Client
from softmoe_train.data.http import FetchError, Found, MissingError, NoRangesError, Sink
from softmoe_train.data.index import PARTS, Samples, Shard, index_folder, make_index, write_index
from softmoe_train.data.places import ShardsError
from softmoe_train.data.published import INDEX, MAX_INDEX, SUFFIX, Entry, parse_index, unpack
from softmoe_train.data.records import CacheConfig

GIB = 1 << 30
_FORMAT = 1  # part of the name of an index that was made here: raise it when that changes
log = logging.getLogger(__name__)


class Remote:
    """Shards at URLs, as one process sees them; sent to worker processes without its connections and open files."""

    def __init__(self, cfg: CacheConfig) -> None:
        self.cfg = cfg
        self.client = Client(attempts=cfg.attempts, timeout=cfg.timeout)
        patience = cfg.attempts * (cfg.timeout + LONGEST_ASKED_WAIT)
        self.cache = ShardCache(_folder_of(cfg), max_bytes=int(cfg.max_gib * GIB), patience=patience)
        self._published: dict[str, dict[str, Entry] | None] = {}

    def tars(self, place: str) -> list[str]:
        """The URLs of the tars in a folder or of a glob: what its index.json lists, or else the store."""
        listed = None if "*" in place else self.published(place.rstrip("/"))
        if listed is not None:
            found = [f"{place.rstrip('/')}/{name}" for name in sorted(listed)]
        elif place.startswith("http"):
            raise FetchError(
                f"{place} is a folder without an {INDEX}, and an HTTP server lists no files: publish one (`softmoe shards index`), or "
                f"name the tars by a brace pattern, as {place.rstrip('/')}/train-{{0000..0099}}.tar."
            )
        else:
            found = self.client.tars(place)
        if not found:
            raise FetchError(f"{place} names no tar: name the folder that the shards lie in.")
        return found

    def published(self, folder: str) -> dict[str, Entry] | None:
        """What the index.json of a folder lists; None where there is none. Asked once."""
        if folder not in self._published:
            url = f"{folder}/{INDEX}"
            try:
                self._published[folder] = self._parsed(url)
            except MissingError:
                self._published[folder] = None
        return self._published[folder]

    def _parsed(self, url: str) -> dict[str, Entry]:
        """An index.json; one that cannot be read may have come without its end, where the server does not say its length."""
        for left in reversed(range(self.cfg.attempts)):
            data = self.client.read(url, limit=MAX_INDEX)
            try:
                return parse_index(data, url)
            except ShardsError:
                if not left:
                    raise
        raise AssertionError(url)

    def shard(self, url: str, *, fresh: bool, told: str = "") -> Shard:
        """A tar as its folder's index describes it; else as it was when it was indexed, now if `fresh` finds another there."""
        folder, _, name = url.rpartition("/")
        entry = (self.published(folder) or {}).get(name)
        if entry is not None:
            return entry.shard(url, 0)
        record = self._record(url)
        kept, found = _kept(record), None
        if fresh or kept is None:
            found = self.client.find(url)
        if kept is not None and (found is None or found == kept[1]):
            return kept[0]
        return self._index(url, found or Found(None, ""), record, told)

    def samples(self, shard: Shard) -> Samples:
        """What a tar at a URL holds, and one beside which an index is published: by an index that is there, or fetched and checked."""
        if shard.index_sha256 is None:
            return _mapped(self._record(shard.path), shard)
        file = index_folder() / f"{shard.index_sha256}{SUFFIX}"
        if not file.exists():
            data = self._index_bytes(shard)
            write_index(file, unpack(data, shard, shard.path + SUFFIX).tensors, {})
        return _mapped(file, shard)

    def open(self, shard: Shard) -> int | None:
        """A whole copy, open; fetched first if need be, None where there is no room for it."""
        if not self.cache.max_bytes:
            return None
        for _ in range(8):  # it may be evicted before we have opened it
            file = self.cache.find(shard.sha256, shard.size)
            if file is not None or not self.bring(shard):
                return file
        return None

    def bring(self, shard: Shard) -> bool:
        """Have a whole copy in the cache; False where there is no room for it. Raises FetchError where the bytes are others."""
        return self.cache.add(
            shard.sha256,
            shard.size,
            lambda: shard.sha256,
            lambda file: self._save(shard.path, file, shard.size, shard.sha256)[0],
        )

    def span(self, shard: Shard, start: int, size: int) -> bytes:
        """Some bytes of a tar; raises FetchError where its server gives whole files alone."""
        try:
            return self.client.span(shard.path, start, size, shard.size)
        except NoRangesError as error:
            raise NoRangesError(
                f"{error} The cache cannot take the {shard.size / GIB:.2f} GiB of it either: raise data.cache.max_gib={self.cfg.max_gib}, "
                f"or make room in {self.cache.folder}."
            ) from None

    def _index(self, url: str, found: Found, record: Path, told: str) -> Shard:
        """Fetch a tar, once on this node, and index it."""
        made: list[Shard] = []

        def ready() -> str | None:
            kept = _kept(record)
            return kept[0].sha256 if kept is not None and kept[1] == found else None

        def fetch(file: int) -> str:
            mib = "" if found.size is None else f" of {found.size / 2**20:,.1f} MiB"
            log.warning("%s%s%s has no published index: it is fetched and read once, to be indexed", told, url, mib)
            sha256, size = self._save(url, file, found.size, None)
            shard, tensors = make_index(url, os.fstat(file), opened=file)
            assert (shard.sha256, shard.size) == (sha256, size), url
            made.append(shard._replace(mtime_ns=0))
            write_index(record, tensors, {"shard": json.dumps([*made[0]]), "found": json.dumps(found)})
            return sha256

        name = hashlib.sha256(json.dumps([url, *found]).encode()).hexdigest()
        if not self.cache.add(name, found.size or 0, ready, fetch):
            raise FetchError(
                f"{url} has no published index, and data.cache.max_gib={self.cfg.max_gib} has no room for it to be indexed: publish one "
                f"(`softmoe shards index`), or raise it."
            )
        kept = _kept(record)
        assert kept is not None, record
        return kept[0]

    def _save(self, url: str, file: int, size: int | None, sha256: str | None) -> tuple[str, int]:
        """Write a whole tar to `file`, again where other bytes come; its SHA-256 and size."""
        for _ in range(self.cfg.attempts):
            digest = _Digest(file)
            into = Sink(size if size is not None else self.cache.max_bytes, digest.write)
            self.client.save(url, into, size=size)
            os.ftruncate(file, into.at)
            if sha256 is None or digest.value(into.at) == sha256:
                return digest.value(into.at), into.at
            log.warning("%s came with other bytes than its index says; it is fetched again", url)
        raise FetchError(
            f"{url} is not what its index says: {self.cfg.attempts} times other bytes came than those of SHA-256 {sha256}; publish its "
            f"index again (`softmoe shards index`), or upload the file that was indexed."
        )

    def _index_bytes(self, shard: Shard) -> bytes:
        place = shard.path + SUFFIX
        for _ in range(self.cfg.attempts):
            data = self._file_bytes(place, shard.index_size)
            if len(data) == shard.index_size and hashlib.sha256(data).hexdigest() == shard.index_sha256:
                return data
        raise ShardsError(
            f"{place} is not the file that {INDEX} lists: publish the index again (`softmoe shards index`)."
        )

    def _file_bytes(self, place: str, limit: int) -> bytes:
        if "://" in place:
            return self.client.read(place, limit=limit)
        try:
            with open(place, "rb") as file:
                return file.read(limit + 1)
        except OSError as error:
            raise ShardsError(
                f"{place} cannot be read ({error.strerror}): publish the index again, or delete {INDEX}."
            ) from None

    def _record(self, url: str) -> Path:
        name = json.dumps([_FORMAT, sorted(PARTS), url])
        return index_folder() / f"{hashlib.sha256(name.encode()).hexdigest()}.url.safetensors"


class _Digest:
    """Writes bytes to a file where they belong, and hashes them as they come."""

    def __init__(self, file: int) -> None:
        self._file, self._sha256, self._at = file, hashlib.sha256(), 0

    def write(self, data: bytes, at: int) -> None:
        if at == 0:
            self._sha256, self._at = hashlib.sha256(), 0
        assert at == self._at, (at, self._at)
        self._sha256.update(data)
        self._at += len(data)
        view = memoryview(data)
        while view:
            try:
                written = os.pwrite(self._file, view, at)
            except OSError as error:  # no try of the download would mend it
                raise FetchError(
                    f"its copy cannot be written ({error.strerror}): make room in data.cache.folder, or lower data.cache.max_gib to what "
                    f"its disk has."
                ) from None
            view, at = view[written:], at + written

    def value(self, size: int) -> str:
        return self._sha256.hexdigest() if size else hashlib.sha256().hexdigest()


def _kept(record: Path) -> tuple[Shard, Found] | None:
    """The shard of an index that was made here, and what its URL was found to hold then."""
    try:
        with safe_open(record, framework="pt") as index:
            told = index.metadata()
        return Shard(*json.loads(told["shard"])), Found(*json.loads(told["found"]))
    except (FileNotFoundError, SafetensorError, KeyError, ValueError, TypeError):  # absent, or cut off by a full disk
        return None


def _mapped(file: Path, shard: Shard) -> Samples:
    try:
        with safe_open(file, framework="pt") as index:
            samples = Samples({name: index.get_tensor(name) for name in list(index.keys())})
    except (OSError, SafetensorError, KeyError):
        samples = None
    if samples is None or len(samples) != shard.count:
        file.unlink(missing_ok=True)
        raise ShardsError(f"the index of {shard.path} in {file.parent} was damaged and is deleted: start again.")
    return samples


def check_cache(cfg: CacheConfig) -> list[str]:
    """Why the folder that is there cannot keep shards; nothing is made."""
    folder = _folder_of(cfg)
    if not cfg.max_gib or not os.path.lexists(folder):
        return []
    try:
        os.close(open_own_folder(folder, "data.cache.folder"))
    except CacheError as error:
        return [f"data.cache.folder={cfg.folder}: {error}"]
    return []


def _folder_of(cfg: CacheConfig) -> Path:
    return Path(cfg.folder).expanduser() if cfg.folder is not None else _default_folder()


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "softmoe_train", "shards").expanduser()
