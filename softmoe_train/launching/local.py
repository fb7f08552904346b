"""This file owns the local launch: worker processes on this machine under torch's elastic agent, and how they end."""

import gc
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import PContext, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from softmoe_train.cores import usable_cores
from softmoe_train.launching.worker import HUNG, LAUNCHER, RESUME

# A refused setting, a run that stopped itself, one that hung, one that was asked to end: every rank ends so, and one has said why.
TOLD_CODES = (2, 3, HUNG, RESUME)
LOOK_SECONDS = 1.0  # more than lies between two looks of the agent at its workers, also on a busy host
SURVIVOR_SECONDS = 3  # what the ranks beside a failed one get after SIGTERM: their step cannot be finished any more
# Signals this soon after the first are the first: timeout(1) sends two, and a person's Ctrl-C may come with the shell's.
ONE_SIGNAL_SECONDS = 1.0
OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGENTS = (signal.SIGHUP, signal.SIGQUIT)


def launch_local(processes: int, command: list[str], *, grace_seconds: int, told: Collection[int] = TOLD_CODES) -> int:
    """Run `command` in `processes` local workers with torchrun's environment, and return the exit code of the whole.

    A worker's main belongs in `run_worker`. 0 when all ended well; when one fails the others are ended within seconds,
    its traceback is printed last, and its exit code returned (128 + n for signal n). Of a worker that ends with a code of
    `told` without raising, nothing more is said. SIGINT, SIGTERM and SIGUSR1 go on to the process groups of all workers, which are
    killed `grace_seconds` later if they still run, or at once at a second signal; the code is then 128 + n, unless the workers
    ended well (0) or with one of `told`. Must be called from the main thread: the workers die with it, and signals arrive there.
    """
    with ExitStack() as stack:
        # The agent's rendezvous has a thread and refers to itself: collected in that thread by chance, it would complain.
        stack.callback(gc.collect)
        log_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="softmoe_launch_"))
        stack.enter_context(worker_environment(processes))
        stack.enter_context(quiet_elastic())
        ended = stack.enter_context(bounded_close(grace_seconds))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # the agent binds a free port itself, so no two launches can race for one
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
            signals_to_handle=",".join(number.name for number in AGENTS),
        )
        stack.enter_context(own_signals())
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            return report_failure(error.failures, ended, told)
        except SignalException as error:
            return code_after(error.sigval, ended, told)
        return 0


@dataclass
class Ended:
    """What had ended when the agent first saw a failure, before it asked the other workers to end, and how all did at last."""

    ranks: set[int] = field(default_factory=set)
    seen: float = 0.0  # seconds since the epoch
    codes: list[int | None] = field(default_factory=list)


def code_after(number: int, ended: Ended, told: Collection[int]) -> int:
    """The exit code of a launch that got a signal: what the workers made of it, else the signal's."""
    if ended.codes and not any(code != 0 for code in ended.codes):
        return 0
    return max((code for code in ended.codes if code in told and code is not None), default=128 + number)


def report_failure(failures: dict[int, ProcessFailure], ended: Ended, told: Collection[int] = TOLD_CODES) -> int:
    """Print the first failure last, the others in a line each before it, and return the exit code of the first."""
    root, *others = sorted(failures, key=lambda rank: moment_of(failures[rank], ended))
    trace = traceback_of(failures[root])
    if failures[root].exitcode in told and not trace:
        return failures[root].exitcode
    for rank in others:
        if failures[rank].exitcode != -signal.SIGTERM:  # that is how the agent ends the survivors
            print(f"rank {rank} then {ending_of(failures[rank])}", file=sys.stderr)
    ending = (
        f":\n{trace.rstrip()}" if trace else f": it {ending_of(failures[root])}"
    )  # its last line says what was raised
    print(f"rank {root} failed first{ending}", file=sys.stderr, flush=True)
    code = failures[root].exitcode
    return code if code > 0 else 128 - code


def moment_of(failure: ProcessFailure, ended: Ended) -> tuple[bool, float]:
    """Sorts failures by cause: those that ended by themselves come before those that the agent ended, each by time.

    An error file tells the nanosecond. A worker that was killed left none: it ended within the second before the agent saw
    it, and so comes before the errors of that second, which its death caused in the others.
    """
    path = Path(failure.error_file)
    when = path.stat().st_mtime if path.is_file() else ended.seen - LOOK_SECONDS
    return failure.local_rank not in ended.ranks, when


def ending_of(failure: ProcessFailure) -> str:
    """How a worker ended, in words."""
    if failure.exitcode < 0:
        return f"was ended by {signal.Signals(-failure.exitcode).name}"
    message = failure.error_file_data.get("message")
    if isinstance(message, dict):
        return f"raised {message['message'].splitlines()[0]}"
    return f"exited with {failure.exitcode}"


def traceback_of(failure: ProcessFailure) -> str:
    """The traceback that a worker left in its error file, or nothing."""
    message = failure.error_file_data.get("message")
    return message["extraInfo"]["py_callstack"] if isinstance(message, dict) else ""


@contextmanager
def own_signals() -> Iterator[None]:
    """Has OURS end the launch as the agent's handlers would, but once a second; puts back all that it or the agent replaces."""
    before = {number: signal.getsignal(number) for number in (*OURS, *AGENTS)}
    latest = -ONE_SIGNAL_SECONDS

    def end(number: int, frame: object) -> None:
        nonlocal latest
        if time.monotonic() - latest >= ONE_SIGNAL_SECONDS:
            latest = time.monotonic()
            raise SignalException(f"signal {number}", signal.Signals(number))

    for number in OURS:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def worker_environment(processes: int) -> Iterator[None]:
    """The variables that workers inherit from us; ours, and those the agent adds, are taken back afterwards."""
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def quiet_elastic() -> Iterator[None]:
    """Keeps the agent's own account of a failure off the screen; ours is shorter."""
    logger = logging.getLogger("torch.distributed.elastic")
    before, nowhere = logger.propagate, logging.NullHandler()
    logger.propagate = False
    logger.addHandler(nowhere)
    try:
        yield
    finally:
        logger.removeHandler(nowhere)
        logger.propagate = before


@contextmanager
def bounded_close(grace_seconds: int) -> Iterator[Ended]:
    """Bounds how long the agent waits between asking workers to end and killing them; fills what it yields.

    After a failure it waits 30 s, which no option reaches: it calls `close()` bare. On a signal it names the signal,
    and the workers may want the time to save. To end with RESUME is no failure: the other workers are left to follow.
    """
    close, ended = PContext.close, Ended()

    def close_soon(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        if isinstance(self, SubprocessContext) and not ended.ranks:
            handlers = self.subprocess_handlers
            ended.ranks = {rank for rank, handler in handlers.items() if handler.proc.poll() is not None}
            ended.seen = time.time()
            if ended.ranks and all(handlers[rank].proc.returncode == RESUME for rank in ended.ranks):
                wait_for_workers(handlers, grace_seconds)
        try:
            close(self, death_sig, SURVIVOR_SECONDS if death_sig is None else grace_seconds)
        except SignalException:  # asked a second time
            close(self, signal.SIGKILL, SURVIVOR_SECONDS)
            raise
        if isinstance(self, SubprocessContext):
            ended.codes = [handler.proc.poll() for handler in self.subprocess_handlers.values()]

    PContext.close = close_soon
    try:
        yield ended
    finally:
        PContext.close = close


def wait_for_workers(handlers: Mapping[int, SubprocessHandler], seconds: int) -> None:
    """Give workers this long to end by themselves."""
    until = time.monotonic() + seconds
    with suppress(subprocess.TimeoutExpired):
        for handler in handlers.values():
            handler.proc.wait(max(0.0, until - time.monotonic()))
