"""This file owns the shards that a node keeps near: whole copies of tars at URLs, in one bounded folder that its processes share.

An entry is complete from the moment it has its name: it is written beside, under a lock, checked, and renamed. Whoever has an
entry open holds a shared lock on it, and nothing that is locked is evicted; locks end with the process that holds them. The
last use of an entry is its modification time. Nothing here follows a link.
"""

import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from softmoe_train.data.places import ShardsError

LOOK = 0.05  # seconds between two looks at a lock
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_PART, _LOCK = ".part", "lock"
log = logging.getLogger(__name__)


class _Held(NamedTuple):
    name: str
    size: int
    used: int


class CacheError(ShardsError):
    """Why the cache cannot be used; the message says what helps."""


class ShardCache:
    """At most `max_bytes` of entries in `folder`, which is made if need be; `patience` is the seconds that others may stand still."""

    def __init__(self, folder: Path, *, max_bytes: int, patience: float) -> None:
        self.folder, self.max_bytes, self.patience = folder, max_bytes, patience
        self._folder: int | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_folder": None}

    def find(self, name: str, size: int) -> int | None:
        """The entry `name`, open and locked against eviction until it is closed; None where there is none of that size."""
        for _ in self._looks(f"the entry {name} of {self.folder}"):
            file = self._opened(name, os.O_RDONLY)
            if file is None:
                return None
            if not _lock(file, fcntl.LOCK_SH):  # it is being evicted
                os.close(file)
                continue
            facts = os.fstat(file)
            if facts.st_nlink and facts.st_size == size:
                os.utime(file)
                return file
            os.close(file)
            if facts.st_nlink:  # cut off or grown: it is not what was renamed
                log.warning("%s/%s has %d bytes, not %d: it is fetched again", self.folder, name, facts.st_size, size)
                self._remove(name)
        raise AssertionError(name)

    def add(self, name: str, size: int, ready: Callable[[], str | None], fetch: Callable[[int], str]) -> bool:
        """Have `fetch` write an entry to a file, or wait for the process that does; False where there is no room for it.

        `name` names the work, and `ready` gives the entry that it ended in, once it has. `fetch` returns that name, or raises
        unless the file is whole. A `size` of 0 is one that is not known.
        """
        part = self._claim(name + _PART, ready)
        if part is None:
            return True
        try:
            if not self._make_room(max(size, 1), keep=name + _PART):
                return False
            os.ftruncate(part, size)  # others see what is spoken for
            final = fetch(part)
            os.fsync(part)
            os.rename(name + _PART, final, src_dir_fd=self._at(), dst_dir_fd=self._at())
        finally:
            if self._is_at(name + _PART, part):
                self._remove(name + _PART)
            os.close(part)
        if not self._make_room(0, keep=None):
            log.warning("%s holds more than data.cache.max_gib allows, and all of it is in use", self.folder)
        return True

    def has(self, name: str) -> bool:
        """Whether there is such an entry now."""
        return os.access(name, os.F_OK, dir_fd=self._at(), follow_symlinks=False)

    def _claim(self, part: str, ready: Callable[[], str | None]) -> int | None:
        """The unfinished file, ours alone; None once what it was to become is there."""
        seen, since = None, time.monotonic()
        while True:
            file = self._opened(part, os.O_RDWR | os.O_CREAT)
            assert file is not None, part
            facts = os.fstat(file)
            if _lock(file, fcntl.LOCK_EX):
                done = ready()
                if not os.fstat(file).st_nlink or not self._is_at(part, file):  # finished or given up while we looked
                    os.close(file)
                    continue
                if done is None or not self.has(done):
                    return file
                os.unlink(part, dir_fd=self._at())
                os.close(file)
                return None
            os.close(file)
            now = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > self.patience:
                raise CacheError(
                    f"another process has held {self.folder}/{part} for {self.patience:g} s and written nothing to it: end that process "
                    f"(`fuser {self.folder}/{part}` names it) and start again."
                )
            time.sleep(LOOK)

    def _make_room(self, needed: int, *, keep: str | None) -> bool:
        """Evict what has gone unused for longest until `needed` bytes more fit; False where what is in use is too much."""
        if needed > self.max_bytes:
            return False
        file = self._opened(_LOCK, os.O_RDWR | os.O_CREAT)
        assert file is not None
        try:
            for _ in self._looks(f"the lock {self.folder}/{_LOCK}"):
                if _lock(file, fcntl.LOCK_EX):
                    break
            held = sorted(self._held(), key=lambda one: one.used)
            total = sum(one.size for one in held)
            for one in held:
                unfinished = one.name.endswith(_PART)
                if one.name == keep or (total + needed <= self.max_bytes and not unfinished):
                    continue
                if self._evict(one.name):
                    total -= one.size
            return total + needed <= self.max_bytes and self._disk_has(needed)
        finally:
            os.close(file)

    def _evict(self, name: str) -> bool:
        """Delete an entry that nobody has open, or an unfinished one that nobody writes."""
        file = self._opened(name, os.O_RDONLY)
        if file is None:
            return True
        try:
            if not _lock(file, fcntl.LOCK_EX) or not self._is_at(name, file):
                return False
            os.unlink(name, dir_fd=self._at())
            return True
        finally:
            os.close(file)

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._at())

    def _held(self) -> list[_Held]:
        found = []
        for name in os.listdir(self._at()):
            with suppress(FileNotFoundError):
                facts = os.stat(name, dir_fd=self._at(), follow_symlinks=False)
                if stat.S_ISREG(facts.st_mode) and name != _LOCK:
                    found.append(_Held(name, facts.st_size, facts.st_mtime_ns))
        return found

    def _disk_has(self, needed: int) -> bool:
        facts = os.fstatvfs(self._at())
        if not facts.f_blocks or facts.f_bavail * facts.f_frsize > needed:  # some file systems tell nothing
            return True
        log.warning("the disk of %s has no room for %.1f MiB more: it is read from afar", self.folder, needed / 2**20)
        return False

    def _opened(self, name: str, flags: int) -> int | None:
        """A file of ours; None where there is none. Raises CacheError at what nobody but an intruder could have put there."""
        try:
            file = os.open(name, flags | _OPEN, 0o600, dir_fd=self._at())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"{self.folder}/{name} cannot be opened ({error.strerror}): delete it.") from None
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.getuid():
            os.close(file)
            raise CacheError(f"{self.folder}/{name} is no file of yours: delete it.")
        return file

    def _is_at(self, name: str, file: int) -> bool:
        """Whether `name` still names the open `file`."""
        try:
            return os.stat(name, dir_fd=self._at(), follow_symlinks=False).st_ino == os.fstat(file).st_ino
        except FileNotFoundError:
            return False

    def _at(self) -> int:
        if self._folder is None:
            self._folder = open_own_folder(self.folder, "data.cache.folder")
        return self._folder

    def _looks(self, what: str) -> Iterator[None]:
        """As many turns as patience allows."""
        since = time.monotonic()
        while time.monotonic() - since < self.patience:
            yield
            time.sleep(LOOK)
        raise CacheError(f"another process has held {what} for {self.patience:g} s: end that process and start again.")


def open_own_folder(folder: Path, key: str) -> int:
    """A folder that nobody else can enter, made if need be; raises CacheError, which names `key`, at any other."""
    remedy = f"give another {key}, a folder of your own."
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise CacheError(f"{folder} cannot be used to keep shards ({error.strerror}): {remedy}") from None
    facts = os.fstat(file)
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        os.close(file)
        raise CacheError(
            f"{folder} can be entered by others, and shards in it would be taken for whole: chmod 700, or {remedy}"
        )
    return file


def _lock(file: int, kind: int) -> bool:
    """Lock an open file unless another holds it; raises CacheError where its file system knows no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise CacheError(
            f"the file system of data.cache.folder has no locks ({error.strerror}): give a folder on a disk of this node."
        ) from None
    return True
