"""This file owns how a failure is reported: one error naming every problem, raised alike on every rank."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, trusted or loaded; `problems` holds one line per cause."""

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        super().__init__(what, list(problems))  # both as args, so that the error survives pickling between ranks
        self.what = what
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n".join([f"{self.what}:", *(f"  - {problem}" for problem in self.problems)])


class DamagedError(CheckpointError):
    """Files of a checkpoint are not what was saved; it is found before any of the state is touched."""


class NotFiniteError(CheckpointError):
    """A state holds values that are not finite; no checkpoint of it is completed."""


def problems_of(error: BaseException, rank: int) -> list[str]:
    """The lines that report `error`, raised on `rank`; a CheckpointError's lines pass unchanged."""
    if isinstance(error, CheckpointError):
        return error.problems
    return [f"rank {rank}: {type(error).__name__}: {error}"]


def agree(what: str, stage: Callable[[], T], rank: int, group: dist.ProcessGroup | None) -> T:
    """Run `stage` on every rank and return its result; if it fails on any, raise CheckpointError on all.

    It is of the kind of the failures where all are of one kind.
    """
    result, cause, failure = None, None, None
    try:
        result = stage()
    except Exception as error:
        cause = error
        failure = (type(error) if isinstance(error, CheckpointError) else CheckpointError, problems_of(error, rank))
    told = [failure]
    if group is not None:
        told = told * dist.get_world_size(group)
        dist.all_gather_object(told, failure, group=group)
    failures = [each for each in told if each is not None]
    if failures:
        kinds = {kind for kind, _ in failures}
        kind = kinds.pop() if len(kinds) == 1 else CheckpointError
        raise kind(what, list(dict.fromkeys(line for _, lines in failures for line in lines))) from cause
    return result  # type: ignore[return-value]


def from_rank_0(what: str, stage: Callable[[], T], rank: int, group: dist.ProcessGroup | None) -> T:
    """Run `stage` on rank 0 alone and return its result on every rank; if it fails, raise CheckpointError on all."""
    result = agree(what, lambda: stage() if rank == 0 else None, rank, group)
    if group is None:
        return result  # type: ignore[return-value]
    box = [result]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]  # type: ignore[return-value]
