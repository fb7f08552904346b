"""This file owns the decode workers: the processes that prepare batches, what ends them and what must not."""

import math
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from softmoe_train.data.batch import Batch, Broken
from softmoe_train.data.places import ShardsError, UselessShardsError
from softmoe_train.plain import plain


@dataclass(frozen=True)
class Decoding:
    """How batches are prepared: worker processes, batches ahead of each, how many broken samples are borne, and whether in pinned memory."""

    workers: int
    prefetch: int
    max_broken: int
    pinned: bool


def load_batches(
    batches: Dataset[Batch], positions: Iterable[int], decoding: Decoding, *, grace: int = 0
) -> Iterator[Batch]:
    """The batches at `positions` in order; raises UselessShardsError above `max_broken`, RuntimeError where a worker dies.

    The first `grace` batches above it are still given: whoever takes them may end in good order.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=positions,
        collate_fn=_as_it_is,
        num_workers=decoding.workers,
        prefetch_factor=decoding.prefetch if decoding.workers else None,
        worker_init_fn=_start_worker,
        pin_memory=decoding.pinned,  # by a thread of the training process, so that the way to the GPU runs beside the step before
        generator=torch.Generator(),  # its own: the loader's seed must not advance the global one
    )
    broken: list[Broken] = []
    above = 0
    try:
        for batch in loader:
            broken += batch.broken
            above += len(broken) > decoding.max_broken
            if above > grace:
                raise UselessShardsError(_too_many(broken, decoding.max_broken))
            yield batch
    except ShardsError as error:  # raised in a worker, it comes with the worker's traceback in its text
        raise ShardsError(_last_line(error)) from None
    except UselessShardsError as error:
        raise error if above > grace else UselessShardsError(_last_line(error)) from None
    except (ConnectionError, EOFError) as error:  # a batch is fetched from its worker, and that one is gone
        raise RuntimeError("a decode worker ended unexpectedly: was it killed, for memory perhaps?") from error


def shared_bytes(shape: tuple[int, ...]) -> torch.Tensor:
    """A uint8 tensor of anything; in a decode worker it lies in shared memory, so that a batch is not copied on its way to the training process."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _too_many(broken: Sequence[Broken], limit: int) -> str:
    shown = "".join(f"\n  {plain(one.shard)} {plain(one.key)}: {plain(one.reason)}" for one in broken[-5:])
    return (
        f"{len(broken)} broken samples on this rank are more than data.max_broken={limit}; the last were{shown}\n"
        "repair the shards, correct the setting that a reason names, or raise data.max_broken if their loss does not matter."
    )


def _last_line(error: Exception) -> str:
    """What an error says, without the traceback that a worker puts before it."""
    said = str(error.args[0]).strip().splitlines()[-1]
    return said.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def _as_it_is(batch: Any) -> Batch:
    return batch


def _start_worker(_: int) -> None:
    """Make a decode worker single-threaded, and deaf to signals that are meant for the training process.

    SLURM sends its warning and its SIGTERM to every process of a step, workers too; one that died of it would kill the
    save that the signal asks for. A SIGTERM from the parent itself still ends the worker.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
