"""This file owns how a test runs one function on several real Gloo processes."""

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "wandb",
    "softmoe_train.commands.main",
    "tests.ranks.small",
    "tests.forked",
]


class RankFailedError(Exception):
    """A rank raised, died or took too long; the message holds the traceback of the first that did."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 400) -> list[Any]:
    """Run `fn(rank, world_size, *args)` in `world_size` new processes and return what each rank returns, in order.

    The default group is Gloo, each process has one thread, and nothing outlives the call. `fn` must be a module's own
    function; arguments and results are pickled (tensors on the CPU as they are, no DTensor). Raises RankFailedError.
    """
    context = server()
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(
                target=_main, args=(fn, rank, world_size, folder, timeout, ends[rank][1], args), daemon=True
            )
            for rank in range(world_size)
        ]
        old = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ.update(ONE_THREAD)  # read when the child imports torch
        try:
            for rank in ranks:
                rank.start()
            for _, theirs in ends:
                theirs.close()
            return _collect(ranks, [ours for ours, _ in ends], time.monotonic() + timeout)
        finally:
            for name, value in old.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            for rank in ranks:
                if rank.is_alive():
                    rank.kill()
                rank.join()


def server() -> ForkServerContext:
    """Whose processes are forked from a server that has imported what they need: seconds of each start, and there are many."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _main(
    fn: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, end: Connection, args: tuple
) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if Path("/sys/class/net/lo").exists() else "lo0")
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        result = fn(rank, world_size, *args)
        dist.barrier()  # so that no rank leaves while another still talks to it
        dist.destroy_process_group()
        end.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        end.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _collect(ranks: list[BaseProcess], ends: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) < len(ranks) and not failures:
        waiting = [ends[rank] for rank in range(len(ranks)) if rank not in results]
        ready = wait(waiting, timeout=max(0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(ranks)) if rank not in results]
            raise RankFailedError(f"no answer in time from ranks {late} of {len(ranks)}")
        _take(ready, ranks, ends, results, failures)
    if failures:
        rest = [ends[rank] for rank in range(len(ranks)) if rank not in results and rank not in failures]
        _take(wait(rest, timeout=0.5), ranks, ends, results, failures)
        # A rank that died by a signal says nothing itself; what the others say is only that it left them.
        first = min(failures, key=lambda rank: ranks[rank].exitcode is None or ranks[rank].exitcode == 0)
        raise RankFailedError(f"rank {first} of {len(ranks)}:\n{failures[first]}")
    return [results[rank] for rank in range(len(ranks))]


def _take(
    ready: list[Any],
    ranks: list[BaseProcess],
    ends: list[Connection],
    results: dict[int, Any],
    failures: dict[int, str],
) -> None:
    for rank in map(ends.index, ready):
        done, value = _receive(ranks[rank], ends[rank])
        (results if done else failures)[rank] = value


def _receive(process: BaseProcess, end: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(end.recv_bytes())
    except EOFError:
        process.join(10)
        code = process.exitcode
        if code is None or code >= 0:
            return False, f"ended with exit code {code} and no answer"
        return False, f"killed by {signal.Signals(-code).name}"
