"""This file owns the bytes of shards in one process: a bounded number of open files, and ranges of what is not kept whole."""

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from softmoe_train.data.http import NoRangesError
from softmoe_train.data.index import Shard
from softmoe_train.data.places import ShardsError, is_url
from softmoe_train.data.remote import Remote

_OPEN_FILES = 64
_GAP = 1 << 20  # bytes of other members that may come along between those of a sample

Kept = TypeVar("Kept")


class ShardFiles:
    """Reads bytes of shards by shard number. `worth_keeping` says of a shard at a URL whether a whole copy pays for this rank."""

    def __init__(self, shards: list[Shard], remote: Remote) -> None:
        self._shards, self.remote = shards, remote
        self.worth_keeping: Callable[[int], bool] = _always
        self._files: OrderedDict[int, int] = OrderedDict()
        self._range: tuple[int, int, bytes] | None = None  # (shard, first byte, bytes)
        self._whole_only: set[int] = set()  # whose servers give no ranges

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict(), "_range": None}

    def read(self, shard: int, offset: int, size: int, *, around: Callable[[], tuple[int, int]]) -> bytes:
        """`size` bytes at `offset`; `around`, the bytes (first, end) of all of its sample, come with them where a range is asked for."""
        file = self._file(shard)
        if file is not None:
            return os.pread(file, size, offset)
        held, first, data = self._range or (shard, 0, b"")
        if held != shard or not first <= offset <= offset + size <= first + len(data):
            first, end = around()
            if end - first > 2 * size + _GAP:
                first, end = offset, offset + size
            try:
                data = self.remote.span(self._shards[shard], first, end - first)
            except NoRangesError:
                if shard in self._whole_only:
                    raise
                self._whole_only.add(shard)
                return self.read(shard, offset, size, around=around)
            self._range = (shard, first, data)
        return data[offset - first : offset - first + size]

    def again(self, shard: int, offset: int, size: int, *, good: Callable[[bytes], bool]) -> bytes:
        """The same bytes asked for anew, by as many tries as a URL is given; a copy and a disk say the same twice."""
        data = b""
        for _ in range(self.remote.cfg.attempts if self._file(shard) is None else 1):
            self._range = None
            data = self.read(shard, offset, size, around=lambda: (offset, offset + size))
            if good(data):
                break
        return data

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _file(self, shard: int) -> int | None:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        known = self._shards[shard]
        file = self._copy(shard, known) if is_url(known.path) else _opened(known)
        if file is not None:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = file
        return file

    def _copy(self, shard: int, known: Shard) -> int | None:
        """A whole copy of a shard at a URL; None where ranges are to be read."""
        cache = self.remote.cache
        if not cache.max_bytes or not (shard in self._whole_only or self.worth_keeping(shard)):
            return cache.find(known.sha256, known.size) if cache.max_bytes else None
        file = self.remote.open(known)
        while file is None and known.size <= cache.max_bytes and self._close_oldest_copy():
            file = self.remote.open(known)  # what we held open ourselves was in its way
        return file

    def _close_oldest_copy(self) -> bool:
        for shard in self._files:
            if is_url(self._shards[shard].path):
                os.close(self._files.pop(shard))
                return True
        return False


def _always(_: int) -> bool:
    return True


def _opened(known: Shard) -> int:
    try:
        file = os.open(known.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ShardsError(
            f"{known.path} cannot be read ({error.strerror}): shards must stay where they are; bring it back and start again."
        ) from None
    facts = os.fstat(file)
    if (facts.st_size, facts.st_mtime_ns) != (known.size, known.mtime_ns):
        os.close(file)
        raise ShardsError(
            f"{known.path} has changed since this run indexed it: shards must stay as they are; start again."
        )
    return file


def recent(kept: OrderedDict[int, Kept], key: int, make: Callable[[], Kept], limit: int) -> Kept:
    """The value under `key`, made if absent; beyond `limit` values the one unused for longest is dropped."""
    if key in kept:
        kept.move_to_end(key)
        return kept[key]
    if len(kept) >= limit:
        kept.popitem(last=False)
    kept[key] = make()
    return kept[key]
