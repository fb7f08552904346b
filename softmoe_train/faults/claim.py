"""This file owns the claim on a run folder: one run at a time writes there."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK = ".lock"


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process until the end of the block; the kernel gives it back however the process ends.

    A record lock, not flock(): decode workers would inherit that, and hold it for seconds after a killed rank.
    Raises BlockingIOError that names the owner if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        _lock(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def owner(folder: Path) -> str | None:
    """Who holds `folder`, or None; leaves no trace."""
    if not (folder / LOCK).is_file():
        return None
    with (folder / LOCK).open("r") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read() or "another process"
    return None


def wait_until_free(folder: Path, seconds: float) -> None:
    """Give the owner of `folder` this long to end, where it has one."""
    until = time.monotonic() + seconds
    while owner(folder) is not None and time.monotonic() < until:
        time.sleep(0.2)


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
