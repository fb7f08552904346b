"""This file owns how a worker lives and dies: with its launcher, and with its traceback where the launcher finds it."""

import ctypes
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from softmoe_train.dist import first_to_fail
from softmoe_train.launching.environment import by_srun

LAUNCHER = "SOFTMOE_LAUNCHER_PID"  # set by our own launcher, which shows a failure itself
RESUME = 75  # the exit code of a run that was asked to end and has saved: the same command goes on (EX_TEMPFAIL of <sysexits.h>)
HUNG = 4  # of a run in which nothing moved any more: the same command goes on, but whether it should is for a person or a counter
CAUSE_SECONDS = 30.0  # in which srun ends a step of which a rank has failed, also on hosts that are busy
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def launcher_of(environ: Mapping[str, str]) -> int | None:
    """The process of our own launcher, where this worker is of its first set; None elsewhere."""
    first = environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    return int(environ[LAUNCHER]) if LAUNCHER in environ and first else None


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel SIGKILL this process when its parent dies, however it dies (Linux; elsewhere nothing happens).

    `parent` is its number, where the caller was told. The signal follows the parent THREAD that started this process: a launcher
    must start its workers from a thread that lives as long as they do (torch's agent uses its main thread). It is not inherited
    by our own children.
    """
    if not sys.platform.startswith("linux"):
        return
    # Under our launcher the parent is known by number; elsewhere the first look is the best there is. Parent 1 does not
    # tell an orphan: in a container the launcher itself is often process 1.
    if parent is None:
        parent = int(os.environ.get(LAUNCHER, os.getppid()))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(128 + signal.SIGKILL)


def end_launcher() -> None:
    """Have torchrun end in good order, where it would start again what can only end in the same way.

    It starts its workers again after any exit code but 0, and 0 would say that all is well.
    """
    os.kill(os.getppid(), signal.SIGTERM)


def run_worker(main: Callable[[], int]) -> int:
    """Run a worker's main and return its exit code; a worker whose main raises reports its traceback and exits with 1.

    The traceback goes into the error file of torch's agent, and to stderr unless our own launcher will print it. The
    exit is immediate: with a collective under way an orderly end of the interpreter can wait for ever, and the launcher
    brings the others down only when this process has gone. What must be closed is closed in `main`, by `finally`.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # srun's steps have their own way of ending tasks
        die_with_parent()
    try:
        code = main()
        return code if code == 0 else exit_now(code)
    except KeyboardInterrupt:  # Ctrl-C reaches every rank: a traceback from each would bury the last thing they said
        exit_now(128 + signal.SIGINT)
    except Exception as error:
        get_error_handler().record_exception(error)
        if by_srun(os.environ):
            let_the_cause_speak()
        if LAUNCHER not in os.environ:
            print(f"rank {os.environ.get('RANK', '0')} failed:", file=sys.stderr)
            traceback.print_exception(error)
        exit_now(1)


def let_the_cause_speak() -> None:
    """Return at once on the rank that failed first, on others later: srun has ended them by then, and one traceback tells why."""
    began, answers = time.monotonic(), queue.SimpleQueue[bool]()
    # The store is rank 0's, and may be gone: nothing bounds how long it is looked for.
    threading.Thread(target=lambda: answers.put(first_to_fail()), daemon=True).start()
    with suppress(queue.Empty):
        if answers.get(timeout=CAUSE_SECONDS):
            return
    time.sleep(max(0.0, began + CAUSE_SECONDS - time.monotonic()))


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for threads, process groups or exit handlers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
