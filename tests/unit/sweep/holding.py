"""Another process that holds a folder, or tries to."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softmoe_train.faults.claim import claim


@contextmanager
def held_by_another(folder: Path) -> Iterator[int]:
    """A child holds `folder` until the end of the block, or until it is killed; yields its number."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with claim(folder):
                os.write(told, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready), os.close(told)
