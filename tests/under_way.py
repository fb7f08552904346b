"""This file owns a forked program (tests/forked.py) that runs beside a test: what it has printed so far, its signals and its end."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from tests import forked
from tests.ranks.launch import ONE_THREAD, server
from tests.runs import environment

OURS = ["observe.wandb.mode=disabled", "observe.progress=plain"]


def train(*overrides: str, folder: Path, ok: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
    """tests.runs.softmoe without the imports of each process; `ok` insists on exit code 0."""
    done = forked.forked("train", *OURS, *overrides, folder=folder, **changes)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


class UnderWay:
    """`python -m MODULE WORDS` in a session of its own, as a fork; what it starts of `modules` is forked too. The methods are Popen's."""

    def __init__(
        self, *words: str, folder: Path, module: str = "softmoe_train", modules: tuple[str, ...] = (), **changes: str,
    ) -> None:  # fmt: skip
        self._place = tempfile.TemporaryDirectory()
        self.stdout, self.stderr = (Path(self._place.name) / name for name in ("stdout", "stderr"))
        for file in (self.stdout, self.stderr):
            file.touch()
        told = environment(**changes)
        self._process = server().Process(
            target=_begin, args=(modules, module, words, folder, told, [self.stdout, self.stderr])
        )
        with patch.dict(os.environ, ONE_THREAD):  # read when the server starts
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit code when it has ended; raises TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it has printed, when it has ended."""
        self.wait(timeout)
        return self.stdout.read_text(), self.stderr.read_text()

    def until_printed(self, text: str) -> str:
        """What it has printed by the time that this is a part of it, or when it has ended."""
        while True:
            ended = self.poll() is not None
            printed = self.stdout.read_text()
            if text in printed or ended:
                return printed
            time.sleep(0.005)

    def send_signal(self, number: int) -> None:
        """To it alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to it alone."""
        self.send_signal(signal.SIGKILL)


def _begin(
    modules: tuple[str, ...],
    module: str,
    words: tuple[str, ...],
    folder: Path,
    environ: dict[str, str],
    files: list[Path],
) -> NoReturn:
    os.setsid()
    forked.MODULES += modules
    forked._begin(module, words, folder, environ, files)
