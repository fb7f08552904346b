"""This file owns how a test runs a program as a fork of a process that has its imports, which are seconds of each start.

All else is real: the launcher, the processes that it starts (each a fork of it instead of a new Python) with their environment, sessions,
signals and output, and how they end. What is proved of a start itself starts the real program (tests/runs.py).
"""

import inspect
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch

from tests.ranks.launch import ONE_THREAD, server
from tests.runs import command, environment

MODULES = ("softmoe_train", "softmoe_train.sweep.child")  # what our launchers start, as `python -m MODULE ...`


def forked(
    *words: str, folder: Path, module: str = "softmoe_train", timeout: float = 300, **changes: str
) -> subprocess.CompletedProcess[str]:
    """What `python -m MODULE WORDS` in `folder` printed, and how it ended."""
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / name for name in ("stdout", "stderr")]
        child = server().Process(target=_begin, args=(module, words, folder, environment(**changes), files))
        with patch.dict(os.environ, ONE_THREAD):  # read when the server starts
            child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, child.exitcode, *(file.read_text() for file in files))


def training(*overrides: str, folder: Path, ok: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
    """As `tests.runs.softmoe`: `softmoe train` in `folder` to its end; `ok` insists on exit code 0."""
    done = forked(*command(*overrides)[3:], folder=folder, **changes)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def _begin(module: str, words: tuple[str, ...], folder: Path, environ: dict[str, str], files: list[Path]) -> NoReturn:
    output = [os.open(file, os.O_WRONLY | os.O_CREAT) for file in files]
    os.chdir(folder)
    execute = subprocess.Popen._execute_child  # pyright: ignore[reportAttributeAccessIssue]

    def start(self: subprocess.Popen, *args: Any) -> None:
        """As Popen does, but by a fork alone where it is a program of ours."""
        asked = inspect.signature(execute).bind(self, *args).arguments
        python, _, name, *rest = [*asked["args"], "", ""]
        if python != sys.executable or name not in MODULES:
            execute(self, *args)
            return
        # What is buffered would be written twice.
        sys.stdout.flush(), sys.stderr.flush()
        child = os.fork()
        if child == 0:
            if asked["start_new_session"]:
                os.setsid()
            if asked["process_group"] != -1:
                os.setpgid(0, asked["process_group"])
            theirs = [asked[name] if asked[name] != -1 else at for at, name in enumerate(("c2pwrite", "errwrite"), 1)]
            _as_new(name, rest[:-2], asked["env"] or dict(os.environ), theirs)
        self.pid, self._child_created = child, True  # pyright: ignore[reportAttributeAccessIssue]
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[name] for name in pipes))  # pyright: ignore[reportAttributeAccessIssue]

    subprocess.Popen._execute_child = start  # pyright: ignore[reportAttributeAccessIssue]
    _as_new(module, list(words), environ, output)


def _as_new(module: str, words: list[str], environ: dict[str, str], output: list[int]) -> NoReturn:
    """Be a new Python that runs a module: its signals, files and environment, and its end."""
    code = 1
    try:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for at, file in enumerate(os.dup(file) for file in output):
            os.dup2(file, at + 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdout, sys.stderr = (open(at, "w", buffering=1, closefd=False) for at in (1, 2))  # noqa: SIM115
        multiprocessing.set_start_method(None, force=True)
        resource_tracker._resource_tracker._fd = None  # pyright: ignore[reportAttributeAccessIssue]
        os.environ.clear()
        os.environ.update(environ)
        torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
        sys.argv[1:] = words
        code = _ended(module)
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


def _ended(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
