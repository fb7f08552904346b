"""This file owns the claim on a run folder: one run at a time writes there."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from softmoe_train.config import ConfigError

LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what a file system says that has none
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)


class Claim:
    """This process's hold on a run folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Hold the folder, made where it is not there; again where it was deleted under us, and nothing where we hold it still.

        A record lock, not flock(): decode workers would inherit that, and hold it for seconds after a killed rank.
        Raises BlockingIOError that names the owner if another process holds it, ConfigError where it cannot be held.
        """
        if self._holds():
            return
        self.release()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / LOCK).open("a+")
            _lock(self._file, self._folder)
        except BlockingIOError:
            raise
        except OSError as error:
            raise _not_to_be_held(self._folder, error) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Give the folder back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _holds(self) -> bool:
        if self._file is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._folder / LOCK))
        except OSError:
            return False


@contextmanager
def claim(folder: Path) -> Iterator[Claim]:
    """Hold `folder` for this process until the end of the block; the kernel gives it back however the process ends."""
    held = Claim(folder)
    try:
        held.take()
        yield held
    finally:
        held.release()


def owner(folder: Path) -> str | None:
    """Who holds `folder`, or None; leaves no trace. Raises ConfigError where that cannot be told."""
    try:
        if not (folder / LOCK).is_file():
            return None
        with (folder / LOCK).open("r") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read() or "another process"
    except OSError as error:
        raise _not_to_be_held(folder, error) from None
    return None


def wait_until_free(folder: Path, seconds: float) -> None:
    """Give the owner of `folder` this long to end, where it has one."""
    until = time.monotonic() + seconds
    while owner(folder) is not None and time.monotonic() < until:
        time.sleep(0.2)


def _not_to_be_held(folder: Path, error: OSError) -> ConfigError | OSError:
    """A user's mistake, where it is one: a full disk or a lost server is not."""
    if error.errno not in (*WITHOUT_LOCKS, *NOT_OURS):
        return error
    remedy = (
        "give it locks (NFS: mount it without nolock, its lock service running), or give a run_dir on another file system"
        if error.errno in WITHOUT_LOCKS
        else "it may be another user's; give a run_dir that you may write to"
    )
    return ConfigError(
        [f"{folder} cannot be held by one run at a time, since {LOCK} in it gives {error.strerror or error}; {remedy}"]
    )


def _lock(file: IO[str], folder: Path) -> None:
    for patience in range(20, -1, -1):
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not patience:
                break
            time.sleep(0.1)  # somebody who only looks (`owner`) holds it for an instant
    file.seek(0)
    raise BlockingIOError(
        f"{folder} is in use by {file.read() or 'another process'}; wait for it or give another run_dir"
    )
